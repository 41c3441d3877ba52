"""Frozen configs of the attention kinds.

Each has a spelling, which `str` gives and `structattn.layers.grammar` reads, and a dict form for JSON.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_type_hints

from structattn import checks
from structattn.layers import fields
from structattn.layers.choices import BilinearScale, Frequencies, Gains, HeadScale, LevelWeight, Norm, Side
from structattn.layers.ranks import (
    PAPER_BILINEAR_RANKS,
    default_ranks,
    default_windows,
    paper_ranks,
    proportional_ranks,
)
from structattn.ops.hierarchy import Hierarchy
from structattn.structures import BTT, MLR, Butterfly, Kronecker, LowRank, Monarch, Structure
from structattn.structures.families import divisor_above_root, root_divisor

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from structattn.structures.base import Factory

_LONG_CONTEXT = 2**20
"""A context in which any default hierarchy has room for its levels."""


@dataclass(frozen=True)
class AttentionConfig:
    """Base of all configs. Fields are checked when a config is made."""

    kind: ClassVar[str]
    """Name in the grammar and in the dict form."""
    arguments: ClassVar[tuple[str, ...]] = ()
    """Fields that follow the kind's name in the grammar, in order."""
    example: ClassVar[str]
    """A spelling, for error messages."""

    def __post_init__(self) -> None:
        for name, hint in self.field_types().items():
            object.__setattr__(self, name, fields.checked(name, hint, getattr(self, name)))

    @classmethod
    def field_types(cls) -> dict[str, Any]:
        """Return the type of every field by name."""
        hints = get_type_hints(cls, include_extras=True)
        return {each.name: hints[each.name] for each in dataclasses.fields(cls)}

    def __str__(self) -> str:
        """Return the spelling that `parse_attention` reads.

        Fields other than the arguments appear where they are not default.
        """
        arguments = [getattr(self, name) for name in self.arguments]
        text = self.kind
        if None not in arguments and not self._is_default(self.arguments):
            text += ":" + "|".join(map(fields.to_text, arguments))
        for name in self.field_types():
            value = getattr(self, name)
            if name not in self.arguments and not self._is_default([name]):
                text += f"+{name}" if value is True else f"+{name}={fields.to_text(value)}"
        return text

    def _is_default(self, names: Sequence[str]) -> bool:
        defaults = {each.name: each.default for each in dataclasses.fields(self)}
        return all(getattr(self, name) == defaults[name] for name in names)

    def to_dict(self) -> dict[str, Any]:
        """Return kind and fields as JSON values for `config_from_dict`."""
        return {"kind": self.kind} | {name: fields.to_plain(getattr(self, name)) for name in self.field_types()}


@dataclass(frozen=True)
class StandardConfig(AttentionConfig):
    """`standard`, `standard:1`: see `StandardAttention`.

    Attributes:
        heads: number of heads instead of the model's, at the same total width: `standard:1` is one head of full rank.
        qk_norm: LayerNorm on queries and keys.
        scale: factor on the scores.
        kv_heads: heads of keys and values in place of the model's, a divisor of its heads.
    """

    kind: ClassVar[str] = "standard"
    arguments: ClassVar[tuple[str, ...]] = ("heads",)
    example: ClassVar[str] = "standard:1"

    heads: int | None = None
    qk_norm: bool = True
    scale: HeadScale = "1/sqrt(r)"
    kv_heads: int | None = None


@dataclass(frozen=True)
class SlidingWindowConfig(AttentionConfig):
    """`swa:128`: see `SlidingWindowAttention`.

    Attributes:
        window: keys that a token sees.
        qk_norm: LayerNorm on queries and keys.
        scale: factor on the scores.
    """

    kind: ClassVar[str] = "swa"
    arguments: ClassVar[tuple[str, ...]] = ("window",)
    example: ClassVar[str] = "swa:128"

    window: int
    qk_norm: bool = True
    scale: HeadScale = "1/sqrt(r)"


@dataclass(frozen=True)
class GlobalSlidingWindowConfig(AttentionConfig):
    """`gswa:128|32`, window and global rank: see `GlobalSlidingWindowAttention`.

    Attributes:
        window: keys that a token sees with the rest of its head.
        global_rank: dimensions of a head that see all keys.
        qk_norm: LayerNorm on queries and keys.
        scale: factor on the scores, of each part's own rank.
    """

    kind: ClassVar[str] = "gswa"
    arguments: ClassVar[tuple[str, ...]] = ("window", "global_rank")
    example: ClassVar[str] = "gswa:128|32"

    window: int
    global_rank: int
    qk_norm: bool = True
    scale: HeadScale = "1/sqrt(r)"


