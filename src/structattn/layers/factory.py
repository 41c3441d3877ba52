"""From a config to a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

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
from structattn.layers.rotary import RotaryEmbedding
from structattn.layers.sliding import GlobalSlidingWindowAttention, SlidingWindowAttention
from structattn.layers.standard import StandardAttention


def build_attention(
    config: AttentionConfig | str | Mapping[str, Any],
    dim: int,
    heads: int,
    context_length: int,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    is_causal: bool = True,
    rotary: RotaryEmbedding | None = None,
    dropout: float = 0.0,
    bias: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Attention:
    """The attention layer that `config` names, for a model of the given shape.

    Args:
        config: a config, its spelling (`"mlr:8x8"`, see `structattn.layers.grammar`), or its dict form.
        dim: `D`, the model's width.
        heads: query heads.
        context_length: tokens the model is made for, which place the blocks of MLR attention; layers take any length.
        kv_heads: heads of keys and values, a divisor of `heads`.
        head_dim: width of a head; `D / heads` by default.
        is_causal: whether a token sees only itself and earlier ones.
        rotary: rotary embedding of queries and keys.
        dropout: share of attention probabilities dropped in training.
        bias: whether projections have biases.
        device: where the parameters live.
        dtype: their dtype.
        generator: source of the initial parameters.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    config = as_config(config)
    head_dim = width_per_head(dim, heads, head_dim)
    checks.positive_int("context_length", context_length)
    options: Any = {
        "kv_heads": kv_heads,
        "is_causal": is_causal,
        "rotary": rotary,
        "dropout": dropout,
        "bias": bias,
        "device": device,
        "dtype": dtype,
        "generator": generator,
    }
    match config:
        case StandardConfig(heads=count, qk_norm=qk_norm, scale=scale):
            if count is not None:
                heads, head_dim = count, width_per_head(heads * head_dim, count, None)
            return StandardAttention(dim, heads, head_dim=head_dim, scale=scale, qk_norm=qk_norm, **options)
        case MLRConfig(level_weight=level_weight, qk_norm=qk_norm, basis=basis):
            hierarchy = config.hierarchy(head_dim, context_length)
            options |= {"level_weight": level_weight, "qk_norm": qk_norm, "basis": basis}
            return MLRAttention(dim, heads, hierarchy, head_dim=head_dim, **options)
        case SlidingWindowConfig(window=window, qk_norm=qk_norm, scale=scale):
            options |= {"head_dim": head_dim, "qk_norm": qk_norm, "scale": scale}
            return SlidingWindowAttention(dim, heads, window, **options)
        case GlobalSlidingWindowConfig(window=window, global_rank=global_rank, qk_norm=qk_norm, scale=scale):
            options |= {"head_dim": head_dim, "qk_norm": qk_norm, "scale": scale}
            return GlobalSlidingWindowAttention(dim, heads, window, global_rank, **options)
        case BilinearConfig(side=side, norm=norm, scale=scale):
            structure = config.structure(dim, heads, head_dim, device=device, dtype=dtype, generator=generator)
            del options["device"], options["dtype"]
            return BilinearAttention(structure, side=side, norm=norm, scale=scale, head_dim=head_dim, **options)
    raise TypeError(f"config must be one of the kinds of structattn.layers, got {type(config).__name__}")
