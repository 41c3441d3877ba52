"""Bilinear attention: the score of a head is `xᵀ M y` for any structured matrix `M`.

Shapes: x (B, T, D), features (B, H, T, F), contracted vectors (B, H, T, D), value (B, Hkv, T, dv).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from structattn import checks, flops
from structattn.flops import Flops
from structattn.layers.choices import BilinearScale, Norm, Side, bilinear_scales, spread
from structattn.layers.interface import QKV, Attention, draw_linears, split_heads, width_per_head
from structattn.layers.kv_cache import CacheLayout, CacheSlice, KeyValueCache
from structattn.layers.norm import LevelNorm
from structattn.layers.rotary import RotaryEmbedding
from structattn.ops.dense import dense_attention
from structattn.ops.hierarchy import Hierarchy
from structattn.structures import MLR, LowRank, Structure
from structattn.structures.base import Operation

FixedSide = Literal["key", "split", "query"]
_OPERATIONS: dict[FixedSide, tuple[Operation, ...]] = {
    "key": ("forward",),
    "split": ("left", "right"),
    "query": ("adjoint",),
}


class BilinearAttention(Attention):
    r"""Attention whose heads score by structured matrices: `score_h(i, j) = scale · x_iᵀ M_h y_j`, `y = x`.

    Values and output are those of standard attention. Source: arXiv 2509.07963, section 3.

    The same score can be contracted three ways, at different prices: with `H` heads, `T` tokens, `P` visible pairs and
    `m_s` the FLOPs of the structure for a token, `T·m_s + 2·H·P·width`.

    | side | query | key | width |
    |---|---|---|---|
    | `"split"` | `left(x)` | `right(y)` | `F`, the structure's `feature_dim` |
    | `"key"` | `x`, the same for all heads | `M_h y` | `D` |
    | `"query"` | `M_hᵀ x` | `y`, the same for all heads: a cache holds one vector for each token | `D` |

    `"auto"` takes the cheapest for the `T` of the call by this formula. All give the same numbers.

    Where the norm sits (the paper's: `"features"` for LowRank and MLR, `"key"` for the others):

    - `"features"`: LayerNorm on each level's slice of `left(x)` and of `right(y)`. Only `"split"` has these.
    - `"key"`: LayerNorm on the contracted key of each head, `xᵀ LN(M y)`. With `g = x∘γ`, `μ_j` and `σ_j` the mean and
      deviation of `M y_j`, this is `(gᵀ M y_j - μ_j Σ g) / σ_j`: the other sides get it by one more feature.
    - `"none"`.

    Args:
        structure: square matrices `D x D`, a stack of one for each head.
        side: where the matrix is contracted.
        norm: where the LayerNorm sits; the paper's for the structure by default.
        scale: factor on the score or on each level's share of it, see `structattn.layers.choices.bilinear_scales`; by
            default the paper's: `"1/sqrt(f_l)"` for LowRank and MLR, `"1/sqrt(D)"` for the others.
        head_dim: width of a value head; `D / H` by default.
        kv_heads: heads of the values, a divisor of `H`. Matrices are always one for each query head.
        is_causal: whether a token sees only itself and earlier ones.
        bias: whether the value and output projections have biases.
        dropout: share of attention probabilities dropped in training.
        rotary: rotary embedding of what is contracted. With it the side is part of the function: `"auto"` rotates the
            features (`"split"`), or where the norm is on the key `x` and `LN(M y)` (`"key"`).
        generator: source of the initial projections; the structure keeps the factors it comes with.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; also for a fixed side that
            the norm, the scale or the rotary embedding rules out.
    """

    def __init__(
        self,
        structure: Structure,
        *,
        side: Side = "auto",
        norm: Norm | None = None,
        scale: BilinearScale | None = None,
        head_dim: int | None = None,
        kv_heads: int | None = None,
        is_causal: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
        rotary: RotaryEmbedding | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        heads = _check_structure(structure)
        projective = isinstance(structure, (LowRank, MLR))
        norm = norm or ("features" if projective else "key")
        scale = scale or ("1/sqrt(f_l)" if projective else "1/sqrt(D)")
        dim, widths = structure.dim_in, structure.level_features
        scales = bilinear_scales(scale, dim, widths)
        sides = _possible_sides(norm, scales, rotary is not None, side)
        factor = next(structure.parameters())
        super().__init__(
            dim,
            heads,
            kv_heads=kv_heads,
            value_dim=width_per_head(dim, heads, head_dim),
            is_causal=is_causal,
            bias=bias,
            dropout=dropout,
            rotary=rotary,
            device=factor.device,
            dtype=factor.dtype,
        )
        self.structure = structure
        self.side = side
        self.norm = norm
        self.scales = scales
        self._sides = sides
        if rotary is not None:
            rotary.check(self._levels(sides[0]))
        normed = {"features": widths, "key": (dim,), "none": None}[norm]
        self.q_norm = LevelNorm(widths, device=factor.device, dtype=factor.dtype) if norm == "features" else None
        self.k_norm = None if normed is None else LevelNorm(normed, device=factor.device, dtype=factor.dtype)
        draw_linears(self, generator)

    # ---- the side

    def side_for(self, length: int) -> FixedSide:
        """The side that a call on `length` tokens is contracted on: the fixed one, or the cheapest."""
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
        """What of the structure a side calls; the norm on the key needs `M y` on every side."""
        own = _OPERATIONS[side]
        return (*own, "forward") if self.norm == "key" and side != "key" else own

    def _levels(self, side: FixedSide) -> tuple[int, ...]:
        return self.structure.level_features if side == "split" else (self.dim,)

    def _width(self, side: FixedSide) -> int:
        """Width of the dot product; one more than the levels where a feature carries the mean."""
        return sum(self._levels(side)) + (self.norm == "key" and side != "key")

    # ---- the layer

    def project(self, x: Tensor, positions: Tensor) -> QKV:
        """Queries and keys as the side has them (`side_for` the length of `x`), with norm and scale, and values."""
        return self._project(x, positions, self.side_for(x.shape[1]))

    def _project(self, x: Tensor, positions: Tensor, side: FixedSide) -> QKV:
        query, key = {"split": self._split, "key": self._key_side, "query": self._query_side}[side](x)
        if self.rotary is not None:
            query = self.rotary(query, positions, self._levels(side))
            key = self.rotary(key, positions, self._levels(side))
        return query, key, split_heads(self.v_proj(x), self.kv_heads)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`left(x)` and `right(y)`."""
        gained = self._gained(x)
        query, key = self.structure.left(gained), self.structure.right(x)
        if self.norm == "features" and self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query = query * spread(self.scales, self.structure.level_features, query)
        return self._with_mean(query.transpose(1, 2), key.transpose(1, 2), gained, x)

    def _key_side(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x`, a view for all heads, and `M_h y`."""
        key = self.structure(x)
        if self.k_norm is not None:
            key = self.k_norm(key)
        return (x * self.scales[0]).unsqueeze(1).expand(-1, self.heads, -1, -1), key.transpose(1, 2)

    def _query_side(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`M_hᵀ x`, and `y` under one head."""
        gained = self._gained(x)
        query = self.structure.adjoint(gained).transpose(1, 2) * self.scales[0]
        return self._with_mean(query, x.unsqueeze(1), gained, x)

    def _gained(self, x: Tensor) -> Tensor:
        """`x∘γ`, the gain of the norm on the key moved to the query."""
        return x * self.k_norm.weight if self.norm == "key" and self.k_norm is not None else x

    def _with_mean(self, query: Tensor, key: Tensor, gained: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys that score `xᵀ LN(M y)` where the norm is on the key: `[q, Σ g]` and `[k, -μ] / σ`."""
        if self.norm != "key":
            return query, key
        rate, shift = self._statistics(x)
        total = gained.sum(-1, keepdim=True).unsqueeze(1) * self.scales[0]  # (B, 1, T, 1)
        query = torch.cat([query, total.to(query.dtype).expand(-1, self.heads, -1, -1)], dim=-1)
        key = torch.cat([key * rate, shift], dim=-1)
        return query, key.to(query.dtype)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What LayerNorm takes from `M_h y`, each `(B, H, T, 1)`: `1/σ` and `-μ/σ`."""
        contracted = self.structure(x).transpose(1, 2)
        precise = contracted.to(torch.promote_types(contracted.dtype, torch.float32))
        variance, mean = torch.var_mean(precise, dim=-1, correction=0, keepdim=True)
        rate = torch.rsqrt(variance + LevelNorm.eps)
        return rate, -mean * rate

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_start: Tensor | None = None,
        key_end: Tensor | None = None,
        query_offset: int = 0,
    ) -> Tensor:
        """Mixed values `(B, H, Tq, dv)`."""
        heads = max(key.shape[1], value.shape[1])
        return dense_attention(
            query,
            _widen(key, heads),
            _widen(value, heads),
            is_causal=self.is_causal,
            scale=1.0,
            key_start=key_start,
            key_end=key_end,
            query_offset=query_offset,
            dropout_p=self._dropout_p(),
        )

    # ---- the cache

    @property
    def cached_side(self) -> FixedSide:
        """The side whose keys take the fewest numbers: what a cache holds, and generation is contracted on."""
        return min(self._sides, key=self._key_numbers_per_token)

    def cache_layout(self) -> CacheLayout:
        """On the query side `y`, one for all heads, and with the norm on the key two numbers for each head."""
        value = CacheSlice(self.kv_heads, self.value_dim)
        if self.cached_side != "query":
            return CacheLayout((CacheSlice(self.heads, self._width(self.cached_side)),), value)
        statistics = (CacheSlice(self.heads, 2),) if self._keeps_statistics("query") else ()
        return CacheLayout((CacheSlice(1, self.dim), *statistics), value)

    def _keeps_statistics(self, side: FixedSide) -> bool:
        return side == "query" and self.norm == "key"

    def project_for_cache(self, x: Tensor, positions: Tensor) -> QKV:
        """As `project`, contracted on `cached_side`."""
        return self._project(x, positions, self.cached_side)

    def key_parts(self, x: Tensor, key: Tensor) -> Sequence[Tensor]:
        """Keys as they are; on the query side with the norm on the key, `y` and `(1/σ, -μ/σ)`."""
        if self._keeps_statistics(self.cached_side):
            return x.unsqueeze(1).to(key.dtype), torch.cat(self._statistics(x), dim=-1).to(key.dtype)
        return (key,)

    def attend_cached(self, query: Tensor, cache: KeyValueCache, key_start: Tensor | None) -> Tensor:
        """Mixed values `(B, H, Tq, dv)`."""
        value, offset = cache.value.live, cache.length - query.shape[2]
        if not self._keeps_statistics(self.cached_side):
            return self.attend(query, cache.keys[0].live, value, key_start=key_start, query_offset=offset)
        y, statistics = (keys.live for keys in cache.keys)
        rate, shift = statistics.transpose(-2, -1).unsqueeze(-2).unbind(2)  # (B, H, 1, T) each
        score = (query[..., :-1] @ y.transpose(-2, -1)) * rate + query[..., -1:] * shift
        i = torch.arange(offset, cache.length, device=query.device)[:, None]
        j = torch.arange(cache.length, device=query.device)
        visible = j <= i
        if key_start is not None:
            visible = visible & (j >= key_start.view(-1, 1, 1, 1))
        probability = torch.softmax(score.masked_fill(~visible, torch.finfo(score.dtype).min), dim=-1)
        probability = probability.masked_fill(~visible, 0.0)  # a query that sees nothing mixes zeros
        return probability @ _widen(value, self.heads)

    def key_numbers(self, length: int) -> int:
        """What a cache holds: `H·width` numbers for each token; on the query side one `y` for all heads.

        The norm on the key adds mean and deviation of each head. With `side="auto"`, of the side that holds least.
        """
        return length * min(self._key_numbers_per_token(side) for side in self._sides)

    def _key_numbers_per_token(self, side: FixedSide) -> int:
        statistics = 2 * self.heads if self._keeps_statistics(side) else 0
        return (self.dim if side == "query" else self.heads * self._width(side)) + statistics

    def mixing_flops(self, length: int, batch: int = 1, *, dense: bool = False) -> Flops:
        """The structure's products, scores and mixing of values, on the side of a call of this length."""
        side = self.side_for(length)
        products = [flops.structure(self.structure, operation, batch * length) for operation in self._operations(side)]
        flat, causal = Hierarchy.flat(self._width(side)), self.is_causal and not dense
        mixing = flops.attention(flat, self.value_dim, length, heads=self.heads, batch=batch, is_causal=causal)
        return sum(products, mixing)

    def extra_repr(self) -> str:
        """With side, norm and scales."""
        scales = ", ".join(f"{scale:.4g}" for scale in self.scales)
        return f"side={self.side!r}, norm={self.norm!r}, scales=({scales}), {super().extra_repr()}"


def _check_structure(structure: Structure) -> int:
    """The number of heads of a structure that can score tokens against each other."""
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
    """The sides that can serve the choices, in order of preference; ValueError where the fixed one cannot."""
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
    """`(B, h, T, width)` as `(B, heads, T, width)`: a view where `h` is 1, else each head repeated."""
    if tensor.shape[1] == 1:
        return tensor.expand(-1, heads, -1, -1)
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)
