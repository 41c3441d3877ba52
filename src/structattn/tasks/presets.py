"""Hold tables of model sizes, with batch size, learning rate and budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from structattn import checks


@dataclass(frozen=True)
class Preset:
    """Sizes of a backbone and its training."""

    layers: int
    """Number of blocks, each with attention and MLP."""

    dim: int
    """Model width."""

    heads: int
    """Attention heads, each of rank `dim / heads`."""

    context_length: int
    """Tokens of a training window, and rows of the learned position table."""

    batch_size: int
    """Sequences per step."""

    learning_rate: float
    """Peak rate of AdamW."""

    flops: float
    """Default budget: training FLOPs."""

    evaluation_tokens: int = 131_072
    """Tokens of the held-out set."""

    def sizes(self) -> dict[str, int]:
        """Return the keyword arguments of a model's config."""
        return {name: getattr(self, name) for name in ("layers", "dim", "heads", "context_length")}


# "paper-*" are the language models of arXiv 2509.07963, section 5, with head rank 64. Their budgets are 20 tokens per
# parameter (Hoffmann et al., 2022) and want an accelerator. `demo` takes minutes on two cores.
PRESETS: dict[str, Preset] = {
    "demo": Preset(
        layers=4,
        dim=128,
        heads=4,
        context_length=256,
        batch_size=8,
        learning_rate=2e-3,
        flops=7e12,
        evaluation_tokens=16_384,
    ),
    "paper-256": Preset(layers=6, dim=256, heads=4, context_length=1024, batch_size=32, learning_rate=2e-3, flops=3e15),
    "paper-384": Preset(
        layers=6, dim=384, heads=6, context_length=1024, batch_size=32, learning_rate=2e-3, flops=1.4e16
    ),
    "paper-512": Preset(
        layers=6, dim=512, heads=8, context_length=1024, batch_size=32, learning_rate=2e-3, flops=4.3e16
    ),
    "paper-768": Preset(
        layers=6, dim=768, heads=12, context_length=1024, batch_size=32, learning_rate=2e-3, flops=2.2e17
    ),
}
"""Presets of language models by name."""

# From the authors' code (github.com/YilunKuang/structured-attention): deviations, base width and epsilon from
# `src/muP.py`; schedule, decay and steps from `config/struct_configs/train_struct_gpt2.py`; warm-up from `train.py`.
AUTHORS_TRAINING: dict[str, Any] = {
    "positions": "learned",
    "token_deviation": 0.02,
    "position_deviation": 0.02,
    "steps": 100_000,
    "learning_rate": 3e-3,
    "schedule": "constant",
    "warmup": 0.02,
    "weight_decay": 0.0,
    "base_dim": 768,
    "epsilon": 1e-20,
}
"""The authors' language recipe, as fields of sizes and training. Their rate is 3e-3 or another by structure and width
(`paper/recipe.py`)."""


# `paper` has the sizes of arXiv 2509.07963; `small` is for two cores. A larger budget overfits: two years of hourly
# values hold few windows that do not overlap.
FORECAST_PRESETS: dict[str, Preset] = {
    "small": Preset(layers=2, dim=64, heads=4, context_length=512, batch_size=32, learning_rate=2e-3, flops=5e12),
    "paper": Preset(layers=2, dim=512, heads=8, context_length=512, batch_size=32, learning_rate=1e-3, flops=3e14),
}
"""Presets of forecasting models by name."""


def preset(name: str, table: Mapping[str, Preset] = PRESETS) -> Preset:
    """Return the preset of that name.

    Raises:
        ValueError: there is none; the message has the nearest name.
    """
    return table[checks.one_of("preset", name, table)]
