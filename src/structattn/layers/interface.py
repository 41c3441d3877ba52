"""The face that all attention layers share, and the part of it that projects queries, keys and values.

Shapes: x (B, T, D), query (B, Hq, T, r), key (B, Hkv, T, r), value (B, Hkv, T, dv).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor, nn

from structattn import checks, flops
from structattn.flops import Flops
from structattn.layers.head_basis import Basis
from structattn.layers.kv_cache import CacheLayout, CacheSlice, KeyValueCache
from structattn.layers.norm import LevelNorm
from structattn.layers.rotary import RotaryEmbedding
from structattn.ops.arguments import check_key_bound, check_key_bounds
from structattn.structures.base import Structure

if TYPE_CHECKING:
    from structattn.structures.base import Fans

QKV = tuple[Tensor, Tensor, Tensor]


class Attention(nn.Module, abc.ABC):
    """Self-attention `(B, T, D) -> (B, T, D)` at any `T`.

    A call is three steps that a key-value cache comes between when generating: `project` makes queries, keys and values
    of tokens at given positions, `attend` mixes values, `output` joins the heads.

    Attributes:
        dim: `D`.
        heads: query heads `H`.
        kv_heads: heads of the values (and, where keys are projected, of the keys).
        value_dim: `dv`, the width of a value head.
        is_causal: whether a token sees only itself and earlier ones.
        dropout: share of attention probabilities dropped in training.
        rotary: rotary embedding of queries and keys, or None.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None,
        value_dim: int,
        is_causal: bool,
        bias: bool,
        dropout: float,
        rotary: RotaryEmbedding | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.dim = checks.positive_int("dim", dim)
        self.heads = checks.positive_int("heads", heads)
        self.kv_heads = heads if kv_heads is None else checks.positive_int("kv_heads", kv_heads)
        if heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads = {heads}, got {kv_heads}")
        self.value_dim = checks.positive_int("value_dim", value_dim)
        self.is_causal = is_causal
        self.dropout = checks.probability("dropout", dropout)
        if rotary is not None and not isinstance(rotary, RotaryEmbedding):
            raise TypeError(f"rotary must be a RotaryEmbedding or None, got {type(rotary).__name__}")
        self.rotary = rotary
        self.v_proj = new_linear(dim, self.kv_heads * value_dim, bias, device, dtype)
        self.out_proj = new_linear(heads * value_dim, dim, bias, device, dtype)

    def forward(
        self,
        x: Tensor,
        *,
        key_start: Tensor | None = None,
        key_end: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Attention among the tokens of each row.

        Args:
            x: `(B, T, D)`, of the parameters' dtype (any, under autocast).
            key_start: `(B,)` integers, the first real token of each row; positions count from it, so a left-padded row
                gives what it gives unpadded.
            key_end: `(B,)` integers, one past the last real token of each row.
            cache: from `new_cache`; `x` are then the tokens after those it holds, and are added to it. Indices in
                `key_start` count from the first token in the cache; `key_end` has no place then.

        Returns:
            `(B, T, D)`. A token that attends to nothing (left padding) mixes zeros.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        self._check_input(x)
        key_start, key_end = check_key_bound("key_start", key_start, x), check_key_bound("key_end", key_end, x)
        if cache is not None:
            return self._continue(x, cache, key_start, key_end)
        if not torch.compiler.is_compiling():  # reading the numbers would break the graph; the op reads them again
            check_key_bounds(key_start, key_end, x.shape[1])
        positions = torch.arange(x.shape[1], device=x.device)
        if key_start is not None:
            positions = positions - key_start[:, None]
        query, key, value = self.project(x, positions)
        return self.output(self.attend(query, key, value, key_start=key_start, key_end=key_end))

    @abc.abstractmethod
    def project(self, x: Tensor, positions: Tensor) -> QKV:
        """Queries, keys and values of tokens `x (B, T, D)` at `positions`, `(T,)` or `(B, T)` integers."""

    @abc.abstractmethod
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
        """Mixed values `(B, Hq, Tq, dv)`; `query_offset` is the index of the first query among the keys."""

    def output(self, mixed: Tensor) -> Tensor:
        """Heads `(B, Hq, T, dv)` joined and projected: `(B, T, D)`."""
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    # ---- the cache

    @abc.abstractmethod
    def cache_layout(self) -> CacheLayout:
        """What a key-value cache of this layer keeps."""

    def new_cache(self) -> KeyValueCache:
        """An empty cache; see `forward`."""
        return KeyValueCache(self.cache_layout())

    def project_for_cache(self, x: Tensor, positions: Tensor) -> QKV:
        """As `project`, where the layer has a choice: in the form whose keys the cache keeps."""
        return self.project(x, positions)

    def key_parts(self, x: Tensor, key: Tensor) -> Sequence[Tensor]:
        """The parts of the cache's layout, of tokens `x` and what `project_for_cache` made their keys."""
        return key.split([part.width for part in self.cache_layout().keys], dim=-1)

    @abc.abstractmethod
    def attend_cached(self, query: Tensor, cache: KeyValueCache, key_start: Tensor | None) -> Tensor:
        """Mixed values `(B, Hq, Tq, dv)` of the last `Tq` tokens in the cache."""

    def _continue(self, x: Tensor, cache: KeyValueCache, key_start: Tensor | None, key_end: Tensor | None) -> Tensor:
        self._check_cache(x, cache, key_end)
        read = cache.length
        positions = torch.arange(read, read + x.shape[1], device=x.device)
        if key_start is not None:
            positions = positions - key_start[:, None]
        query, key, value = self.project_for_cache(x, positions)
        cache.append(self.key_parts(x, key), value)
        # A row may still be all padding: it starts where the cache ends, and sees nothing.
        begun = None if key_start is None else key_start.clamp(max=cache.length)
        if read == 0:
            mixed = self.attend(query, key, value, key_start=begun)
        else:
            mixed = self.attend_cached(query, cache, begun)
        cache.forget(key_start)
        return self.output(mixed)

    def _check_cache(self, x: Tensor, cache: KeyValueCache, key_end: Tensor | None) -> None:
        if not isinstance(cache, KeyValueCache):
            raise TypeError(f"cache must be a KeyValueCache, from new_cache(), or None; got {type(cache).__name__}")
        if not self.is_causal:
            raise ValueError("cache must be None where is_causal is False: every token sees the ones that follow")
        if key_end is not None:
            raise ValueError("key_end must be None with a cache: pad rows on the left, so that new tokens follow old")
        if cache.layout != self.cache_layout():
            raise ValueError(
                f"cache is of another layer: it holds {cache.layout}; this one needs {self.cache_layout()}"
            )
        if cache.rows not in (None, x.shape[0]):
            raise ValueError(f"x must have the {cache.rows} rows of the cache, got {x.shape[0]}")

    @abc.abstractmethod
    def key_numbers(self, length: int) -> int:
        """Numbers held by the key cache of one row, all heads, when generating at `length` tokens."""

    def flops(self, length: int, batch: int = 1, *, dense: bool = False) -> Flops:
        """FLOPs of one call on `batch` unpadded rows of `length` tokens; see `structattn.flops` for what counts.

        Args:
            length: `T`.
            batch: rows.
            dense: count masked pairs too, and a sliding window without its blocks: the paper's way.
        """
        linears = [module for module in self.children() if isinstance(module, nn.Linear)]
        projections = [flops.linear(each.in_features, each.out_features, batch * length) for each in linears]
        return sum(projections, self.mixing_flops(length, batch, dense=dense))

    @abc.abstractmethod
    def mixing_flops(self, length: int, batch: int = 1, *, dense: bool = False) -> Flops:
        """What `flops` counts outside the dense projections: features of structures, scores, mixing of values."""

    def fans(self) -> dict[str, Fans]:
        """`(fan_in, fan_out)` of every matrix parameter by name; gains and biases, which have none, are left out.

        They set initial deviations (`1/sqrt(fan_in)`) and learning rates under muP; of a structure's factor they are
        those of one block.
        """
        fans: dict[str, Fans] = {}
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                fans[f"{name}.weight"] = (module.in_features, module.out_features)
            elif isinstance(module, Structure):
                fans |= {f"{name}.{factor}": fan for factor, fan in module.factor_fans().items()}
        return fans

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every matrix anew, normal with deviation `1/sqrt(fan_in)`; biases become 0, gains 1."""
        draw_linears(self, generator)
        for module in self.children():
            if isinstance(module, Structure):
                module.reset_parameters(generator)
            elif isinstance(module, (LevelNorm, Basis)):
                module.reset_parameters()

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise ValueError(f"x must have shape (B, T, D) with D = {self.dim}, got {tuple(x.shape)}")
        weight = self.out_proj.weight
        if x.device != weight.device:
            raise ValueError(f"x must be on the parameters' device {weight.device}, got {x.device}")
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x must have the parameters' dtype {weight.dtype}, got {x.dtype}")

    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

    def extra_repr(self) -> str:
        """What the submodules do not show."""
        grouped = "" if self.kv_heads == self.heads else f", kv_heads={self.kv_heads}"
        rotary = "" if self.rotary is None else f", rotary={self.rotary}"
        return f"heads={self.heads}{grouped}, is_causal={self.is_causal}, dropout={self.dropout}{rotary}"


class LayerOptions(TypedDict, total=False):
    """Keywords of every layer that projects its queries and keys; their defaults are those of `ProjectedAttention`."""

    kv_heads: int | None
    is_causal: bool
    qk_norm: bool
    bias: bool
    dropout: float
    rotary: RotaryEmbedding | None
    device: torch.device | str | None
    dtype: torch.dtype | None
    generator: torch.Generator | None


class ProjectedAttention(Attention):
    """Attention whose queries and keys are linear projections, head by head: all but the bilinear layer.

    Args:
        dim: `D`.
        heads: query heads `H`.
        level_ranks: widths of the levels of a head, which sum to `r`; pairs of a rotary embedding stay inside them.
        value_dim: `dv`.
        kv_heads: heads of keys and values, a divisor of `heads`: query head `h` reads key head `h // (H / kv_heads)`.
        is_causal: whether a token sees only itself and earlier ones.
        qk_norm: LayerNorm (gain, no shift) over the `r` dimensions of each query and key head, shared by heads.
        bias: whether projections have biases.
        dropout: share of attention probabilities dropped in training.
        rotary: rotary embedding of queries and keys, after the norm.
        device: where the parameters live.
        dtype: their dtype.
        generator: source of the initial parameters.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        level_ranks: Sequence[int],
        value_dim: int,
        *,
        kv_heads: int | None = None,
        is_causal: bool = True,
        qk_norm: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
        rotary: RotaryEmbedding | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            dim,
            heads,
            kv_heads=kv_heads,
            value_dim=value_dim,
            is_causal=is_causal,
            bias=bias,
            dropout=dropout,
            rotary=rotary,
            device=device,
            dtype=dtype,
        )
        self.level_ranks = tuple(level_ranks)
        self.head_dim = sum(self.level_ranks)
        if rotary is not None:
            rotary.check(self.level_ranks)
        self.q_proj = new_linear(dim, heads * self.head_dim, bias, device, dtype)
        self.k_proj = new_linear(dim, self.kv_heads * self.head_dim, bias, device, dtype)
        self.q_norm = LevelNorm((self.head_dim,), device=device, dtype=dtype) if qk_norm else None
        self.k_norm = LevelNorm((self.head_dim,), device=device, dtype=dtype) if qk_norm else None
        draw_linears(self, generator)

    def project(self, x: Tensor, positions: Tensor) -> QKV:
        """Queries `(B, H, T, r)`, keys and values of `kv_heads` heads."""
        query = self.q_proj(x).unflatten(-1, (self.heads, -1))
        key = self.k_proj(x).unflatten(-1, (self.kv_heads, -1))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if self.rotary is not None:
            query = self.rotary(query, positions, self.level_ranks)
            key = self.rotary(key, positions, self.level_ranks)
        return query, key, split_heads(self.v_proj(x), self.kv_heads)

    def cache_layout(self) -> CacheLayout:
        """All keys and values."""
        return CacheLayout((CacheSlice(self.kv_heads, self.head_dim),), CacheSlice(self.kv_heads, self.value_dim))

    def attend_cached(self, query: Tensor, cache: KeyValueCache, key_start: Tensor | None) -> Tensor:
        """Mixed values `(B, H, Tq, dv)`."""
        offset = cache.length - query.shape[2]
        return self.attend(query, cache.keys[0].live, cache.value.live, key_start=key_start, query_offset=offset)


