"""Trained language models to retrofit, of structattn and of transformers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from structattn import flops
from structattn.comparison.run import load_run
from structattn.integrations.transformers import balance, far_moments, measure_order, set_hierarchy
from structattn.integrations.transformers.balancing import query_key_projection
from structattn.integrations.transformers.layers import DECODER, attention_layers
from structattn.integrations.transformers.pairs import rotates
from structattn.layers.head_basis import Moments
from structattn.models import LanguageModel, LanguageModelConfig
from structattn.models.mlr_conversion import OrderSource, convert_to_mlr, measure_head_moments
from structattn.models.parameters import Description, ParameterRole
from structattn.ops.hierarchy import Hierarchy
from structattn.tasks import LanguageConfig, LanguageTask
from structattn.tasks.characters import VOCABULARY
from structattn.tasks.tokenizers import TOKENIZER_FILES, saved_tokenizer
from structattn.tasks.tokens import TokenTask
from structattn.training import RunFolderError

if TYPE_CHECKING:
    from structattn.retrofit.measure import Retrofit

_CONTEXT_LENGTH = 512


class TrainedModel(Protocol):
    """A trained model with standard attention, and its evaluation task."""

    positions: str
    """`learned` or `rotary`."""

    head_width: int
    task: LanguageTask

    def variant(self, ranks: tuple[int, ...] | None, order: OrderSource | None) -> Any:
        """Return a copy with MLR attention, or unchanged if `ranks` is None.

        Raises:
            TypeError, ValueError: ranks do not fit its heads, or it has no standard attention.
        """


def load_model(study: Retrofit) -> TrainedModel:
    """Load the language model of a run, or one that `save_pretrained` wrote.

    Raises:
        RunFolderError: there is no such model.
        TypeError, ValueError, OSError: the model or its text cannot be loaded.
    """
    path = study.model
    if (path / "run.json").exists():
        return StructattnModel(study, load_run(path)[1], saved_tokenizer(path / "model"))
    if not (path / "config.json").exists():
        raise RunFolderError(path, "there is no model here (neither run.json nor config.json)")
    # Download nothing, and run no code of the folder.
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if isinstance(config, LanguageModelConfig):
        return StructattnModel(study, LanguageModel.from_pretrained(path), saved_tokenizer(path))
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise RunFolderError(path, f"the model here, {config.model_type!r}, is not a causal language model")
    return HuggingFaceModel(study, config)


class StructattnModel:
    """A language model of structattn, with the tokens of the tokenizer saved beside it."""

    def __init__(self, study: Retrofit, model: nn.Module, tokenizer: str) -> None:
        if not isinstance(model, LanguageModel):
            raise RunFolderError(study.model, "the model here is not a language model")
        length = model.config.context_length
        if study.context_length not in (None, length):
            raise ValueError(
                f"context_length must be the one the model was trained at, {length}, got {study.context_length}"
            )
        self._study, self._model = study, model
        self.positions: str = model.config.positions
        self.head_width: int = model.config.dim // model.config.heads
        self.task = LanguageTask(LanguageConfig(study.data, length, study.evaluation_tokens, tokenizer))
        if self.task.vocabulary_size != model.config.vocab_size:
            raise RunFolderError(
                study.model,
                f"the model here knows {model.config.vocab_size} tokens, and its tokenizer has "
                f"{self.task.vocabulary_size}",
            )

    def variant(self, ranks: tuple[int, ...] | None, order: OrderSource | None) -> LanguageModel:
        """Return a copy, as `TrainedModel.variant`."""
        if ranks is None:
            return copy.deepcopy(self._model)
        return convert_to_mlr(self._model, ranks, self._moments if order == "measured" else None)

    @cached_property
    def _moments(self) -> list[Moments]:
        half = -(-self.task.context_length // 2)
        batches = _calibration(self._study, self.task)
        return measure_head_moments(self._model, batches, half if self._study.pairs == "far" else None)


class HuggingFaceModel:
    """A causal language model of transformers, with the tokens of its tokenizer."""

    def __init__(self, study: Retrofit, config: Any) -> None:
        self._study = study
        self._model = AutoModelForCausalLM.from_pretrained(
            study.model,
            config=config,
            dtype=torch.float32,
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
        )
        stacks = attention_layers(self._model)
        if set(stacks) != {DECODER}:
            raise RunFolderError(study.model, f"the model here, {config.model_type!r}, is not a causal language model")
        self.positions = "rotary" if rotates(self._model) else "learned"
        if self.positions == "learned":
            for layer in stacks[DECODER]:
                query_key_projection(self._model, layer)
        self.head_width = stacks[DECODER][0].width
        self.task = _task(study, self._model)

    def variant(self, ranks: tuple[int, ...] | None, order: OrderSource | None) -> TrainableCausalLM:
        """Return a copy, as `TrainedModel.variant`."""
        model = copy.deepcopy(self._model)
        if ranks is None:
            return TrainableCausalLM(model, Hierarchy.flat(self.head_width))
        hierarchy = Hierarchy.dyadic(ranks, self.task.context_length)
        if order == "trained":
            set_hierarchy(model, hierarchy)
        elif self.positions == "rotary":
            set_hierarchy(model, hierarchy, order=self._pairs)
        else:
            balance(model, self._moments)
            set_hierarchy(model, hierarchy)
        return TrainableCausalLM(model, hierarchy)

    @cached_property
    def _pairs(self) -> dict[str, list[Any]]:
        return measure_order(self._model, _calibration(self._study, self.task), distance=self._distance)

    @cached_property
    def _moments(self) -> dict[str, list[Moments]]:
        return far_moments(self._model, _calibration(self._study, self.task), distance=self._distance)

    @property
    def _distance(self) -> int:
        return -(-self.task.context_length // 2) if self._study.pairs == "far" else 1


class TrainableCausalLM(nn.Module):
    """A causal language model of transformers with the members that `train` needs.

    Args:
        model: model with standard attention, or with the hierarchy set.
        hierarchy: hierarchy of every layer; one level for standard attention.
    """

    def __init__(self, model: PreTrainedModel, hierarchy: Hierarchy) -> None:
        super().__init__()
        self.model, self.config, self._hierarchy = model, model.config, hierarchy
        self._costs: dict[int, flops.Flops] = {}

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    def forward(self, inputs: Tensor) -> Any:
        """Return the model's outputs for tokens `(B, T)`, with `logits (B, T, V)`."""
        return self.model(inputs, use_cache=False)

    def describe(self) -> dict[str, Description]:
        """Return descriptions that train every tensor at the base rate."""
        return {name: Description(1, each.numel(), ParameterRole.GAIN) for name, each in self.named_parameters()}

    def key_numbers(self, length: int) -> int:
        """Return the numbers in the key caches of one row, all layers."""
        heads = sum(layer.key_heads for layer in attention_layers(self.model)[DECODER])
        return heads * self._hierarchy.key_numbers(length)

    def flops(self, length: int) -> flops.Flops:
        """Return the FLOPs of a row: scores by formula, all products counted."""
        if length not in self._costs:
            training = self.training
            self.eval()  # With dropout torch would compute the scores of masked pairs too.
            with flops.counter() as count:
                logits = self(torch.zeros(1, length, dtype=torch.long, device=self.device)).logits
                forward = count.get_total_flops()
                # Do not accumulate gradients in the parameters: other processes would wait for them.
                torch.autograd.grad(logits.sum(), list(self.parameters()), allow_unused=True)
                backward = count.get_total_flops() - forward
            self.train(training)
            self._costs[length] = flops.Flops(forward, backward, self._score_flops(length))
        return self._costs[length]

    def _score_flops(self, length: int) -> int:
        heads = sum(layer.config.num_attention_heads for layer in attention_layers(self.model)[DECODER])
        return flops.attention(self._hierarchy, 1, length, heads=heads, is_causal=True).scores


