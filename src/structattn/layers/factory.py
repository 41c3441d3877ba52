"""Build a layer from a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from structattn import checks
from structattn.layers.attention_configs import (
    AttentionConfig,
    BilinearConfig,
    GlobalSlidingWindowConfig,
    MLRConfig,
    SlidingWindowConfig,
    StandardConfig,
)
from structattn.layers.bilinear import BilinearAttention
from structattn.layers.grammar import as_config
from structattn.layers.interface import Attention, width_per_head
from structattn.layers.mlr import MLRAttention
from structattn.layers.options import LayerKeywords
from structattn.layers.sliding import GlobalSlidingWindowAttention, SlidingWindowAttention
from structattn.layers.standard import StandardAttention

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from structattn.layers.choices import LevelWeight


def build_attention(
    config: AttentionConfig | str | Mapping[str, Any],
    dim: int,
    heads: int,
    context_length: int,
    *,
    head_dim: int | None = None,
    **options: Unpack[LayerKeywords],
) -> Attention:
    """Build the attention layer of `config` for a model shape.

    Args:
        config: a config, its spelling (`"mlr:8x8"`, see `structattn.layers.grammar`), or its dict form.
        dim: `D`, the model's width.
        heads: query heads.
        context_length: tokens the model is made for, which place windows and blocks of MLR attention. Layers take any
            length.
        head_dim: width of a head; `dim / heads` by default.
        options: `kv_heads`, `is_causal`, `bias`, `dropout`, `rotary`, `standard_kernel`, `device`, `dtype` and
            `generator`, see `structattn.layers.options.LayerOptions`. MLR attention sets the frequencies of `rotary`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    config = as_config(config)
    head_dim = width_per_head(dim, heads, head_dim)
    checks.positive_int("context_length", context_length)
    shared: dict[str, Any] = {"head_dim": head_dim, **options}
    match config:
        case StandardConfig(heads=count, qk_norm=qk_norm, scale=scale, kv_heads=kv_heads):
            if count is not None:
                shared["head_dim"] = width_per_head(heads * head_dim, count, None)
            if kv_heads is not None:
                shared["kv_heads"] = kv_heads
            return StandardAttention(dim, count or heads, scale=scale, qk_norm=qk_norm, **shared)
        case MLRConfig(level_weight=weight, qk_norm=qk_norm, basis=basis):
            hierarchy = config.hierarchy(head_dim, context_length)
            if hierarchy.value_ranks is not None:
                shared["head_dim"] = sum(hierarchy.value_ranks)
            weight = cast("LevelWeight", weight)  # every config has one
            if shared.get("rotary") is not None:
                shared["rotary"] = replace(shared["rotary"], frequencies=config.frequencies)
            return MLRAttention(dim, heads, hierarchy, level_weight=weight, basis=basis, qk_norm=qk_norm, **shared)
        case SlidingWindowConfig(window=window, qk_norm=qk_norm, scale=scale):
            return SlidingWindowAttention(dim, heads, window, scale=scale, qk_norm=qk_norm, **shared)
        case GlobalSlidingWindowConfig(window=window, global_rank=global_rank, qk_norm=qk_norm, scale=scale):
            return GlobalSlidingWindowAttention(dim, heads, window, global_rank, scale=scale, qk_norm=qk_norm, **shared)
        case BilinearConfig(side=side, norm=norm, scale=scale):
            device, dtype = shared.pop("device", None), shared.pop("dtype", None)
            generator = shared.get("generator")
            structure = config.structure(dim, heads, head_dim, device=device, dtype=dtype, generator=generator)
            return BilinearAttention(structure, side=side, norm=norm, scale=scale, **shared)
    raise TypeError(f"config must be one of the kinds of structattn.layers, got {type(config).__name__}")
