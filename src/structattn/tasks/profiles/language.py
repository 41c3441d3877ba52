"""Define settings and profile of character-level language modelling."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from structattn import checks
from structattn.tasks.presets import PRESETS
from structattn.tasks.profiles.profile import TaskCommand, TaskProfile

if TYPE_CHECKING:
    from structattn.models import StructuredModel
    from structattn.tasks.language import LanguageTask


@dataclass(frozen=True)
class LanguageConfig:
    """Settings of character-level language: the text and the length of its windows.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of range.
    """

    data: str = "stdlib"
    """Text: `stdlib` (Python's own source), a file, a folder (its .txt files), a pattern, or `openwebtext[:N]`."""

    context_length: int = 256
    """Characters of a window, the most that a prediction can look back."""

    evaluation_tokens: int = 131_072
    """Characters to evaluate on, in windows spread evenly over the validation part; all of it if shorter."""

    def __post_init__(self) -> None:
        checks.text("data", self.data)
        checks.positive_int("context_length", self.context_length)
        if checks.positive_int("evaluation_tokens", self.evaluation_tokens) < self.context_length:
            raise ValueError(
                f"evaluation_tokens must be at least context_length {self.context_length}, got {self.evaluation_tokens}"
            )


def _build(config: LanguageConfig, seed: int, total_steps: int) -> LanguageTask:
    from structattn.tasks.language import LanguageTask

    return LanguageTask(config, seed=seed)


def _model() -> type[StructuredModel]:
    from structattn.models import LanguageModel

    return LanguageModel


def _complete(fields: dict[str, Any]) -> dict[str, Any]:
    """Evaluate on one window at least."""
    return fields | {"evaluation_tokens": max(fields["context_length"], fields["evaluation_tokens"])}


LANGUAGE = TaskProfile(
    name="language",
    config=LanguageConfig,
    build=_build,
    model=_model,
    question="Which attention structure predicts this text best at the same budget, and what does it save?",
    setting=(
        "Each model reads windows of text and predicts every next character. The validation loss is measured on text "
        "that no model was trained on, the same for all: nats per character, lower is better; bits are nats / ln 2."
    ),
    quantity="validation loss",
    columns={"nats_per_character": "nats/char", "bits_per_character": "bits/char"},
    unmeasured=("Memory and speed of generation: key numbers are counted, not timed.",),
    command=TaskCommand(
        summary="Character-level language modelling on your text.",
        compared=("standard", "mlr", "swa:64"),
        trained="mlr",
        examples="standard, mlr, mlr:8x8, mlr:16,8,4,4, swa:64, gswa:64,16, btt, bmlr:16,8,4,4, …",
        presets={name: {**asdict(row), "positions": "rotary"} for name, row in PRESETS.items()},
        hidden=("evaluation_tokens",),
        complete=_complete,
    ),
)
