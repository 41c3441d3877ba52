"""Define the configs of the models, saved beside their weights.

Fields are checked when a config is made.
"""

# Annotations are evaluated here, not kept as text: `strict` reads them to check types.

import os
from dataclasses import fields
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from structattn import checks
from structattn.layers import RotaryEmbedding, StandardKernel, as_config
from structattn.layers.grammar import parse_saved_attention

Positions = Literal["learned", "rotary"]
"""Position encoding: a learned table of `context_length` rows, or a rotary embedding of queries and keys."""

WindowNorm = Literal["standard", "last", "none"]
"""Normalisation of each channel of a context, which the prediction reverses.

`"standard"` uses mean and deviation (Kim et al., *Reversible Instance Normalization*, 2022), `"last"` subtracts the
last value (Zeng et al., *Are Transformers Effective for Time Series Forecasting?*, 2023), `"none"` does nothing. A
series drifts, so that statistics of the training data do not fit later contexts."""

# Hugging Face writes these to config.json, or passes them to a config, beside its fields.
_HUGGING_FACE_FIELDS = {
    "model_type",
    "name_or_path",
    "_name_or_path",
    "torch_dtype",
    "attn_implementation",
    "_commit_hash",
    "output_attentions",
    "num_labels",
}


@strict
class BackboneConfig(PreTrainedConfig):
    """Sizes of a pre-norm transformer and the attention of its blocks.

    Models for a task add their own fields.

    Raises:
        TypeError: there is no such field.
        ValueError: a field is out of range.
        StrictDataclassFieldValidationError: a field has another type (Hugging Face's `strict`).
    """

    model_type = "structattn-backbone"
    attribute_map = {  # noqa: RUF012 (Hugging Face declares it so)
        "hidden_size": "dim",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "max_position_embeddings": "context_length",
    }

    is_causal: ClassVar[bool] = True
    """True if later tokens are hidden from each token. The model's task decides."""

    layers: int = 4
    """Blocks, each of attention and MLP."""

    dim: int = 128
    """Model width `D`."""

    heads: int = 4
    """Attention heads `H`."""

    context_length: int = 256
    """Rows of the learned position table, and the length that windows and blocks of MLR attention follow from."""

    attention: str | dict[str, Any] | list[Any] = "standard"
    """Attention by its spelling (`structattn.layers.grammar`) or dict form; held as the shortest spelling, saved with
    every field. A list is cycled over the blocks."""

    kv_heads: int | None = None
    """Heads of keys and values, a divisor of `heads`; None for as many."""

    positions: Positions = "learned"
    """Learned table or rotary embedding."""

    position_deviation: float | int | None = None
    """Initial deviation of a learned table; by default the model's own."""

    rotary_base: float | int = 10_000.0
    """Base of the rotary embedding, see `RotaryEmbedding`."""

    mlp_ratio: int = 4
    """Width of the MLP's hidden layer divided by `dim`."""

    dropout: float | int = 0.0
    """Share dropped in training, of the outputs added to the residual stream and of attention probabilities."""

    standard_kernel: StandardKernel = "auto"
    """Kernel of standard attention, see `StandardKernel`."""

    def __post_init__(self, **kwargs: Any) -> None:
        known = {field.name for field in fields(self)} | set(self.attribute_map) | _HUGGING_FACE_FIELDS
        for name in kwargs.keys() - known:
            raise TypeError(f"{type(self).__name__} has no field {name!r}{checks.did_you_mean(name, known)}")
        if isinstance(self.attention, list):
            self.attention = [str(as_config(structure)) for structure in self.attention]
        else:
            self.attention = str(as_config(self.attention))
        self._check_fields()
        super().__post_init__(**kwargs)

    def _check_fields(self) -> None:
        """Check ranges in one line each, where `strict` validators take several."""
        for name in ("layers", "dim", "heads", "context_length", "mlp_ratio"):
            checks.positive_int(name, getattr(self, name))
        checks.probability("dropout", self.dropout)
        if checks.finite("rotary_base", self.rotary_base) <= 1.0:
            raise ValueError(f"rotary_base must be above 1, got {self.rotary_base}")
        if self.position_deviation is not None:
            checks.positive("position_deviation", self.position_deviation)
        if not self.attention:
            raise ValueError("attention must name at least one structure, got an empty list")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the config of a saved dict.

        An attention saved as a spelling is of version 0.1.0, and keeps the meaning it had then.
        """
        attention = config_dict.get("attention")
        if isinstance(attention, str):
            config_dict = config_dict | {"attention": str(parse_saved_attention(attention))}
        elif isinstance(attention, list):
            spelled = [str(parse_saved_attention(each)) if isinstance(each, str) else each for each in attention]
            config_dict = config_dict | {"attention": spelled}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> Any:
        """Return the config of a saved file, see `from_dict`."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    @property
    def structures(self) -> list[str]:
        """Spellings that are cycled over the blocks."""
        return [str(each) for each in self.attention] if isinstance(self.attention, list) else [str(self.attention)]

    def structure(self, block: int) -> str:
        """Return the spelling of the attention in a block."""
        return self.structures[block % len(self.structures)]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, and every field of the attention.

        A saved model keeps these when a default changes.
        """
        full = [as_config(structure).to_dict() for structure in self.structures]
        return super().to_dict() | {"attention": full if isinstance(self.attention, list) else full[0]}

    @property
    def rotary(self) -> RotaryEmbedding | None:
        """Rotary embedding of queries and keys, or None."""
        return RotaryEmbedding(self.rotary_base) if self.positions == "rotary" else None


@strict
class LanguageModelConfig(BackboneConfig):
    """Config of a `LanguageModel`."""

    model_type = "structattn"

    vocab_size: int = 96
    """Number of tokens; 96 is that of `structattn.tasks.characters`."""

    token_deviation: float | int = 1.0
    """Initial deviation of the embedding."""

    tie_word_embeddings: bool = False
    """Share the embedding's table with the head."""

    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def _check_fields(self) -> None:
        super()._check_fields()
        checks.positive_int("vocab_size", self.vocab_size)
        checks.positive("token_deviation", self.token_deviation)


@strict
class RegressionModelConfig(BackboneConfig):
    """Config of a `RegressionModel`."""

    model_type = "structattn-regression"

    input_dim: int = 16
    """Dimensions `d` of the inputs."""

    def _check_fields(self) -> None:
        super()._check_fields()
        checks.positive_int("input_dim", self.input_dim)


@strict
class ForecastModelConfig(BackboneConfig):
    """Config of a `ForecastModel`.

    The model reads `context_length` steps and predicts the next `horizon`.
    """

    model_type = "structattn-forecast"
    is_causal: ClassVar[bool] = False

    channels: int = 7
    """Channels `C` of the series."""

    horizon: int = 96
    """Steps `H` to predict."""

    window_norm: WindowNorm = "last"
    """Normalisation of each context, see `WindowNorm`."""

    def _check_fields(self) -> None:
        super()._check_fields()
        checks.positive_int("channels", self.channels)
        checks.positive_int("horizon", self.horizon)
