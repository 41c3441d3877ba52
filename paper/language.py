"""Language models that several studies train."""

from __future__ import annotations

from collections.abc import Mapping

from paper.study import Label, Trial
from structattn.comparison.run import ModelSizes, RunConfig
from structattn.tasks import LanguageConfig
from structattn.training import Preset, TrainConfig

TEXT = "stdlib"
"""Default text: the sources of Python's standard library, which every machine has."""

LOSS = "validation loss, nats per character"
"""Label of an axis."""

_MIN_EVALUATION_TOKENS = 65_536


def mlr_unscaled(ranks: str = "") -> str:
    """Return the spelling of the paper's MLR attention at standard scale.

    It has neither the paper's level weights `1/r_l` nor its gains `1/m`.
    """
    return f"mlr{ranks and f':{ranks}'}+paper+level_weight=1/sqrt(r)+gains=none"


def language_trial(
    structure: str,
    data: str,
    sizes: ModelSizes,
    context_length: int,
    train: TrainConfig,
    labels: Mapping[str, Label],
) -> Trial:
    """Return the trial of one language model."""
    task = LanguageConfig(data, context_length, evaluation_tokens=max(context_length, _MIN_EVALUATION_TOKENS))
    return Trial(RunConfig(structure, task, sizes, train), {"structure": structure, "width": sizes.dim, **labels})


def preset_trial(structure: str, data: str, preset: Preset, labels: Mapping[str, Label]) -> Trial:
    """Return the trial of a preset's model with rotary positions."""
    sizes = ModelSizes(preset.layers, preset.dim, preset.heads, "rotary")
    train = TrainConfig(flops=preset.flops, batch_size=preset.batch_size, learning_rate=preset.learning_rate)
    return language_trial(structure, data, sizes, preset.context_length, train, labels)
