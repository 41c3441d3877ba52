"""Convert a trained model from standard to MLR attention.

At full depth scores stay the same. Dimensions are put in order. Symbols as in `structattn.layers.head_basis`: moments
`C_q`, `C_k` of a head's queries and keys after norm and rotary embedding, and the maps `A`, `B` from those to the
dimensions that the levels own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from structattn import checks
from structattn.layers import MLRAttention, MLRConfig, StandardAttention, StandardConfig, as_config
from structattn.layers.deprecation import serve_old_names
from structattn.layers.head_basis import Moments, MomentSums, balancing_maps, order_pairs_by_energy
from structattn.layers.projected import ProjectedAttention
from structattn.models.configuration import LanguageModelConfig
from structattn.models.language_model import LanguageModel
from structattn.ops.hierarchy import Hierarchy

OrderSource = Literal["measured", "trained"]
"""Source of the order of a head's dimensions: measured score energy, or training, which left them as they are."""

TokenPairs = Literal["all", "far"]
"""Pairs of tokens that moments count."""

__getattr__ = serve_old_names(__name__, {"DimensionOrder": "OrderSource", "Pairs": "TokenPairs"})


@torch.no_grad()
def measure_head_moments(model: LanguageModel, batches: Iterable[Tensor], far: int | None = None) -> list[Moments]:
    """Return moments of every layer's queries and keys over calibration text.

    Args:
        model: with standard attention.
        batches: of tokens `(B, T)`.
        far: a block size. Count only pairs in different blocks of this size: each query as often as it has such
            keys, each key as often as it has such queries. None counts every token once.

    Raises:
        ValueError: no batch, or none with a pair that far apart.
    """
    sums = [MomentSums() for _ in model.backbone.layers]
    was_training = model.training
    model.eval()
    try:
        with _adding_moments(model, sums, far):
            for batch in batches:
                model(batch.to(model.device))
    finally:
        model.train(was_training)
    return [each.moments() for each in sums]


