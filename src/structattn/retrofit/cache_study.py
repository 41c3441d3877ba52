"""Measure what a trained model loses when its cache of keys and values shrinks, for levels and for their rivals."""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from structattn import checks
from structattn.comparison import files
from structattn.comparison.environment import environment
from structattn.comparison.run import claim
from structattn.integrations.transformers.layer_levels import LayerLevels
from structattn.integrations.transformers.layers import DECODER, IMPLEMENTATION, attention_layers
from structattn.integrations.transformers.pairs import find_pairing
from structattn.integrations.transformers.value_basis import value_weights
from structattn.ops.hierarchy import Hierarchy
from structattn.retrofit import quantisation
from structattn.retrofit.cache_methods import (
    CacheMethod,
    Calibrated,
    Levels,
    Rounded,
    cache_share,
    rivals_of,
    token_losses,
)
from structattn.retrofit.distillation import Distillation, DistillationTask
from structattn.retrofit.pretrained import find_model, open_pretrained
from structattn.tasks import LanguageConfig, LanguageTask
from structattn.tasks.tokens import TokenTask
from structattn.training import Progress, TrainConfig, train
from structattn.training.precision import Precision, uses_bfloat16

MakeProgress = Callable[[str, int, int], Progress | None]
"""Called before each tuning with the method's name, its index and the number of methods; returns what follows it."""

TunedWeights = Literal["all", "attention"]
"""Weights that tuning changes: all, or those of queries, keys, values and outputs."""

_ATTENTION = ".self_attn."
_TRAINED: dict[TunedWeights, str] = {"all": "", "attention": _ATTENTION}
"""Part of the names of the weights that are tuned."""

_PARTS = 4
"""Parts of a window whose losses are told apart."""


