"""Labels of Chronos's attentions in folders, configs and tables.

A label leaves out the fields that are the same in every T5. A label without a mark is the paper's form, since labels
came before windows:

standard                standard+qk_norm=false+scale=1
mlr:16|16               mlr:16|16+paper+gains=none+level_weight=1+qk_norm=false
mlr:16|16/mean          mlr:16|16+paper+level_weight=1+qk_norm=false
mlr:16|16+paper=false   mlr:16|16+level_weight=1+qk_norm=false
"""

from __future__ import annotations

_COMMON = {"standard": ("qk_norm=false", "scale=1"), "mlr": ("level_weight=1", "qk_norm=false")}
_PAPER = ("paper", "paper=true")
_PLAIN = "paper=false"


def spelling(label: str) -> str:
    """Return the spelling that a label stands for, as `structattn.layers.parse_attention` reads it.

    Raises:
        ValueError: `label` is of another kind, or has gains that no spelling has.
    """
    head, *options = label.split("+")
    # Version 0.1.0 also wrote gains as numbers. They have no spelling; Python code passes a `Hierarchy`.
    head, slash, gains = head.partition("/")
    kind = head.partition(":")[0]
    if kind not in _COMMON or (slash and (kind, gains) != ("mlr", "mean")):
        raise ValueError(f"label must be as in standard, mlr:16|16 or mlr:16|16/mean, got {label!r}")
    if kind == "mlr":
        plain = _PLAIN in options
        options = [*([] if plain else ["paper"]), *(option for option in options if option != _PLAIN)]
        options += [f"gains={gains}"] if plain and slash else ["gains=none"] if not plain and not slash else []
    return "+".join([head, *options, *_COMMON[kind]])


def label(attention: str) -> str:
    """Return the label of a spelling.

    Raises:
        TypeError, ValueError: `attention` is no spelling, or a T5 cannot have it.
    """
    from structattn.integrations.t5 import parse_t5_attention  # here, so that `--help` does not import torch

    config = parse_t5_attention(attention)
    head, *options = attention.strip().split("+")
    kind = head.partition(":")[0]
    if kind == "mlr":
        fields = config.to_dict()
        head += "/mean" if fields["gains"] == "mean" else ""
        options = [each for each in options if each != _PLAIN] + ([] if fields["paper"] else [_PLAIN])
    common = (*_COMMON[kind], *_PAPER, "gains=none", "gains=mean")
    return "+".join([head, *(option for option in options if option not in common)])


COMPARED = tuple(map(spelling, ("standard", "mlr:16|16", "mlr:8|8|8|8")))
"""Spellings that `python -m paper chronos` compares by default: heads of 32 with one, two and four levels."""