@dataclass(frozen=True)
class MLRConfig(AttentionConfig):
    """`mlr`, `mlr:16|16|32`, `mlr:8x8` (eight levels of 8), `mlr+paper`: see `MLRAttention`.

    Plain `mlr` has windows, levels in values, level weights `1/sqrt(r_l)` and rotary rates that fall within each level.
    With `paper` every field that is not given is that of arXiv 2509.07963, section 5: blocks, values mixed whole, level
    weights `1/r_l`, gains `1/m`.

    Attributes:
        ranks: level ranks; a single number is one level. By default a split of the model's head width, see
            `default_ranks`, with `paper` see `paper_ranks`. They sum to the head width, unless `value_ranks` are given.
            Where they do, the value ranks must as well.
        levels: number of levels of the default split.
        block_sizes: `None` (global), then nested sizes. With `paper` the context halves with every level by default.
        windows: windows of the levels in place of blocks, see `Hierarchy`. The first may be left out where level 1 sees
            everything. By default see `default_windows`.
        sinks: number of first tokens that all levels reach from any distance; levels must then be by window.
        value_ranks: value dimensions that each level owns; their sum is the width of a value head. By default the
            ranks; with `paper` level 1 owns all.
        gains: `"none"` is 1, `"mean"` is `c_m = 1/m`.
        level_weight: `α_l`, the factor on a level's share of the score.
        qk_norm: LayerNorm on queries and keys.
        basis: map queries and keys before the levels, see `MLRAttention`; conversion of a trained model sets the maps.
        frequencies: rates of a rotary embedding over the levels, see `RotaryEmbedding`. Without one it has no effect.
        paper: take the paper's choice for every field that is not given. Fields are set when a config is made, so that
            `dataclasses.replace` keeps those of the old form.
    """

    kind: ClassVar[str] = "mlr"
    arguments: ClassVar[tuple[str, ...]] = ("ranks",)
    example: ClassVar[str] = "mlr:16|16|32"

    ranks: tuple[int, ...] | None = None
    levels: int | None = None
    block_sizes: tuple[int | None, ...] | None = None
    gains: Gains | None = None
    level_weight: LevelWeight | None = None
    qk_norm: bool = True
    basis: bool = False
    windows: tuple[int | None, ...] | None = None
    value_ranks: tuple[fields.Count, ...] | None = None
    frequencies: Frequencies | None = None
    paper: bool = False
    sinks: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in self._defaults().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.ranks is not None and self.levels is not None:
            raise ValueError(f"levels must not be given with ranks, got levels = {self.levels}, ranks = {self.ranks}")
        for name in ("block_sizes", "windows", "value_ranks"):
            if self.ranks is None and getattr(self, name) is not None:
                raise ValueError(f"{name} need ranks, one for each level, got {getattr(self, name)} alone")
        if self.ranks is not None:
            if self.windows is not None and len(self.windows) == len(self.ranks) - 1:
                object.__setattr__(self, "windows", (None, *self.windows))
            self._hierarchy(self.ranks, _LONG_CONTEXT)

    def _defaults(self) -> dict[str, Any]:
        """Return the values of unset fields that depend on `paper`."""
        if self.paper:
            return {"gains": "mean", "level_weight": "1/r_l", "frequencies": "whole"}
        return {"gains": "none", "level_weight": "1/sqrt(r_l)", "frequencies": "per_level"}

    def _is_default(self, names: Sequence[str]) -> bool:
        own = self._defaults()
        others = [name for name in names if name not in own]
        return all(getattr(self, name) == own[name] for name in names if name in own) and super()._is_default(others)

    def _hierarchy(self, ranks: tuple[int, ...], context_length: int) -> Hierarchy:
        levels = self._levels(ranks, context_length)
        return levels.with_sinks(self.sinks) if self.sinks else levels

    def _levels(self, ranks: tuple[int, ...], context_length: int) -> Hierarchy:
        """Return the hierarchy without sinks."""
        gains: Literal["mean"] | None = "mean" if self.gains == "mean" else None
        value_ranks = self.value_ranks if self.value_ranks is not None or self.paper else ranks
        if self.block_sizes is not None or self.windows is not None:
            return Hierarchy(ranks, self.block_sizes, gains, windows=self.windows, value_ranks=value_ranks)
        if self.paper:
            return Hierarchy.dyadic(ranks, context_length, gains, value_ranks=value_ranks)
        windows = default_windows(len(ranks), context_length)
        return Hierarchy(ranks, None, gains, windows=windows, value_ranks=value_ranks)

    def hierarchy(self, head_dim: int, context_length: int) -> Hierarchy:
        """Return the levels for a head width and a context length.

        Raises:
            ValueError: the ranks do not sum to `head_dim`, and no value ranks are given; or they do, and the value
                ranks do not.
        """
        split = paper_ranks if self.paper else default_ranks
        ranks = self.ranks or split(head_dim, context_length, self.levels)
        if sum(ranks) != head_dim and self.value_ranks is None:
            hint = f"{ranks[0]} levels are spelt mlr+levels={ranks[0]}" if len(ranks) == 1 else "or give value_ranks"
            raise ValueError(
                f"ranks must sum to the head width {head_dim}, got {'|'.join(map(str, ranks))} = {sum(ranks)}; {hint}"
            )
        hierarchy = self._hierarchy(ranks, context_length)
        if sum(ranks) == head_dim:
            hierarchy.value_widths(head_dim)
        return hierarchy