@dataclass(frozen=True)
class CacheStudy:
    """Settings of a study.

    Raises:
        TypeError, ValueError: a field is out of range.
    """

    model: str
    """Folder of `save_pretrained` with a tokenizer, GGUF file of a Llama, or `smollm2`."""

    data: str
    """Text spec of `LanguageConfig.data`: its training part calibrates and tunes, its validation part is evaluated."""

    levels: tuple[str, ...]
    """Hierarchies by window to try, in text form."""

    context_length: int = 2048
    """Tokens of a window of calibration and tuning."""

    evaluation_length: int | None = None
    """Tokens of a window of evaluation, and of the cache that is counted. By default `context_length`."""

    evaluation_tokens: int = 32_768
    """Tokens of each text to evaluate on."""

    also: tuple[str, ...] = ()
    """Further text specs, whose validation parts are evaluated."""

    calibration_tokens: int = 16_384
    """Tokens that the order and the basis of dimensions are measured on."""

    tune_steps: int = 40
    """Steps of distillation, 0 for none."""

    tune_rate: float = 1e-4
    """Peak learning rate of distillation."""

    tune_weights: TunedWeights = "all"
    """Weights that distillation changes."""

    batch_size: int = 2
    """Windows per step of distillation."""

    rivals: bool = True
    """Measure other ways to caches of the same size, too."""

    sinks: int = 4
    """First tokens that a rival's sliding window keeps."""

    bits: tuple[int, ...] = (8, 4)
    """Bits of rounded caches."""

    seed: int = 0
    """Seed of the order of text."""

    precision: Precision = "auto"
    """Dtype of matrix products."""

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("levels must name at least one hierarchy, got none")
        for text in self.levels:
            if not Hierarchy.parse(text).by_window:
                raise ValueError(f"levels must reach by window, such as 8|24|32v@w512|128, got {text}")
            if Hierarchy.parse(text).sinks:
                raise ValueError(
                    f"levels must have no sinks, which the sliding windows of rivals alone have, got {text}"
                )
        if len({Hierarchy.parse(text) for text in self.levels}) < len(self.levels):
            raise ValueError(f"levels must differ, got {', '.join(self.levels)}")
        for name in ("context_length", "evaluation_tokens", "calibration_tokens", "batch_size"):
            checks.positive_int(name, getattr(self, name))
        if self.evaluation_length is not None:
            checks.positive_int("evaluation_length", self.evaluation_length)
        for name, least in (("evaluation_tokens", self.length), ("calibration_tokens", self.context_length)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least a window of {least} tokens, got {getattr(self, name)}")
        for name in ("tune_steps", "sinks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for bits in self.bits:
            if not 1 <= checks.positive_int("bits", bits) <= 8:
                raise ValueError(f"bits must be between 1 and 8, got {bits}")
        if not checks.finite("tune_rate", self.tune_rate) > 0:
            raise ValueError(f"tune_rate must be above 0, got {self.tune_rate}")
        checks.one_of("tune_weights", self.tune_weights, ("all", "attention"))

    @property
    def length(self) -> int:
        """Tokens of a window of evaluation."""
        return self.evaluation_length or self.context_length

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-compatible values, without unset ones."""
        plain = {name: list(each) if isinstance(each, tuple) else each for name, each in vars(self).items()}
        return {name: each for name, each in plain.items() if each is not None}


@dataclass(frozen=True)
class TextLoss:
    """Losses on one text."""

    text: str
    loss: float
    """Nats per token, over every token but the first of each window."""

    parts: tuple[float, ...]
    """The same over each quarter of the window, first quarter first."""

    tokens_per_word: float
    """Tokens of the evaluated windows per word, where words are what white space separates."""

    @property
    def perplexity(self) -> float:
        """Perplexity per token."""
        return math.exp(self.loss)

    @property
    def word_perplexity(self) -> float:
        """Perplexity per word."""
        return math.exp(self.loss * self.tokens_per_word)


@dataclass(frozen=True)
class CacheRow:
    """Measurement of one method."""

    kind: str
    """`standard`, `levels`, `rounded`, `window` or `uniform`."""

    name: str
    share: float
    """Bits of the cache at the evaluated length, as a share of standard attention's in 16 bits."""

    untuned: tuple[TextLoss, ...]
    """Losses on each text before tuning; empty for a rounded cache of tuned levels."""

    tuned: tuple[TextLoss, ...] = ()
    """Losses after tuning; empty without."""

    tuning_tokens: int = 0
    tuning_seconds: float = 0.0

    @property
    def best(self) -> tuple[TextLoss, ...]:
        """Losses after tuning, where there was one."""
        return self.tuned or self.untuned


@dataclass(frozen=True)
class CacheResults:
    """Results of a study."""

    model: str
    length: int
    tune_steps: int
    rows: tuple[CacheRow, ...] = field(default=())
    """Standard attention first."""

    def save(self, folder: Path) -> None:
        """Write `results.json`."""
        files.write_json(folder / "results.json", dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path) -> CacheResults:
        """Return the results that `save` wrote."""
        return cls.from_dict(files.read_json(folder / "results.json"))

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> CacheResults:
        """Return the results whose fields are given as JSON has them; other fields are ignored."""
        rows = tuple(_row(row) for row in plain["rows"])
        return cls(plain["model"], plain["length"], plain["tune_steps"], rows)

    @property
    def standard(self) -> CacheRow:
        """The model as it was."""
        return self.rows[0]


def _row(plain: dict[str, Any]) -> CacheRow:
    losses = {
        name: tuple(TextLoss(**each | {"parts": tuple(each["parts"])}) for each in plain[name])
        for name in ("untuned", "tuned")
    }
    return CacheRow(**plain | losses)


def measure_cache(
    study: CacheStudy,
    folder: Path,
    *,
    overwrite: bool = False,
    make_progress: MakeProgress | None = None,
    command: Sequence[str] = (),
) -> CacheResults:
    """Run or resume the study in `folder`.

    Results are written after every method. `models/` holds each model with levels, for `from_pretrained`; `rivals/`
    the tuned weights of the others.

    Args:
        study: the settings.
        folder: folder of this study alone.
        overwrite: delete all results and models in `folder` first.
        make_progress: called before each tuning.
        command: the command line, for the record.

    Raises:
        RunFolderError: `folder` holds another study, or there is no model.
        TypeError, ValueError, ImportError: the study does not fit the model or its text; raised before any measurement.
    """
    measured = _Measured(study)
    if overwrite:
        files.remove(
            folder,
            "config.json",
            "environment.json",
            "results.json",
            "judged.json",
            "speed.json",
            "tuned",
            "models",
            "rivals",
        )
    claim(folder, "config.json", study.to_dict())
    files.write_json(folder / "environment.json", environment(command))
    done = (folder / "results.json").exists()
    results = CacheResults.load(folder) if done else CacheResults(study.model, study.length, study.tune_steps)
    methods = measured.methods()
    found = {row.name: row for row in results.rows}
    for index, method in enumerate(methods):
        if method.name not in found:
            progress = make_progress(method.name, index, len(methods)) if make_progress else None
            found[method.name] = measured.row(method, folder, progress)
            rows = tuple(found[each.name] for each in methods if each.name in found)
            results = dataclasses.replace(results, rows=rows)
            results.save(folder)
    return results


class _Measured:
    """A model and its texts, on which methods are measured."""

    def __init__(self, study: CacheStudy) -> None:
        self.study = study
        model, self.tokenizer = open_pretrained(find_model(study.model))
        self.layers = attention_layers(model)[DECODER]
        self._check(model)
        self.task = self._task(study.data, model.config.vocab_size, study.context_length)
        self.calibrated = Calibrated(model, lambda: list(self._calibration()))
        config = dataclasses.replace(self.task.config, context_length=study.length)
        same = LanguageTask(config, corpus=self.task.corpus, tokenizer=self.task.tokenizer)
        self.texts = [same, *(self._task(text, model.config.vocab_size, study.length) for text in study.also)]

    def _check(self, model: Any) -> None:
        """Raise ValueError unless every hierarchy fits every layer, and the model serves the study."""
        value_weights(model)
        if not any(_TRAINED[self.study.tune_weights] in name for name, _ in model.named_parameters()):
            raise ValueError(f"tune_weights must be 'all': no weight of the model has {_ATTENTION!r} in its name")
        positions = getattr(model.config, "max_position_embeddings", None) or math.inf
        for name, length in (("context_length", self.study.context_length), ("evaluation_length", self.study.length)):
            if length > positions:
                raise ValueError(f"{name} must be at most the model's {positions} positions, got {length}")
        for text in self.study.levels:
            near = quantisation.near_window(Hierarchy.parse(text))
            if near >= self.study.context_length:
                raise ValueError(
                    f"context_length must be above the nearest window {near} of {text}, got {self.study.context_length}"
                )
            for layer in self.layers:
                if layer.window is not None and layer.window < self.study.length:
                    raise ValueError(
                        f"{layer.name} has a sliding window of {layer.window} tokens, below the evaluated "
                        f"{self.study.length}: such models are not measured"
                    )
                pairing = find_pairing(model, layer.module, layer.name, layer.width)
                sizes: dict[str, Any] = {"width": layer.width, "key_heads": layer.key_heads, "name": layer.name}
                LayerLevels(Hierarchy.parse(text), pairing, None, **sizes)

    def _task(self, data: str, vocabulary: int, length: int) -> LanguageTask:
        encode = functools.partial(self.tokenizer, add_special_tokens=False, verbose=False)
        config = LanguageConfig(data, length, self.study.evaluation_tokens)
        return TokenTask(config, lambda text: encode(text).input_ids, vocabulary, seed=self.study.seed)

    def _calibration(self) -> Iterator[Tensor]:
        """Yield windows of training text with about `calibration_tokens` tokens, in the order of tuning."""
        for step in range(self.study.calibration_tokens // self.study.context_length):
            yield self.task.batch(step, 1)["inputs"].to(self.calibrated.model.device)

    def methods(self) -> list[CacheMethod]:
        """Return standard attention, each hierarchy with its rounded caches and window, rounded caches, and cuts."""
        study, found, cuts = self.study, [CacheMethod()], []
        rounded = list(study.bits) if study.rivals else []
        for text in study.levels:
            levels = Levels(Hierarchy.parse(text))
            found += [levels, *(Rounded(levels.hierarchy, bits) for bits in rounded)]
            if study.rivals:
                window, cut = rivals_of(levels, self.layers, study.length, study.sinks)
                found.append(window)
                cuts.append(cut)
        return [*found, *(Rounded(Hierarchy.flat(self.layers[0].width), bits) for bits in rounded), *cuts]

    def row(self, method: CacheMethod, folder: Path, progress: Progress | None) -> CacheRow:
        """Return the measurement of one method."""
        saved = self._folder(method, folder)
        share = cache_share(method, self.layers, self.study.length)
        tokens = self.study.tune_steps * self.study.batch_size * self.study.context_length
        if isinstance(method, Rounded) and method.hierarchy.levels > 1 and self.study.tune_steps:
            model = AutoModelForCausalLM.from_pretrained(saved, attn_implementation=IMPLEMENTATION, dtype=torch.float32)
            method.attach(model)
            return CacheRow(method.kind, method.name, share, (), self._losses(model), tokens)
        model = method.apply(self.calibrated)
        row = CacheRow(method.kind, method.name, share, self._losses(model))
        if not method.tuned or not self.study.tune_steps:
            if isinstance(method, Levels):
                self._save(model, saved)
            return row
        started = time.monotonic()
        self._tune(model, method.name, folder / "tuned" / files.safe_name(method.name), progress)
        seconds = time.monotonic() - started
        self._save(model, saved)
        return dataclasses.replace(row, tuned=self._losses(model), tuning_tokens=tokens, tuning_seconds=seconds)

    def _folder(self, method: CacheMethod, folder: Path) -> Path:
        """Return the folder of a method's tuned model; that of its levels for a rounded cache."""
        if isinstance(method, Levels | Rounded):
            return folder / "models" / files.safe_name(str(method.hierarchy))
        return folder / "rivals" / files.safe_name(method.name)

    def _save(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _losses(self, model: Any) -> tuple[TextLoss, ...]:
        return tuple(self._loss(model.eval(), task) for task in self.texts)

    def _loss(self, model: Any, task: LanguageTask) -> TextLoss:
        """Return the losses on the validation part of one text."""
        device = model.device
        windows = torch.cat([batch["inputs"] for batch in task.evaluation_batches(1)]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(self.study.precision, device)):
            losses = token_losses(model, windows)
        words = sum(len(text.split()) for text in self.tokenizer.batch_decode(windows.cpu()))
        parts = tuple(float(part.mean()) for part in losses.chunk(_PARTS, dim=1))
        return TextLoss(task.corpus.name, float(losses.mean()), parts, windows.numel() / max(words, 1))

    def _tune(self, model: Any, name: str, folder: Path, progress: Progress | None) -> None:
        """Distil the model as it was into `model`."""
        study = self.study
        config = TrainConfig(
            steps=study.tune_steps,
            batch_size=study.batch_size,
            micro_batches=study.batch_size,
            learning_rate=study.tune_rate,
            weight_decay=0.0,
            evaluation_interval=study.tune_steps,
            precision=study.precision,
        )
        student = Distillation(model, self.calibrated.model, _TRAINED[study.tune_weights])
        task = DistillationTask(self.task, study.context_length)
        train(student, lambda steps: task, config, folder, structure=name, progress=progress)  # type: ignore[arg-type]
        shutil.rmtree(folder)  # Checkpoints serve only to resume.
