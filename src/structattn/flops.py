"""Count FLOPs of structures, op calls and layers, by formula or call.

A multiply-add is 2 FLOPs. Only matrix products count, not norms, softmax, rotations and scalings, here as in torch's
counter. Attention counts visible pairs, so that a causal call costs half a dense one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from structattn.ops.hierarchy import Hierarchy
from structattn.structures.base import Operation, Structure


@dataclass(frozen=True)
class Flops:
    """FLOPs of a pass forward, and backward to all inputs and parameters."""

    forward: int
    backward: int
    scores: int = field(default=0, compare=False)
    """The part of `forward` that the inner products of queries and keys take."""

    @property
    def training(self) -> int:
        """Forward and backward together."""
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward, self.scores + other.scores)

    def __mul__(self, times: int) -> Flops:
        return Flops(self.forward * times, self.backward * times, self.scores * times)

    __rmul__ = __mul__


def linear(dim_in: int, dim_out: int, tokens: int = 1) -> Flops:
    """Return the cost of a dense matrix, backward twice that of forward."""
    forward = 2 * tokens * dim_in * dim_out
    return Flops(forward, 2 * forward)


def structure(matrix: Structure, operation: Operation = "forward", tokens: int = 1) -> Flops:
    """Return the cost of an operation on `tokens` vectors, all heads."""
    forward = tokens * matrix.flops_of(operation)
    return Flops(forward, 2 * forward)


def attention(
    hierarchy: Hierarchy,
    value_dim: int,
    query_length: int,
    key_length: int | None = None,
    *,
    heads: int = 1,
    batch: int = 1,
    is_causal: bool = False,
    query_offset: int = 0,
) -> Flops:
    """Return the cost of one call of `mlr_attention`.

    With `P_l` the visible pairs that level `l` reaches, `S = Σ_l r_l·P_l` and `V = Σ_l u_l·P_l`, a head costs `2(S +
    V)` forward and `2(3S + 2V)` backward: scores again and the gradients of query and key; gradients of probabilities
    and value.

    Args:
        hierarchy: the levels; `Hierarchy.flat(r)` for standard attention, `Hierarchy((r,), windows=(w,))` for a window.
        value_dim: `dv`.
        query_length: `Tq`.
        key_length: `Tk`; `Tq` by default.
        heads: query heads.
        batch: batch size.
        is_causal: count only pairs `j <= query_offset + i`.
        query_offset: index of the first query among the keys.
    """
    lengths: Any = {"is_causal": is_causal, "query_offset": query_offset}
    scores = hierarchy.score_flops(query_length, key_length, **lengths)
    mixing = hierarchy.mixing_flops(query_length, key_length, value_dim=value_dim, **lengths)
    return batch * heads * Flops(scores + mixing, 3 * scores + 2 * mixing, scores)


def counter() -> FlopCounterMode:
    """Return a context that counts real calls by this module's formulas.

    torch's own counter takes a causal `scaled_dot_product_attention` for a dense one and does not know the CPU kernel.
    This one counts visible pairs for all of PyTorch's kernels::

        with flops.counter() as count:
            layer(x).sum().backward()
        count.get_total_flops()

    Count on the eager module: torch's counter raises around a compiled one. Shapes do not show padding, so a padded
    call counts as an unpadded one of its length.
    """
    names = [
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    ]
    mapping = {}
    for name in names:
        for suffix in ("", "_backward"):
            packet = getattr(torch.ops.aten, name + suffix)
            mapping[packet] = _sdpa_formula(packet, backward=bool(suffix))
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _sdpa_formula(packet: Any, *, backward: bool) -> Any:
    names = [argument.name for argument in packet.default._schema.arguments]

    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        given = dict(zip(names, args, strict=False)) | kwargs
        (batch, heads, query_length, rank), key_length, value_dim = given["query"], given["key"][2], given["value"][3]
        cost = attention(
            Hierarchy.flat(rank),
            value_dim,
            query_length,
            key_length,
            heads=heads,
            batch=batch,
            is_causal=given.get("is_causal", False),
        )
        return cost.backward if backward else cost.forward

    return formula
