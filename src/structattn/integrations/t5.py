"""Read attentions of the layers' grammar for a T5.

A T5 neither scales its scores nor normalises queries and keys, and its heads are its own. So its own attention is spelt
`standard+qk_norm=false+scale=1`, or `standard` for short. MLR attention in it is
`mlr:16|16|32+level_weight=1+qk_norm=false`, in the paper's blocks and with whole values
`mlr:32|16|16+paper+gains=none+level_weight=1+qk_norm=false`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from structattn.layers import AttentionConfig, MLRConfig, StandardConfig, parse_attention
from structattn.ops.hierarchy import Hierarchy

T5_STANDARD = "standard+qk_norm=false+scale=1"
"""Spelling of a T5's own attention."""

# Fields that have one value in every T5.
_FIXED: Mapping[str, Mapping[str, Any]] = {
    StandardConfig.kind: {"heads": None, "qk_norm": False, "scale": "1", "kv_heads": None},
    MLRConfig.kind: {"level_weight": "1", "qk_norm": False, "basis": False},
}


def parse_t5_attention(attention: AttentionConfig | str) -> StandardConfig | MLRConfig:
    """Return the config of an attention that a T5 can have.

    A T5 chooses ranks, levels, block sizes or windows, value ranks and gains; the model gives the other fields.

    Args:
        attention: a config, or its spelling in the grammar of `structattn.layers.parse_attention`. `standard` alone
            is the attention that the model has.

    Raises:
        TypeError: `attention` is neither.
        ValueError: the spelling is not understood, or a T5 cannot express it; the message has the nearest one it can.
    """
    if attention == StandardConfig.kind:
        attention = T5_STANDARD
    config = attention if isinstance(attention, AttentionConfig) else parse_attention(attention)
    if not isinstance(config, (StandardConfig, MLRConfig)):
        raise ValueError(
            f"attention in a T5 must be standard or mlr, got {str(config)!r}; a spelling that works is {T5_STANDARD!r}"
        )
    for name, expected in _FIXED[config.kind].items():
        value = getattr(config, name)
        if value != expected:
            raise ValueError(
                f"{name} must be {_text(expected)} in a T5, got {_text(value)} in {str(config)!r}; a spelling that "
                f"works is {_spelling_that_works(config)}"
            )
    if isinstance(config, MLRConfig) and config.frequencies != MLRConfig(paper=config.paper).frequencies:
        raise ValueError(f"frequencies must be left out in a T5, which has no rotary embedding, got {str(config)!r}")
    return config


def _spelling_that_works(config: StandardConfig | MLRConfig) -> str:
    works = dataclasses.replace(config, **_FIXED[config.kind])
    if isinstance(works, MLRConfig) and works.gains != "none":
        return f"{str(works)!r}, or {str(dataclasses.replace(works, gains='none'))!r} without gains"
    return repr(str(works))


def _text(value: object) -> str:
    return "left out" if value is None else str(value).lower()


def t5_hierarchy(attention: AttentionConfig | str, head_dim: int, context_length: int) -> Hierarchy:
    """Return the levels of a T5's heads under an attention.

    Args:
        attention: see `parse_t5_attention`.
        head_dim: width of a query and key head.
        context_length: tokens that place the default windows, or the blocks with `paper`.

    Raises:
        TypeError, ValueError: see `parse_t5_attention`; or ranks or value ranks do not sum to `head_dim`.
    """
    config = parse_t5_attention(attention)
    if not isinstance(config, MLRConfig):
        return Hierarchy.flat(head_dim)
    hierarchy = config.hierarchy(head_dim, context_length)
    if hierarchy.rank != head_dim:
        raise ValueError(f"ranks must sum to the head width {head_dim}, got {hierarchy} = {hierarchy.rank}")
    hierarchy.value_widths(head_dim)
    return hierarchy
