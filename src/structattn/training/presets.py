"""The sizes models come in: rows of one table."""

from __future__ import annotations

from dataclasses import dataclass

from structattn import checks


@dataclass(frozen=True)
class Preset:
    """Sizes of a backbone; the head rank is `dim / heads`."""

    layers: int
    """Blocks, each of attention and MLP."""

    dim: int
    """Model width."""

    heads: int
    """Attention heads."""

    context_length: int
    """Tokens of a training window, and of the learned position table."""

    def sizes(self) -> dict[str, int]:
        """The fields by name: keyword arguments of a model's config."""
        return {name: getattr(self, name) for name in ("layers", "dim", "heads", "context_length")}


# The rows named "paper" are the language models of arXiv 2509.07963, section 5: head rank 64 at every width.
PRESETS: dict[str, Preset] = {
    "demo": Preset(layers=4, dim=128, heads=4, context_length=256),
    "paper-256": Preset(layers=6, dim=256, heads=4, context_length=1024),
    "paper-384": Preset(layers=6, dim=384, heads=6, context_length=1024),
    "paper-512": Preset(layers=6, dim=512, heads=8, context_length=1024),
    "paper-768": Preset(layers=6, dim=768, heads=12, context_length=1024),
}
"""Every preset by its name."""


def preset(name: str) -> Preset:
    """The row of that name; ValueError with the nearest name otherwise."""
    return PRESETS[checks.one_of("preset", name, PRESETS)]
