"""From a trained model with standard attention to one with MLR attention: the same scores, dimensions in order.

Symbols as in `structattn.layers.head_basis`: moments `C_q`, `C_k` of a head's queries and keys after norm and rotary
embedding, and the maps `A`, `B` between those and what the levels see.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from structattn import checks
from structattn.layers import MLRAttention, MLRConfig, StandardAttention, StandardConfig, as_config
from structattn.layers.head_basis import Moments, MomentSums, balanced, by_pair_energy
from structattn.layers.projected import ProjectedAttention
from structattn.models.configuration import LanguageModelConfig
from structattn.models.language_model import LanguageModel

Order = Literal["measured", "trained"]
Pairs = Literal["all", "far"]


@torch.no_grad()
def measure_moments(model: LanguageModel, batches: Iterable[Tensor], far: int | None = None) -> list[Moments]:
    """The moments of every layer over calibration text.

    Args:
        model: with standard attention.
        batches: of tokens `(B, T)`.
        far: a block size: count only pairs in different blocks of so many positions, each query as often as it has such
            keys, each key as often as it has such queries; None counts every token once.

    Raises:
        ValueError: no batch, or none with a pair that far apart.
    """
    sums = [MomentSums() for _ in model.backbone.layers]
    was_training = model.training
    model.eval()
    try:
        with _watching(model, sums, far):
            for batch in batches:
                model(batch.to(model.device))
    finally:
        model.train(was_training)
    return [each.moments() for each in sums]


@contextmanager
def _watching(model: LanguageModel, sums: list[MomentSums], far: int | None) -> Iterator[None]:
    """While it lasts, what the attention layers project is added up."""

    def watch(layer: ProjectedAttention, into: MomentSums) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: object) -> None:
            x = args[0]
            positions = torch.arange(x.shape[1], device=x.device)
            query, key, _ = layer.project(x, positions)
            into.add(query, key, *(count.expand(x.shape[:2]) for count in _pair_counts(positions, far)))

        return layer.register_forward_pre_hook(hook, with_kwargs=True)

    handles = [watch(_standard(block.attention), into) for block, into in zip(model.backbone.layers, sums, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pair_counts(positions: Tensor, far: int | None) -> tuple[Tensor, Tensor]:
    """How many earlier blocks' keys each query has, and how many later blocks' queries each key."""
    if far is None:
        ones = torch.ones(len(positions), dtype=torch.float64, device=positions.device)
        return ones, ones
    block_start = positions // far * far
    return block_start.double(), (len(positions) - block_start - far).clamp(min=0).double()


def retrofit(
    model: LanguageModel,
    ranks: tuple[int, ...],
    moments: list[Moments] | None,
    block_sizes: tuple[int | None, ...] = (),
) -> LanguageModel:
    """The model with MLR attention in place of standard attention, every other tensor copied.

    With one level the logits are those of the model. With more, pairs at depth `m` see the first `R_m` dimensions of a
    basis: by score energy where moments are given (balanced, or under a rotary embedding by pairs), as trained where
    not.

    Args:
        model: with standard attention.
        ranks: `r_1 … r_L`, which sum to the head width; even under a rotary embedding.
        moments: of every layer, from `measure_moments`; None for the order of dimensions that training left.
        block_sizes: `None` and nested sizes; by default the context halves with every level.

    Raises:
        TypeError, ValueError: the model has other attention than standard, or ranks do not fit its heads.
    """
    layers = [_standard(block.attention) for block in model.backbone.layers]
    spelled = [_spelling(model.config, index, ranks, block_sizes) for index in range(len(layers))]
    attention: str | list[str] = spelled[0] if len(set(spelled)) == 1 else spelled
    fitted = LanguageModel(LanguageModelConfig(**_fields(model.config) | {"attention": attention}))
    fitted.to(device=model.device, dtype=model.dtype)
    missing, unexpected = fitted.load_state_dict(model.state_dict(), strict=False)
    if unexpected or any(".basis." not in name for name in missing):
        raise ValueError(f"the model has tensors of another kind: {unexpected}, and lacks {missing}")
    for block, each in zip(fitted.backbone.layers, moments or [], strict=bool(moments)):
        _set_basis(block.attention, each)
    return fitted.train(model.training)


def _set_basis(layer: nn.Module, moments: Moments) -> None:
    if not isinstance(layer, MLRAttention) or layer.basis is None:
        raise TypeError(f"expected MLR attention with a basis, got {type(layer).__name__}")
    if layer.rotary is None:
        query, key, _ = balanced(moments.query, moments.key)
        layer.basis.set_(query, key, moments.mean)
    else:  # a mean key would not be the same number for every key of a row: keys turn with their position
        query, key, _ = by_pair_energy(moments.query, moments.key)
        layer.basis.set_(query, key, torch.zeros_like(moments.mean))


def _standard(layer: nn.Module) -> StandardAttention:
    if not isinstance(layer, StandardAttention):
        raise TypeError(f"only standard attention can be retrofitted, got {type(layer).__name__}")
    return layer


def _spelling(
    config: LanguageModelConfig, block: int, ranks: tuple[int, ...], block_sizes: tuple[int | None, ...]
) -> str:
    """MLR attention that scores as the block's standard attention does, where all levels are shared."""
    old = as_config(config.structure(block))
    if not isinstance(old, StandardConfig) or old.heads is not None:
        raise ValueError(f"attention must be standard in every block, got {old} in block {block}")
    checks.positive_ints("ranks", ranks)
    new = MLRConfig(
        ranks=ranks,
        block_sizes=block_sizes or None,
        gains="none",
        level_weight=old.scale,
        qk_norm=old.qk_norm,
        basis=True,
    )
    return str(new)


def _fields(config: LanguageModelConfig) -> dict[str, object]:
    names = ["layers", "dim", "heads", "context_length", "kv_heads", "positions", "rotary_base", "mlp_ratio", "dropout"]
    names += ["vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"]
    return {name: getattr(config, name) for name in names}