@contextmanager
def _adding_moments(model: LanguageModel, sums: list[MomentSums], far: int | None) -> Iterator[None]:
    """Add the queries and keys of every forward pass to `sums`."""

    def add_hook(layer: ProjectedAttention, into: MomentSums) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: object) -> None:
            x = args[0]
            positions = torch.arange(x.shape[1], device=x.device)
            query, key, _ = layer.project(x, positions)
            into.add(query, key, *(count.expand(x.shape[:2]) for count in _pair_counts(positions, far)))

        return layer.register_forward_pre_hook(hook, with_kwargs=True)

    layers = [_check_standard(block.attention) for block in model.backbone.layers]
    handles = [add_hook(layer, into) for layer, into in zip(layers, sums, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pair_counts(positions: Tensor, far: int | None) -> tuple[Tensor, Tensor]:
    """Count each query's keys in earlier blocks, and the other way round."""
    if far is None:
        ones = torch.ones(len(positions), dtype=torch.float64, device=positions.device)
        return ones, ones
    block_start = positions // far * far
    return block_start.double(), (len(positions) - block_start - far).clamp(min=0).double()


def convert_to_mlr(
    model: LanguageModel,
    ranks: tuple[int, ...],
    moments: list[Moments] | None,
    block_sizes: tuple[int | None, ...] = (),
    *,
    windows: tuple[int | None, ...] = (),
    value_ranks: tuple[int, ...] = (),
) -> LanguageModel:
    """Return a copy of the model with MLR attention.

    All other tensors are copied. With one level the logits are those of the model. With more levels, pairs at depth `m`
    see the first `R_m` dimensions of each head's basis, and mix the first value dimensions if the values have levels.

    Args:
        model: with standard attention.
        ranks: `r_1 … r_L`, which sum to the head width; even under a rotary embedding.
        moments: of every layer, from `measure_head_moments`. They order dimensions by score energy: by balancing maps,
            or by whole pairs under a rotary embedding. None keeps the order that training left.
        block_sizes: `None` and nested sizes; by default the context halves with every level.
        windows: windows of the levels in place of blocks.
        value_ranks: value dimensions of each level, in the order that training left; by default level 1 owns all.

    Raises:
        TypeError, ValueError: the model has other attention than standard, or ranks do not fit its heads.
    """
    layers = [_check_standard(block.attention) for block in model.backbone.layers]
    checks.positive_ints("ranks", ranks)
    reach: dict[str, Any] = {"windows": windows or None, "block_sizes": block_sizes or None}
    if not (windows or block_sizes):
        reach["block_sizes"] = Hierarchy.dyadic(ranks, model.config.context_length).block_sizes
    values_whole = (layers[0].value_dim, *(0,) * (len(ranks) - 1))
    fields = reach | {"value_ranks": value_ranks or values_whole}
    spelled = [_spelling(model.config, index, layer, ranks, fields) for index, layer in enumerate(layers)]
    attention: str | list[str] = spelled[0] if len(set(spelled)) == 1 else spelled
    converted = LanguageModel(LanguageModelConfig(**_fields(model.config) | {"attention": attention}))
    converted.to(device=model.device, dtype=model.dtype)
    missing, unexpected = converted.load_state_dict(model.state_dict(), strict=False)
    if unexpected or any(".basis." not in name for name in missing):
        raise ValueError(f"the model has unexpected tensors {unexpected} and lacks {missing}")
    for block, each in zip(converted.backbone.layers, moments or [], strict=bool(moments)):
        _set_basis(block.attention, each)
    return converted.train(model.training)


def _set_basis(layer: nn.Module, moments: Moments) -> None:
    if not isinstance(layer, MLRAttention) or layer.basis is None:
        raise TypeError(f"expected MLR attention with a basis, got {type(layer).__name__}")
    if layer.rotary is None:
        query, key, _ = balancing_maps(moments.query, moments.key)
        layer.basis.set_(query, key, moments.mean)
    else:  # keys turn with their position, so that a mean key would not shift all scores of a row alike
        query, key, _ = order_pairs_by_energy(moments.query, moments.key)
        layer.basis.set_(query, key, torch.zeros_like(moments.mean))


def _check_standard(layer: nn.Module) -> StandardAttention:
    if not isinstance(layer, StandardAttention):
        raise TypeError(f"only standard attention can be retrofitted, got {type(layer).__name__}")
    return layer


def _spelling(
    config: LanguageModelConfig, block: int, layer: StandardAttention, ranks: tuple[int, ...], fields: dict[str, Any]
) -> str:
    """Return the spelling whose scores at full depth are as before."""
    old = as_config(config.structure(block))
    if not isinstance(old, StandardConfig) or old.heads is not None or old.kv_heads is not None:
        raise ValueError(f"attention must be standard in every block, got {old} in block {block}")
    scores: dict[str, Any] = {"level_weight": old.scale, "qk_norm": old.qk_norm, "frequencies": "whole"}
    converted = MLRConfig(ranks, gains="none", basis=True, **scores, **fields)
    _check_widths(converted.hierarchy(layer.head_dim, config.context_length), layer)
    return str(converted)


def _check_widths(hierarchy: Hierarchy, layer: StandardAttention) -> None:
    if hierarchy.rank != layer.head_dim:
        ranks = "|".join(map(str, hierarchy.ranks))
        raise ValueError(f"ranks must sum to the head width {layer.head_dim}, got {ranks} = {hierarchy.rank}")
    hierarchy.value_widths(layer.value_dim)


def _fields(config: LanguageModelConfig) -> dict[str, object]:
    names = ["layers", "dim", "heads", "context_length", "kv_heads", "positions", "rotary_base", "mlp_ratio", "dropout"]
    names += ["standard_kernel", "vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"]
    return {name: getattr(config, name) for name in names}