@dataclass(frozen=True)
class BilinearConfig(AttentionConfig, abc.ABC):
    """Base of the configs of bilinear attention, see `BilinearAttention`.

    Attributes:
        side: the side on which the matrix is contracted.
        norm: place of the LayerNorm.
        scale: factor on the score, or on each level's share of it.
        normalize: keep the scale of the matrix's factors in training.
    """

    side: Side = field(default="auto", kw_only=True)
    norm: Norm = field(default="key", kw_only=True)
    scale: BilinearScale = field(default="1/sqrt(D)", kw_only=True)
    normalize: bool = field(default=True, kw_only=True)

    @abc.abstractmethod
    def structure(self, dim: int, heads: int, head_dim: int, **factory: Unpack[Factory]) -> Structure:
        """Return `heads` structured matrices for a model of width `dim`."""


@dataclass(frozen=True)
class LowRankConfig(BilinearConfig):
    """`lowrank`, `lowrank:64`: standard attention as a bilinear layer.

    Attributes:
        rank: rank of each head's matrix; the head width by default.
    """

    kind: ClassVar[str] = "lowrank"
    arguments: ClassVar[tuple[str, ...]] = ("rank",)
    example: ClassVar[str] = "lowrank:64"

    rank: int | None = None
    norm: Norm = field(default="features", kw_only=True)
    scale: BilinearScale = field(default="1/sqrt(f_l)", kw_only=True)

    def structure(self, dim: int, heads: int, head_dim: int, **factory: Unpack[Factory]) -> LowRank:
        """Return a stack of `LowRank`."""
        return LowRank(dim, dim, self.rank or head_dim, heads=heads, normalize=self.normalize, **factory)


@dataclass(frozen=True)
class BilinearMLRConfig(BilinearConfig):
    """`bmlr`, `bmlr:16|8|4|4`: a Multi-Level Low Rank matrix in each head's bilinear form.

    Attributes:
        ranks: rank of the blocks of each level; level `l` has `2^{l-1}` blocks. By default the paper's `16|8|4|4`
            scaled to the head width.
    """

    kind: ClassVar[str] = "bmlr"
    arguments: ClassVar[tuple[str, ...]] = ("ranks",)
    example: ClassVar[str] = "bmlr:16|8|4|4"

    ranks: tuple[int, ...] | None = None
    norm: Norm = field(default="features", kw_only=True)
    scale: BilinearScale = field(default="1/sqrt(f_l)", kw_only=True)

    def structure(self, dim: int, heads: int, head_dim: int, **factory: Unpack[Factory]) -> MLR:
        """Return a stack of `MLR`."""
        ranks = self.ranks or proportional_ranks(head_dim, PAPER_BILINEAR_RANKS, len(PAPER_BILINEAR_RANKS))
        return MLR(dim, dim, ranks, heads=heads, normalize=self.normalize, **factory)


