"""Define settings and profile of language modelling."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from structattn import checks
from structattn.tasks.presets import AUTHORS_TRAINING, PRESETS
from structattn.tasks.profiles.profile import ABSENT_AT_DEFAULT, TaskCommand, TaskProfile

if TYPE_CHECKING:
    from structattn.models import StructuredModel
    from structattn.tasks.language import LanguageTask


@dataclass(frozen=True)
class LanguageConfig:
    """Settings of language: text, tokens and the length of windows.

    Raises:
        TypeError, ValueError: a field has the wrong type or is out of range.
    """

    data: str = "stdlib"
    """Text: `stdlib` (Python's own source), a file, a folder (its .txt files), a pattern, or `openwebtext[:N]`."""

    context_length: int = 256
    """Tokens of a window, the most that a prediction can look back."""

    evaluation_tokens: int = 131_072
    """Tokens to evaluate on, in windows spread evenly over the validation part; all of it if shorter."""

    # Runs of version 0.1.0 have no such field and used the ASCII table: both are one config.
    tokenizer: str = field(default="ascii", metadata={ABSENT_AT_DEFAULT: True})
    """Tokens of the text: `characters` (those of the training text), `bytes` (of UTF-8), the folder or file of a
    Hugging Face tokenizer, or `ascii` (a fixed table that drops all else)."""

    def __post_init__(self) -> None:
        checks.text("data", self.data)
        checks.text("tokenizer", self.tokenizer)
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


def _model_fields(config: LanguageConfig) -> dict[str, Any]:
    """Return the vocabulary's size, or nothing where it is the model's default."""
    if config.tokenizer == "ascii":
        return {}
    from structattn.tasks.corpus import load_tokenizer

    return {"vocab_size": load_tokenizer(config.tokenizer, config.data).size}


def _keep(config: LanguageConfig, folder: Path) -> None:
    """Save the tokenizer in `folder`, or check the one there."""
    from structattn.tasks.corpus import load_tokenizer
    from structattn.tasks.tokenizers import TextTokenizer, read_tokenizer, saved_tokenizer

    tokenizer = load_tokenizer(config.tokenizer, config.data)
    if not isinstance(tokenizer, TextTokenizer):
        return
    if (saved := saved_tokenizer(folder)) == "ascii":
        tokenizer.save(folder)
    elif getattr(read_tokenizer(saved), "digest", None) != tokenizer.digest:
        raise ValueError(
            f"{folder} holds another vocabulary than {config.tokenizer} has now: text or tokenizer changed since the "
            "run began; choose another folder or --overwrite"
        )


def _restore(config: LanguageConfig, folder: Path) -> LanguageConfig:
    """Return the config with the tokenizer saved in `folder`."""
    from structattn.tasks.tokenizers import saved_tokenizer

    return config if config.tokenizer == "ascii" else replace(config, tokenizer=saved_tokenizer(folder))


def _complete(fields: dict[str, Any]) -> dict[str, Any]:
    """Evaluate on one window at least."""
    return fields | {"evaluation_tokens": max(fields["context_length"], fields["evaluation_tokens"])}


def _presets() -> dict[str, dict[str, Any]]:
    """Return the presets of the commands.

    `paper-*` have the paper's sizes and this package's training, `authors-*` the training of the authors' code as well.
    """
    presets = {name: {**asdict(row), "positions": "rotary", "tokenizer": "characters"} for name, row in PRESETS.items()}
    for name in [name for name in PRESETS if name.startswith("paper-")]:
        sizes = {field: value for field, value in presets[name].items() if field != "flops"}
        presets[name.replace("paper", "authors")] = sizes | AUTHORS_TRAINING | {"tokenizer": "ascii"}
    return presets


LANGUAGE = TaskProfile(
    name="language",
    config=LanguageConfig,
    build=_build,
    model=_model,
    question="Which attention structure predicts this text best at the same budget, and what does it save?",
    setting=(
        "Each model reads windows of text and predicts every next token, by default a character. The validation loss "
        "is measured on text that no model was trained on, the same for all: nats per token, lower is better; bits are "
        "nats / ln 2. Bits per byte of the text compare across tokenizers, too."
    ),
    quantity="validation loss",
    columns={
        "nats_per_character": "nats/char",
        "nats_per_byte": "nats/byte",
        "nats_per_token": "nats/token",
        "bits_per_character": "bits/char",
        "bits_per_byte": "bits/byte",
    },
    wide_columns=("bits_per_byte",),
    model_fields=_model_fields,
    keep=_keep,
    restore=_restore,
    unmeasured=("Memory and speed of generation: cache numbers are counted, not timed.",),
    command=TaskCommand(
        summary="Language modelling on your text.",
        compared=("standard", "mlr", "swa:64"),
        trained="mlr",
        examples="standard, mlr, mlr:8x8, mlr:16,8,4,4, swa:64, gswa:64,16, btt, bmlr:16,8,4,4, …",
        presets=_presets(),
        hidden=("evaluation_tokens",),
        complete=_complete,
    ),
)
