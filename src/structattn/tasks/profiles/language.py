"""Define the profile of character-level language modelling."""

from __future__ import annotations

from typing import TYPE_CHECKING

from structattn.tasks.language import LanguageConfig, LanguageTask
from structattn.tasks.profiles.profile import TaskProfile

if TYPE_CHECKING:
    from structattn.models import StructuredModel


def _model() -> type[StructuredModel]:
    from structattn.models import LanguageModel

    return LanguageModel


LANGUAGE = TaskProfile(
    name=LanguageTask.name,
    config=LanguageConfig,
    build=lambda config, seed, total_steps: LanguageTask(config, seed=seed),
    model=_model,
    question="Which attention structure predicts this text best at the same budget, and what does it save?",
    setting=(
        "Each model reads windows of text and predicts every next character. The validation loss is measured on text "
        "that no model was trained on, the same for all: nats per character, lower is better; bits are nats / ln 2."
    ),
    quantity="validation loss",
    columns={"nats_per_character": "nats/char", "bits_per_character": "bits/char"},
    unmeasured=("Memory and speed of generation: key numbers are counted, not timed.",),
)
