"""Attend by structured matrices: a head scores `xᵀ M y`.

Shapes: x (B, T, D), features (B, H, T, F), contracted vectors (B, H, T, D), value (B, Hkv, T, dv).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from structattn import checks, flops
from structattn.flops import Flops
from structattn.layers.choices import BilinearScale, Norm, Side, bilinear_scales, spread
from structattn.layers.interface import QKV, Attention, draw_linears, split_heads, width_per_head
from structattn.layers.kv_cache import CacheLayout, CacheSlice, KeyValueCache
from structattn.layers.norm import LevelNorm, warn_of_degenerate_norm
from structattn.layers.options import LayerOptions, SharedKeywords
from structattn.ops.key_span import UNPADDED, KeySpan
from structattn.structures import MLR, LowRank, Structure
from structattn.structures.base import Operation

if TYPE_CHECKING:
    from typing_extensions import Unpack

FixedSide = Literal["key", "split", "query"]
_OPERATIONS: dict[FixedSide, tuple[Operation, ...]] = {
    "key": ("forward",),
    "split": ("left", "right"),
    "query": ("adjoint",),
}


class BilinearAttention(Attention):
    r"""Attention whose heads score by structured matrices: `score_h(i, j) = scale · x_iᵀ M_h y_j`, `y = x`.

    Values and output are those of standard attention. Source: arXiv 2509.07963, section 3.

    The same score can be contracted on three sides. With `H` heads, `T` tokens, `P` visible pairs and `m_s` FLOPs of
    the structure for a token, a side costs `T·m_s + 2·H·P·width` FLOPs.

    | side | query | key | width |
    |---|---|---|---|
    | `"split"` | `left(x)` | `right(y)` | `F`, the structure's `feature_dim` |
    | `"key"` | `x`, the same for all heads | `M_h y` | `D` |
    | `"query"` | `M_hᵀ x` | `y`, the same for all heads: a cache holds one vector for each token | `D` |

    `"auto"` takes the cheapest side for the `T` of the call. All sides give the same result.

    `norm` places the LayerNorm (in the paper: `"features"` for LowRank and MLR, `"key"` for the others):

    - `"features"`: LayerNorm on each level's slice of `left(x)` and of `right(y)`. It needs the side `"split"`.
    - `"key"`: LayerNorm on the contracted key of each head, `xᵀ LN(M y)`. With `g = x∘γ`, `μ_j` and `σ_j` the mean and
      deviation of `M y_j`, this is `(gᵀ M y_j - μ_j Σ g) / σ_j`: the other sides compute it with one more feature.
    - `"none"`: no norm.

    A norm over two features or fewer cannot learn, and warns (`structattn.layers.norm.DegenerateNormWarning`).

    Args:
        structure: square matrices `D x D`, a stack of one for each head.
        side: the side on which the matrix is contracted.
        norm: place of the LayerNorm; the paper's for the structure by default.
        scale: factor on the score or on each level's share of it, see `structattn.layers.choices.bilinear_scales`; by
            default the paper's: `"1/sqrt(f_l)"` for LowRank and MLR, `"1/sqrt(D)"` for the others.
        head_dim: width of a value head; `D / H` by default.
        options: see `LayerOptions`. Device and dtype are those of the structure, and `kv_heads` counts heads of values:
            each query head has its own matrix. The generator draws the projections; the structure keeps its factors.
            With a rotary embedding the side is part of the function: `"auto"` rotates the features (`"split"`), or `x`
            and `LN(M y)` where the norm is on the key (`"key"`).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; also where the norm, the scale or
            the rotary embedding rules out a fixed side.
    """

    def __init__(
        self,
        structure: Structure,
        *,
        side: Side = "auto",
        norm: Norm | None = None,
        scale: BilinearScale | None = None,
        head_dim: int | None = None,
        **options: Unpack[SharedKeywords],
    ) -> None:
        heads = _check_structure(structure)
        projective = isinstance(structure, (LowRank, MLR))
        norm = norm or ("features" if projective else "key")
        scale = scale or ("1/sqrt(f_l)" if projective else "1/sqrt(D)")
        dim, widths = structure.dim_in, structure.level_features
        scales = bilinear_scales(scale, dim, widths)
        factor = next(structure.parameters())
        shared = LayerOptions(device=factor.device, dtype=factor.dtype, **options)
        sides = _possible_sides(norm, scales, shared.rotary is not None, side)
        super().__init__(dim, heads, width_per_head(dim, heads, head_dim), shared)
        self.structure = structure
        self.side = side
        self.norm = norm
        self.scales = scales
        self._sides = sides
        if self.rotary is not None:
            self.rotary.check(self._levels(sides[0]))
        normed = {"features": widths, "key": (dim,), "none": None}[norm]
        if normed is not None:
            warn_of_degenerate_norm(normed, "take norm=none, or ranks whose levels have at least 3 features")
        self.q_norm = LevelNorm(widths, device=factor.device, dtype=factor.dtype) if norm == "features" else None
        self.k_norm = None if normed is None else LevelNorm(normed, device=factor.device, dtype=factor.dtype)
        draw_linears(self, shared.generator)

    # ---- the side

    def side_for(self, length: int) -> FixedSide:
        """Return the fixed side, or the cheapest on `length` tokens."""
        best, *others = self._sides
        for side in others:  # a loop, since a compiled graph cannot hold `min` with a key
            if self._score_flops(side, length) < self._score_flops(best, length):
                best = side
        return best

    def _score_flops(self, side: FixedSide, length: int) -> int:
        pairs = length * (length + 1) // 2 if self.is_causal else length * length
        per_token = sum(self.structure.flops_of(operation) for operation in self._operations(side))
        return length * per_token + 2 * self.heads * pairs * self._width(side)

    def _operations(self, side: FixedSide) -> tuple[Operation, ...]:
        """Return the structure's operations that a side calls.

        The norm on the key needs `M y` on every side.
        """
        own = _OPERATIONS[side]
        return (*own, "forward") if self.norm == "key" and side != "key" else own

    def _levels(self, side: FixedSide) -> tuple[int, ...]:
        return self.structure.level_features if side == "split" else (self.dim,)

    def _width(self, side: FixedSide) -> int:
        """Return the width of the dot product. One more feature may carry the mean."""
        return sum(self._levels(side)) + (self.norm == "key" and side != "key")

    # ---- the layer

    def project(self, x: Tensor, positions: Tensor) -> QKV:
        """Return queries and keys on `side_for(T)`, with norm and scale, and values."""
        return self._project(x, positions, self.side_for(x.shape[1]))

    def _project(self, x: Tensor, positions: Tensor, side: FixedSide) -> QKV:
        query, key = {"split": self._split, "key": self._key_side, "query": self._query_side}[side](x)
        if self.rotary is not None:
            query = self.rotary(query, positions, self._levels(side))
            key = self.rotary(key, positions, self._levels(side))
        return query, key, split_heads(self.v_proj(x), self.kv_heads)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return `left(x)` and `right(y)`."""
        gained = self._gained(x)
        query, key = self.structure.left(gained), self.structure.right(x)
        if self.norm == "features" and self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query = query * spread(self.scales, self.structure.level_features, query)
        return self._with_mean(query.transpose(1, 2), key.transpose(1, 2), gained, x)

    def _key_side(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return `x`, a view for all heads, and `M_h y`."""
        key = self.structure(x)
        if self.k_norm is not None:
            key = self.k_norm(key)
        return (x * self.scales[0]).unsqueeze(1).expand(-1, self.heads, -1, -1), key.transpose(1, 2)

    def _query_side(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return `M_hᵀ x`, and `y` as one head."""
        gained = self._gained(x)
        query = self.structure.adjoint(gained).transpose(1, 2) * self.scales[0]
        return self._with_mean(query, x.unsqueeze(1), gained, x)

    def _gained(self, x: Tensor) -> Tensor:
        """Return `x∘γ`, with the key norm's gain moved to the query."""
        return x * self.k_norm.weight if self.norm == "key" and self.k_norm is not None else x

    def _with_mean(self, query: Tensor, key: Tensor, gained: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Add the mean of the normed key as a feature: `[q, Σ g]` and `[k, -μ] / σ` score `xᵀ LN(M y)`."""
        if self.norm != "key":
            return query, key
        rate, shift = self._statistics(x)
        total = gained.sum(-1, keepdim=True).unsqueeze(1) * self.scales[0]  # (B, 1, T, 1)
        query = torch.cat([query, total.to(query.dtype).expand(-1, self.heads, -1, -1)], dim=-1)
        key = torch.cat([key * rate, shift], dim=-1)
        return query, key.to(query.dtype)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the LayerNorm statistics of `M_h y`, `1/σ` and `-μ/σ`, each `(B, H, T, 1)`."""
        contracted = self.structure(x).transpose(1, 2)
        precise = contracted.to(torch.promote_types(contracted.dtype, torch.float32))
        variance, mean = torch.var_mean(precise, dim=-1, correction=0, keepdim=True)
        rate = torch.rsqrt(variance + LevelNorm.eps)
        return rate, -mean * rate

    def attend(self, query: Tensor, key: Tensor, value: Tensor, span: KeySpan = UNPADDED) -> Tensor:
        """Return mixed values `(B, H, Tq, dv)`."""
        heads = max(key.shape[1], value.shape[1])
        return self._attend_to_all(query, _widen(key, heads), _widen(value, heads), 1.0, span)

    # ---- the cache

    @property
    def cached_side(self) -> FixedSide:
        """The side whose keys take the fewest numbers, which generation uses."""
        return min(self._sides, key=self._key_numbers_per_token)

    def cache_layout(self) -> CacheLayout:
        """Return a layout of keys on `cached_side` and all values.

        On the query side the keys are one `y` for all heads and, with the norm on the key, two numbers for each head.
        """
        values = (CacheSlice(self.kv_heads, self.value_dim),)
        if self.cached_side != "query":
            return CacheLayout((CacheSlice(self.heads, self._width(self.cached_side)),), values)
        statistics = (CacheSlice(self.heads, 2),) if self._keeps_statistics("query") else ()
        return CacheLayout((CacheSlice(1, self.dim), *statistics), values)

    def _keeps_statistics(self, side: FixedSide) -> bool:
        return side == "query" and self.norm == "key"

    def project_for_cache(self, x: Tensor, positions: Tensor) -> QKV:
        """Like `project`, but on `cached_side`."""
        return self._project(x, positions, self.cached_side)

    def key_slices(self, x: Tensor, key: Tensor) -> Sequence[Tensor]:
        """Return the keys, or `y` and `(1/σ, -μ/σ)` where the cache keeps statistics."""
        if self._keeps_statistics(self.cached_side):
            return x.unsqueeze(1).to(key.dtype), torch.cat(self._statistics(x), dim=-1).to(key.dtype)
        return (key,)

    def attend_cached(self, query: Tensor, cache: KeyValueCache, span: KeySpan) -> Tensor:
        """Return mixed values `(B, H, Tq, dv)` of the last `Tq` tokens in the cache."""
        value = cache.values[0].live
        if not self._keeps_statistics(self.cached_side):
            return self.attend(query, cache.keys[0].live, value, span)
        y, statistics = (keys.live for keys in cache.keys)
        rate, shift = statistics.transpose(-2, -1).unsqueeze(-2).unbind(2)  # (B, H, 1, T) each
        score = (query[..., :-1] @ y.transpose(-2, -1)) * rate + query[..., -1:] * shift
        i = torch.arange(span.query_offset, cache.length, device=query.device)[:, None]
        j = torch.arange(cache.length, device=query.device)
        visible = j <= i
        if span.key_start is not None:
            visible = visible & (j >= span.key_start.view(-1, 1, 1, 1))
        probability = torch.softmax(score.masked_fill(~visible, torch.finfo(score.dtype).min), dim=-1)
        probability = probability.masked_fill(~visible, 0.0)  # a query that sees nothing mixes zeros
        return probability @ _widen(value, self.heads)

    def _key_numbers_per_token(self, side: FixedSide) -> int:
        statistics = 2 * self.heads if self._keeps_statistics(side) else 0
        return (self.dim if side == "query" else self.heads * self._width(side)) + statistics

    def mixing_flops(self, length: int, batch: int = 1, *, dense: bool = False) -> Flops:
        """Return the FLOPs of the structure, of scores and of mixing values."""
        side = self.side_for(length)
        products = [flops.structure(self.structure, operation, batch * length) for operation in self._operations(side)]
        return sum(products, self._dot_product_flops(self._width(side), length, batch, dense))

    def extra_repr(self) -> str:
        """Return the settings, side, norm and scales first."""
        scales = ", ".join(f"{scale:.4g}" for scale in self.scales)
        return f"side={self.side!r}, norm={self.norm!r}, scales=({scales}), {super().extra_repr()}"


def _check_structure(structure: Structure) -> int:
    """Return the number of heads, after checks.

    Raise TypeError or ValueError unless the structure scores tokens against each other.
    """
    if not isinstance(structure, Structure):
        raise TypeError(f"structure must be a structattn.structures.Structure, got {type(structure).__name__}")
    if structure.dim_out != structure.dim_in:
        raise ValueError(
            f"structure must be square, dim x dim, got {structure.dim_out} x {structure.dim_in}: "
            "queries and keys come from the same tokens"
        )
    if structure.heads is None:
        raise ValueError("structure must be a stack of one matrix for each head, got heads=None; give heads=1 for one")
    return structure.heads


def _possible_sides(norm: str, scales: tuple[float, ...], rotary: bool, side: str) -> tuple[FixedSide, ...]:
    """Return the sides that allow these choices, preferred first.

    Raises:
        ValueError: a choice is unknown, or the fixed side does not allow the others.
    """
    checks.one_of("side", side, ["auto", "split", "key", "query"])
    checks.one_of("norm", norm, ["features", "key", "none"])
    levels_differ = len(set(scales)) > 1
    if levels_differ and norm == "key":
        raise ValueError(
            "norm='key' needs one scale for all levels, such as '1/sqrt(D)': the key it norms is their sum"
        )
    possible: tuple[FixedSide, ...] = ("key", "split", "query")
    reason = ""
    if norm == "features":
        possible, reason = ("split",), "norm='features' is on the features"
    elif levels_differ:
        possible, reason = ("split",), "a scale for each level is on the features"
    elif rotary and norm == "key":
        possible, reason = ("key",), "with norm='key' a rotary embedding turns the normed key"
    elif rotary and side == "auto":
        possible = ("split",)
    if side == "auto":
        return possible
    if side not in possible:
        raise ValueError(f"side must be 'auto' or {possible[0]!r}, got {side!r}: {reason}")
    return (side,)


def _widen(tensor: Tensor, heads: int) -> Tensor:
    """Repeat each head of `(B, h, T, width)` up to `heads`, as a view where `h` is 1."""
    if tensor.shape[1] == 1:
        return tensor.expand(-1, heads, -1, -1)
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)
