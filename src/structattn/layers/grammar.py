"""Parse the spelling of an attention kind.

    KIND[:ARGUMENT[,ARGUMENT…]][+FIELD=VALUE…]

| spelling | attention |
|---|---|
| `standard`, `standard:1` | standard, with another number of heads: one is full rank |
| `swa:128` | sliding window of 128 tokens |
| `gswa:128,32` | the same, and global attention on the first 32 dimensions of a head |
| `mlr` | MLR attention: levels by window in keys and values, see `default_ranks` and `default_windows` |
| `mlr:16,16,32`, `mlr:8x8` | with these level ranks, which sum to the head width; eight of 8 |
| `mlr+levels=3` | the default split in three levels |
| `mlr:16,16,32+windows=512,128` | with these windows: level 1 everywhere, then 512 and 128 tokens |
| `mlr:16,16,32+value_ranks=64,0,0` | with these levels in the values: level 1 owns all |
| `mlr:8,8,16+value_ranks=16,16,32` | queries and keys narrower than the values |
| `mlr:32,16,16+block_sizes=*,96,48` | by blocks, the first of which is everything |
| `mlr:16,16,32v@w512,128` | a whole hierarchy, as `Hierarchy.parse` reads it |
| `mlr:16,16,32v@w512,128+4`, `mlr+sinks=4` | with four sinks, see `Hierarchy` |
| `mlr+paper`, `mlr:16,8,8+paper` | the paper's form: blocks, whole values, level weights `1/r_l`, gains `1/m` |
| `lowrank`, `lowrank:64` | bilinear, low rank: standard attention |
| `bmlr:16,8,4,4` | bilinear, Multi-Level Low Rank |
| `btt`, `btt:2` | bilinear, Block Tensor Train of rank 1, of rank 2 |
| `btt+paper` | the same with the paper's factors at square widths, `8x32` at 256 |
| `monarch:16`, `kronecker:16x16,32x32`, `butterfly` | bilinear, of these families |

Any field of a kind's config can follow: `mlr:8x8+level_weight=1/r_l`, `btt+side=query`; `+paper` is short for
`+paper=true`. Bars and commas mean the same. The paper writes ranks with bars, `mlr:32|8|6|4|4|4|4|2`, which need
quotes in a shell. `structattn.ops.hierarchy_text` reads ranks and windows here and in `Hierarchy.parse`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from structattn import checks
from structattn.layers import fields
from structattn.layers.attention_configs import KINDS, AttentionConfig, MLRConfig, config_from_dict, make_config
from structattn.ops.hierarchy import Hierarchy


def parse_attention(text: str) -> AttentionConfig:
    """Return the config that `text` spells: the inverse of `str`.

    Raises:
        TypeError: `text` is not a string.
        ValueError: an unknown kind or field (with the nearest known one), or a value that does not fit.
    """
    return make_config(*_spelled_fields(text))


def parse_saved_attention(text: str) -> AttentionConfig:
    """Return the config of a spelling saved by version 0.1.0.

    There MLR attention had the paper's form.

    Raises:
        TypeError, ValueError: see `parse_attention`.
    """
    config, values = _spelled_fields(text)
    return make_config(config, {"paper": True} | values if config is MLRConfig else values)


def _spelled_fields(text: str) -> tuple[type[AttentionConfig], dict[str, Any]]:
    """Return the kind that `text` spells, and the fields it gives."""
    if not isinstance(text, str):
        raise TypeError(f"an attention kind must be spelt as a string, got {text!r} ({type(text).__name__})")
    head, *options = text.strip().split("+")
    kind, colon, argument_text = head.partition(":")
    config = KINDS[checks.one_of("attention", kind, KINDS)]
    types = config.field_types()
    texts = _arguments(config, argument_text) if colon else {}
    for option in options:
        if config is MLRConfig and option.isdecimal():
            option = f"sinks={option}"  # they follow a hierarchy's windows as `+4`
        name, equals, value = option.partition("=")
        checks.one_of(f"a field of {kind}", name, types)
        if not equals and types[name] is not bool:
            raise ValueError(f"expected '+field=value' in {text!r}, got '+{option}'")
        if name in texts:
            raise ValueError(f"{name} is given twice in {text!r}")
        texts[name] = value if equals else "true"
    return config, {name: fields.from_text(name, types[name], value) for name, value in texts.items()}


def as_config(attention: AttentionConfig | str | Mapping[str, Any]) -> AttentionConfig:
    """Return the config of a config, a spelling or a dict form."""
    if isinstance(attention, AttentionConfig):
        return attention
    return config_from_dict(attention) if isinstance(attention, Mapping) else parse_attention(attention)


def _arguments(config: type[AttentionConfig], text: str) -> dict[str, str]:
    """Return each argument's text; a single one is all after the colon."""
    names = config.arguments
    if config is MLRConfig and ("@" in text or "v" in text):
        return _hierarchy_fields(text)
    parts = [text] if len(names) == 1 else text.replace(",", "|").split("|")
    if len(parts) != len(names) or not all(parts):
        wanted = "|".join(names) if names else "no argument"
        raise ValueError(f"{config.kind} takes {wanted} after the colon, as in {config.example!r}; got {text!r}")
    return dict(zip(names, parts, strict=True))


def _hierarchy_fields(text: str) -> dict[str, str]:
    """Return the text of the fields that spell the hierarchy `text`."""
    hierarchy = Hierarchy.parse(text)
    if any(gain != 1.0 for gain in hierarchy.gains):
        raise ValueError(f"gains of an attention follow as '+gains=mean', got {text!r}")
    if hierarchy.value_ranks is None:
        raise ValueError(f"a hierarchy must say how it divides values, as in '16|16|32v@w512|128', got {text!r}")
    reach = "windows" if hierarchy.by_window else "block_sizes"
    named = {"ranks": hierarchy.ranks, reach: hierarchy.sizes, "value_ranks": hierarchy.value_ranks}
    return {name: "|".join(map(fields.to_text, each)) for name, each in named.items()}