@dataclass(frozen=True)
class BTTConfig(BilinearConfig):
    """`btt`, `btt:2`, `btt+paper`: a Block Tensor Train in each head's bilinear form.

    Attributes:
        rank: rank `s` of every tile.
        factors: `((a, b), (c, d))` with `a·b = c·d = D`, spelt `16x32|16x32`. By default `b = d` is the smallest
            divisor of `D` not below `√D`.
        paper: take the paper's factors where none are given: `b = d` is the smallest divisor above `√D`. It differs for
            square `D`: 256 is `8x32`, by default `16x16`.
    """

    kind: ClassVar[str] = "btt"
    arguments: ClassVar[tuple[str, ...]] = ("rank",)
    example: ClassVar[str] = "btt:2"

    rank: int = 1
    factors: tuple[tuple[int, int], tuple[int, int]] | None = None
    paper: bool = False

    def structure(self, dim: int, heads: int, head_dim: int, **factory: Unpack[Factory]) -> BTT:
        """Return a stack of `BTT`."""
        factors = self.factors
        if factors is None and self.paper:
            larger = divisor_above_root(dim)
            factors = ((dim // larger, larger), (dim // larger, larger))
        return BTT(dim, dim, self.rank, factors, heads=heads, normalize=self.normalize, **factory)


@dataclass(frozen=True)
class MonarchConfig(BilinearConfig):
    """`monarch`, `monarch:16`: a Monarch matrix in each head's bilinear form.

    Attributes:
        blocks: diagonal blocks of the right factor; the largest divisor of `D` not above `√D` by default.
    """

    kind: ClassVar[str] = "monarch"
    arguments: ClassVar[tuple[str, ...]] = ("blocks",)
    example: ClassVar[str] = "monarch:16"

    blocks: int | None = None

    def structure(self, dim: int, heads: int, head_dim: int, **factory: Unpack[Factory]) -> Monarch:
        """Return a stack of `Monarch`."""
        blocks = self.blocks or dim // root_divisor(dim)
        return Monarch(dim, dim, blocks, heads=heads, normalize=self.normalize, **factory)


@dataclass(frozen=True)
class KroneckerConfig(BilinearConfig):
    """`kronecker`, `kronecker:16x16|32x32`: a Kronecker product in each head's bilinear form.

    Attributes:
        factors: shapes of the factors, whose products are `D`; two square ones near `√D` by default.
    """

    kind: ClassVar[str] = "kronecker"
    arguments: ClassVar[tuple[str, ...]] = ("factors",)
    example: ClassVar[str] = "kronecker:16x16|32x32"

    factors: tuple[tuple[int, int], ...] | None = None

    def structure(self, dim: int, heads: int, head_dim: int, **factory: Unpack[Factory]) -> Kronecker:
        """Return a stack of `Kronecker`."""
        larger = root_divisor(dim)
        factors = self.factors or ((dim // larger, dim // larger), (larger, larger))
        rows, columns = (math.prod(shape[axis] for shape in factors) for axis in (0, 1))
        if (rows, columns) != (dim, dim):
            raise ValueError(
                f"factors must multiply to {dim} x {dim}, got {fields.to_text(factors)} = {rows} x {columns}"
            )
        return Kronecker(factors, heads=heads, normalize=self.normalize, **factory)


@dataclass(frozen=True)
class ButterflyConfig(BilinearConfig):
    """`butterfly`: a butterfly matrix in each head's bilinear form. The model's width must be a power of two."""

    kind: ClassVar[str] = "butterfly"
    example: ClassVar[str] = "butterfly"

    def structure(self, dim: int, heads: int, head_dim: int, **factory: Unpack[Factory]) -> Butterfly:
        """Return a stack of `Butterfly`."""
        return Butterfly(dim, heads=heads, normalize=self.normalize, **factory)


KINDS: dict[str, type[AttentionConfig]] = {
    config.kind: config
    for config in (
        StandardConfig,
        SlidingWindowConfig,
        GlobalSlidingWindowConfig,
        MLRConfig,
        LowRankConfig,
        BilinearMLRConfig,
        BTTConfig,
        MonarchConfig,
        KroneckerConfig,
        ButterflyConfig,
    )
}
"""The config of every kind, by its name."""


# A dict of version 0.1.0 has all of these and no `paper`; its MLR attention had the paper's form.
_FIELDS_OF_0_1 = {"ranks", "levels", "block_sizes", "gains", "level_weight", "qk_norm", "basis"}


def config_from_dict(values: Mapping[str, Any]) -> AttentionConfig:
    """Return the config of a dict from `to_dict`.

    A dict of version 0.1.0 keeps its meaning.

    Raises:
        ValueError: no kind, an unknown kind or an unknown field, with the nearest known one; or a bad value.
    """
    if "kind" not in values:
        raise ValueError(f"an attention config must name its kind ({', '.join(KINDS)}), got {dict(values)}")
    config = KINDS[checks.one_of("kind", values["kind"], KINDS)]
    given = {name: value for name, value in values.items() if name != "kind"}
    if config is MLRConfig and "paper" not in given and given.keys() >= _FIELDS_OF_0_1:
        given["paper"] = True
    return make_config(config, given)


def make_config(config: type[AttentionConfig], values: Mapping[str, Any]) -> AttentionConfig:
    """Return `config(**values)`; ValueError for an unknown or missing field."""
    for name in values:
        checks.one_of(f"a field of {config.kind}", name, config.field_types())
    for each in dataclasses.fields(config):
        if each.default is dataclasses.MISSING and each.name not in values:
            raise ValueError(f"{config.kind} needs {each.name}, as in {config.example!r}")
    return config(**values)