def _task(study: Retrofit, model: PreTrainedModel) -> LanguageTask:
    """Return the task, in tokens of the folder's tokenizer or in characters."""
    config = LanguageConfig(study.data, _context_length(study, model), study.evaluation_tokens)
    size = model.config.vocab_size
    if any((study.model / name).exists() for name in TOKENIZER_FILES):
        tokenizer = AutoTokenizer.from_pretrained(study.model, local_files_only=True, trust_remote_code=False)
        return TokenTask(config, lambda text: tokenizer(text, add_special_tokens=False, verbose=False).input_ids, size)
    if size != len(VOCABULARY):
        raise RunFolderError(
            study.model,
            f"the model here knows {size} tokens and there is no tokenizer: save it with tokenizer.save_pretrained "
            f"(without one, a model must have the {len(VOCABULARY)} characters as its vocabulary)",
        )
    return LanguageTask(config)


def _context_length(study: Retrofit, model: PreTrainedModel) -> int:
    positions = getattr(model.config, "max_position_embeddings", None)
    if study.context_length is None:
        return min(_CONTEXT_LENGTH, positions or _CONTEXT_LENGTH)
    if positions is not None and study.context_length > positions:
        raise ValueError(
            f"context_length must be at most the model's {positions} positions, got {study.context_length}"
        )
    return study.context_length


def _calibration(study: Retrofit, task: LanguageTask) -> Iterator[Tensor]:
    """Yield batches of training text with about `calibration_tokens` tokens, none twice."""
    tokens = min(study.calibration_tokens, len(task.corpus.train))
    steps = max(1, tokens // (study.batch_size * task.context_length))
    return (task.batch(step, study.batch_size)["inputs"] for step in range(steps))