@torch.no_grad()
def draw_linears(layer: nn.Module, generator: torch.Generator | None) -> None:
    """Draw the projections of a layer, normal with deviation `1/sqrt(fan_in)`; their biases become 0."""
    for module in layer.children():
        if isinstance(module, nn.Linear):
            weight = module.weight
            device = weight.device if generator is None else generator.device
            draw = torch.randn(weight.shape, generator=generator, device=device, dtype=weight.dtype)
            weight.copy_(draw / math.sqrt(module.in_features))
            if module.bias is not None:
                module.bias.zero_()


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`(B, T, heads·width)` as `(B, heads, T, width)`, a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def new_linear(
    dim_in: int, dim_out: int, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Linear:
    """A linear map whose parameters wait for `reset_parameters`."""
    device = torch.get_default_device() if device is None else device
    return nn.utils.skip_init(nn.Linear, dim_in, dim_out, bias=bias, device=device, dtype=dtype)


def width_per_head(dim: int, heads: int, head_dim: int | None) -> int:
    """`head_dim`, or `dim / heads` where it is None; ValueError where that is no integer."""
    if head_dim is not None:
        return checks.positive_int("head_dim", head_dim)
    if checks.positive_int("dim", dim) % checks.positive_int("heads", heads):
        raise ValueError(f"heads must divide dim = {dim} unless head_dim is given, got {heads}")
    return dim // heads
