"""Give the sizes of Chronos-T5, published and others."""

from __future__ import annotations

from dataclasses import dataclass, fields

from structattn import checks


@dataclass(frozen=True)
class ChronosSize:
    """Sizes of a Chronos-T5, by their names in its config.

    Raises:
        TypeError, ValueError: a field is not a positive integer.
    """

    d_model: int
    """Model width."""

    num_layers: int
    """Layers of the encoder and of the decoder, each."""

    num_heads: int
    """Heads."""

    d_ff: int
    """Width inside the MLP."""

    d_kv: int = 64
    """Width of a head; ranks of a hierarchy sum to it."""

    def __post_init__(self) -> None:
        for field in fields(self):
            checks.positive_int(field.name, getattr(self, field.name))


SIZES: dict[str, ChronosSize] = {
    "tiny": ChronosSize(256, 4, 4, 1024),
    "mini": ChronosSize(384, 4, 8, 1536),
    "small": ChronosSize(512, 6, 8, 2048),
}
"""From `config.json` of amazon/chronos-t5-tiny, -mini and -small on Hugging Face: 8, 20 and 46 million parameters."""
