"""Dense oracle of MLR attention in a model, by the formula's score matrix.

It shares only `Hierarchy` with the package. A native sliding window is in the mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from structattn import Hierarchy
from structattn.models.transformers_internals import set_attention_implementation

NAME = "dense_levels_of_the_tests"
_ROTARY = ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma3")
_SELF_ATTENTION = ("GPT2Attention", *(f"{family}Attention" for family in _ROTARY))


def self_attention(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Return self-attention modules by stack, found by their names in the families tested."""
    decoder = [module for module in model.modules() if type(module).__name__ in _SELF_ATTENTION]
    if decoder:
        return {"decoder": decoder}
    named = [(name, module) for name, module in model.named_modules() if name.endswith("SelfAttention")]
    return {stack: [module for name, module in named if name.startswith(stack)] for stack in ("encoder", "decoder")}


def install(model: nn.Module, hierarchies: dict[str, list[Hierarchy]], orders: dict[str, list] | None = None) -> None:
    """Switch a model to dense MLR attention, with orders by layer and key head."""
    rotates = getattr(model.config, "rope_parameters", None) is not None
    for stack, modules in self_attention(model).items():
        for index, module in enumerate(modules):
            hierarchy = hierarchies[stack][index]
            places = orders[stack][index] if orders else [list(range(hierarchy.rank // (2 if rotates else 1)))]
            half = hierarchy.rank // 2
            module.dense_levels = (hierarchy, [_dimensions(head, half if rotates else None) for head in places])
    set_attention_implementation(model, NAME)


def _dimensions(order: Sequence[int], half: int | None) -> list[int]:
    return list(order) if half is None else [d for pair in order for d in (pair, pair + half)]


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, Tensor]:
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    i, j = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)[None]
    visible = j <= i if module.is_causal else torch.ones(queries, keys, dtype=torch.bool)
    start = torch.zeros(len(query), 1, 1, 1, dtype=torch.long)
    if attention_mask is not None:
        visible = visible & attention_mask
        start = attention_mask[:, :, -1:].int().argmax(-1, keepdim=True)
    reached = [visible]
    if hasattr(module, "dense_levels"):
        hierarchy, dimensions = module.dense_levels
        reached = [visible & _reaches(hierarchy, level, i - start, j - start) for level in range(hierarchy.levels)]
        score = _score(hierarchy, dimensions, query, key, i - start, j - start)
        values = value.split(hierarchy.value_widths(value.shape[-1]), -1)
    else:
        score, values = query @ key.mT, [value]
    score = score * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    score = score + (0.0 if position_bias is None else position_bias)
    weights = torch.softmax(score.masked_fill(~reached[0], torch.finfo(score.dtype).min), -1)
    mixed = [(weights * pairs) @ part for pairs, part in zip(reached, values, strict=True)]
    return torch.cat(mixed, -1).transpose(1, 2), weights


def _score(
    hierarchy: Hierarchy, dimensions: list[list[int]], query: Tensor, key: Tensor, i: Tensor, j: Tensor
) -> Tensor:
    """Return `c_m · Σ_{d < R_m} q[d] k[d]`, `(B, H, Tq, Tk)`, with `m` the depth of each pair."""
    heads = query.shape[1]
    index = torch.tensor(dimensions).repeat_interleave(heads // len(dimensions), dim=0)[None, :, None]
    query, key = (x.gather(-1, index.expand(x.shape)) for x in (query, key))
    depth = sum(_reaches(hierarchy, level, i, j).long() for level in range(hierarchy.levels))
    score = torch.zeros(1, dtype=query.dtype)
    for m, (width, gain) in enumerate(zip(hierarchy.prefix_ranks, hierarchy.gains, strict=True), start=1):
        score = score + torch.where(depth == m, gain * (query[..., :width] @ key[..., :width].mT), 0.0)
    return score


def _reaches(hierarchy: Hierarchy, level: int, i: Tensor, j: Tensor) -> Tensor:
    size = (hierarchy.windows or hierarchy.block_sizes)[level]
    if size is None:
        return torch.ones_like(i + j, dtype=torch.bool)
    if hierarchy.windows is None:
        return i // size == j // size
    return ((i - j).abs() < size) | ((j >= 0) & (j < hierarchy.sinks))


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
