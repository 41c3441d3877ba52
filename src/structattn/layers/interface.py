"""Define the interface of all attention layers.

Shapes: x (B, T, D), query (B, Hq, T, r), key (B, Hkv, T, r), value (B, Hkv, T, dv).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from structattn import checks, flops
from structattn.flops import Flops
from structattn.layers.head_basis import HeadBasis
from structattn.layers.kv_cache import CacheLayout, CacheSlice, KeyValueCache
from structattn.layers.norm import LevelNorm
from structattn.layers.options import LayerOptions
from structattn.ops.arguments import check_key_bound, check_key_bounds
from structattn.ops.attention import mlr_attention
from structattn.ops.hierarchy import Hierarchy
from structattn.ops.key_span import UNPADDED, KeySpan
from structattn.ops.standard import standard_attention
from structattn.structures.base import Structure

if TYPE_CHECKING:
    from structattn.structures.base import Fans

QKV = tuple[Tensor, Tensor, Tensor]


class Attention(nn.Module, abc.ABC):
    """Self-attention `(B, T, D) -> (B, T, D)` at any `T`.

    `forward` is `project`, `attend`, `output`. When generating, the key-value cache sits between the first two.

    Attributes:
        dim: `D`.
        heads: query heads `H`.
        kv_heads: heads of the values (and of the keys, where they are projected).
        value_dim: `dv`, the width of a value head.
        is_causal: True if later tokens are hidden from each token.
        dropout: share of attention probabilities dropped in training.
        rotary: rotary embedding of queries and keys, or None.
        standard_kernel: kernel of standard attention, see `LayerOptions`.
    """

    def __init__(self, dim: int, heads: int, value_dim: int, options: LayerOptions) -> None:
        super().__init__()
        self.dim = checks.positive_int("dim", dim)
        self.heads = checks.positive_int("heads", heads)
        self.kv_heads = heads if options.kv_heads is None else checks.positive_int("kv_heads", options.kv_heads)
        if heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads = {heads}, got {options.kv_heads}")
        self.value_dim = checks.positive_int("value_dim", value_dim)
        self.is_causal = options.is_causal
        self.dropout = float(options.dropout)
        self.rotary = options.rotary
        self.standard_kernel = options.standard_kernel
        self.v_proj = new_linear(dim, self.kv_heads * value_dim, options)
        self.out_proj = new_linear(heads * value_dim, dim, options)

    def forward(
        self,
        x: Tensor,
        *,
        key_start: Tensor | None = None,
        key_end: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Attend among the tokens of each row.

        Args:
            x: `(B, T, D)`, of the parameters' dtype (any, under autocast).
            key_start: `(B,)` integers, the first real token of each row. Positions count from it, so a left-padded row
                gives what it gives unpadded.
            key_end: `(B,)` integers, one past the last real token of each row.
            cache: from `new_cache`; `x` are then the tokens after those it holds, and are added to it. Indices in
                `key_start` count from the first token in the cache, and `key_end` must be None.

        Returns:
            `(B, T, D)`. For a token that sees no key (left padding), the mixed values are zeros.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        self._check_input(x)
        key_start, key_end = check_key_bound("key_start", key_start, x), check_key_bound("key_end", key_end, x)
        if cache is not None:
            return self._continue(x, cache, key_start, key_end)
        if not torch.compiler.is_compiling():  # reading the numbers would break the graph; the op reads them again
            check_key_bounds(key_start, key_end, x.shape[1])
        query, key, value = self.project(x, _positions(x, 0, key_start))
        return self.output(self.attend(query, key, value, KeySpan(key_start, key_end)))

    @abc.abstractmethod
    def project(self, x: Tensor, positions: Tensor) -> QKV:
        """Return queries, keys and values.

        Args:
            x: `(B, T, D)`.
            positions: of the tokens, `(T,)` or `(B, T)` integers.
        """

    @abc.abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, span: KeySpan = UNPADDED) -> Tensor:
        """Return mixed values `(B, Hq, Tq, dv)`."""

    def _attend_to_all(self, query: Tensor, key: Tensor, value: Tensor, scale: float, span: KeySpan) -> Tensor:
        """Return the mixed values of standard attention."""
        dropout_p, kernel = self._dropout_p(), self.standard_kernel
        return standard_attention(
            query, key, value, span, is_causal=self.is_causal, scale=scale, dropout_p=dropout_p, kernel=kernel
        )

    def _attend_by_level(
        self, query: Tensor, key: Tensor, value: Tensor, hierarchy: Hierarchy, scale: float, span: KeySpan
    ) -> Tensor:
        """Return the mixed values of MLR attention."""
        return mlr_attention(
            query,
            key,
            value,
            hierarchy,
            is_causal=self.is_causal,
            scale=scale,
            enable_gqa=True,
            dropout_p=self._dropout_p(),
            key_start=span.key_start,
            key_end=span.key_end,
            query_offset=span.query_offset,
        )

    def output(self, mixed: Tensor) -> Tensor:
        """Join heads `(B, Hq, T, dv)` and project to `(B, T, D)`."""
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    # ---- the cache

    @abc.abstractmethod
    def cache_layout(self) -> CacheLayout:
        """Return what a key-value cache of this layer keeps."""

    def new_cache(self) -> KeyValueCache:
        """Return an empty cache for `forward`."""
        return KeyValueCache(self.cache_layout())

    def project_for_cache(self, x: Tensor, positions: Tensor) -> QKV:
        """Return queries, keys and values in the form that the cache stores."""
        return self.project(x, positions)

    def key_slices(self, x: Tensor, key: Tensor) -> Sequence[Tensor]:
        """Split keys of `project_for_cache`, of tokens `x`, into slices of the cache."""
        return key.split(self.cache_layout().key_widths, dim=-1)

    @abc.abstractmethod
    def attend_cached(self, query: Tensor, cache: KeyValueCache, span: KeySpan) -> Tensor:
        """Return mixed values `(B, Hq, Tq, dv)` of the newest `Tq` cached tokens."""

    def _continue(self, x: Tensor, cache: KeyValueCache, key_start: Tensor | None, key_end: Tensor | None) -> Tensor:
        self._check_cache(x, cache, key_end)
        read = cache.length
        query, key, value = self.project_for_cache(x, _positions(x, read, key_start))
        cache.append(self.key_slices(x, key), value.split(cache.layout.value_widths, dim=-1))
        # A row may still be all padding: it starts where the cache ends, and sees nothing.
        begun = None if key_start is None else key_start.clamp(max=cache.length)
        if read == 0:
            mixed = self.attend(query, key, value, KeySpan(begun))
        else:
            mixed = self.attend_cached(query, cache, KeySpan(begun, query_offset=read))
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

    def key_numbers(self, length: int) -> int:
        """Return one row's live key numbers, all heads, after `length` tokens."""
        return self._numbers(self.cache_layout().keys, length)

    def value_numbers(self, length: int) -> int:
        """Return one row's live value numbers, all heads, after `length` tokens."""
        return self._numbers(self.cache_layout().values, length)

    def cache_numbers(self, length: int) -> int:
        """Return one row's live cache numbers, all heads, after `length` tokens."""
        return self.key_numbers(length) + self.value_numbers(length)

    def _numbers(self, slices: Sequence[CacheSlice], length: int) -> int:
        return sum(
            each.heads * each.width * (each.retention.live(length) if self.is_causal else length) for each in slices
        )

    # ---- cost and initialisation

    def flops(self, length: int, batch: int = 1, *, dense: bool = False) -> Flops:
        """Return the FLOPs of one call on unpadded `(batch, length)` tokens.

        `structattn.flops` says what counts.

        Args:
            length: `T`.
            batch: rows.
            dense: count masked pairs too, and a full window for every token, as the paper does.
        """
        linears = [module for module in self.children() if isinstance(module, nn.Linear)]
        projections = [flops.linear(each.in_features, each.out_features, batch * length) for each in linears]
        return sum(projections, self.mixing_flops(length, batch, dense=dense))

    @abc.abstractmethod
    def mixing_flops(self, length: int, batch: int = 1, *, dense: bool = False) -> Flops:
        """Return the part of `flops` outside dense projections."""

    def _dot_product_flops(self, rank: int, length: int, batch: int, dense: bool) -> Flops:
        """Return the FLOPs of scores of this rank, and of mixing values."""
        flat, causal = Hierarchy.flat(rank), self.is_causal and not dense
        return flops.attention(flat, self.value_dim, length, heads=self.heads, batch=batch, is_causal=causal)

    def fans(self) -> dict[str, Fans]:
        """Return `(fan_in, fan_out)` of every matrix parameter by name.

        Gains and biases have none. Fans set initial deviations (`1/sqrt(fan_in)`) and the learning rates of muP. For a
        factor of a structure they are those of one block.
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
        """Draw matrices with deviation `1/sqrt(fan_in)`; biases become 0, gains 1."""
        draw_linears(self, generator)
        for module in self.children():
            if isinstance(module, Structure):
                module.reset_parameters(generator)
            elif isinstance(module, (LevelNorm, HeadBasis)):
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
        """Return the settings that submodules do not show."""
        grouped = "" if self.kv_heads == self.heads else f", kv_heads={self.kv_heads}"
        rotary = "" if self.rotary is None else f", rotary={self.rotary}"
        kernel = "" if self.standard_kernel == "auto" else f", standard_kernel={self.standard_kernel}"
        return f"heads={self.heads}{grouped}, is_causal={self.is_causal}, dropout={self.dropout}{rotary}{kernel}"


def _positions(x: Tensor, read: int, key_start: Tensor | None) -> Tensor:
    """Return positions of tokens after `read` others, `(T,)` or `(B, T)`."""
    positions = torch.arange(read, read + x.shape[1], device=x.device)
    return positions if key_start is None else positions - key_start[:, None]


@torch.no_grad()
def draw_linears(layer: nn.Module, generator: torch.Generator | None) -> None:
    """Draw projections with deviation `1/sqrt(fan_in)`; their biases become 0."""
    for module in layer.children():
        if isinstance(module, nn.Linear):
            weight = module.weight
            device = weight.device if generator is None else generator.device
            draw = torch.randn(weight.shape, generator=generator, device=device, dtype=weight.dtype)
            weight.copy_(draw / math.sqrt(module.in_features))
            if module.bias is not None:
                module.bias.zero_()


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return `(B, T, heads·width)` as `(B, heads, T, width)`, a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def new_linear(dim_in: int, dim_out: int, options: LayerOptions) -> nn.Linear:
    """Return a linear map without initial values, which `draw_linears` sets."""
    device = torch.get_default_device() if options.device is None else options.device
    return nn.utils.skip_init(nn.Linear, dim_in, dim_out, bias=options.bias, device=device, dtype=options.dtype)


def width_per_head(dim: int, heads: int, head_dim: int | None) -> int:
    """Return `head_dim`, or `dim / heads` where it is None.

    Raises:
        ValueError: `dim / heads` is no integer.
    """
    if head_dim is not None:
        return checks.positive_int("head_dim", head_dim)
    if checks.positive_int("dim", dim) % checks.positive_int("heads", heads):
        raise ValueError(f"heads must divide dim = {dim} unless head_dim is given, got {heads}")
    return dim // heads
