"""Measure what a trained model loses when its cache of keys and values shrinks, for levels and for their rivals."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
from structattn.retrofit.cache_methods import (
    CacheMethod,
    Calibrated,
    Levels,
    Rounded,
    cache_share,
    rivals_of,
    token_losses,
)
from structattn.retrofit.cache_results import CacheResults, CacheRow, TextLoss
from structattn.retrofit.distillation import Distillation, DistillationTask
from structattn.retrofit.layer_choice import candidates_of, choose, layer_divergences
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

_MEASURED_WINDOWS = 2
"""Windows that layers are measured on, one by one."""
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

    levels: tuple[str, ...] = ()
    """Hierarchies by window to try, in text form."""

    cache: float | None = None
    """Bytes of the cache, as a share of standard attention's, in which each layer gets a hierarchy of its own.

    Layers choose among `candidates_of`, to which `levels` are added.
    """

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

    repeats: float = 0.0
    """Share of the windows of calibration and tuning whose second half is their first half again: far tokens matter."""

    sinks: int = 4
    """First tokens that a rival's sliding window keeps."""

    bits: tuple[int, ...] = (8, 4)
    """Bits of rounded caches."""

    seed: int = 0
    """Seed of the order of text."""

    precision: Precision = "auto"
    """Dtype of matrix products."""

    def __post_init__(self) -> None:
        if not self.levels and self.cache is None:
            raise ValueError("levels must name at least one hierarchy where no cache is given, got none")
        if self.cache is not None and not 0 < checks.finite("cache", self.cache) < 1:
            raise ValueError(f"cache must be a share between 0 and 1, got {self.cache}")
        for text in self.levels:
            if not Hierarchy.parse(text).by_window:
                raise ValueError(f"levels must reach by window, such as 8|24|32v@w512|128, got {text}")
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
        if not 0 <= checks.finite("repeats", self.repeats) <= 1:
            raise ValueError(f"repeats must be between 0 and 1, got {self.repeats}")
        checks.one_of("tune_weights", self.tune_weights, ("all", "attention"))

    @property
    def length(self) -> int:
        """Tokens of a window of evaluation."""
        return self.evaluation_length or self.context_length

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-compatible values, without unset ones."""
        plain = {name: list(each) if isinstance(each, tuple) else each for name, each in vars(self).items()}
        return {name: each for name, each in plain.items() if each is not None}


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
            "layers.json",
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
    methods = measured.methods(measured.levels(folder, make_progress))
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
        # The model, its copy in another basis, and the one to tune with its gradients and the two moments of AdamW.
        model, self.tokenizer = open_pretrained(find_model(study.model), copies=6 if study.tune_steps else 3)
        self.layers = attention_layers(model)[DECODER]
        self._check(model)
        self.task = self._task(study.data, model.config.vocab_size, study.context_length)
        self.tuning = DistillationTask(self.task, study.context_length, study.repeats)
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
            near = Hierarchy.parse(text).sizes[-1]
            if near is not None and near >= self.study.context_length:
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
        if self.study.cache is not None:
            _, shares = self._candidates([Hierarchy.parse(text) for text in self.study.levels])
            choose(torch.zeros(len(self.layers), len(shares)), shares, self.study.cache)

    def _task(self, data: str, vocabulary: int, length: int) -> LanguageTask:
        encode = functools.partial(self.tokenizer, add_special_tokens=False, verbose=False)
        config = LanguageConfig(data, length, self.study.evaluation_tokens)
        return TokenTask(config, lambda text: encode(text).input_ids, vocabulary, seed=self.study.seed)

    def _calibration(self) -> Iterator[Tensor]:
        """Yield windows of training text with about `calibration_tokens` tokens, in the order of tuning."""
        for step in range(self.study.calibration_tokens // self.study.context_length):
            yield self.tuning.batch(step, 1)["inputs"].to(self.calibrated.model.device)

    def levels(self, folder: Path, make_progress: MakeProgress | None) -> list[Levels]:
        """Return the hierarchies to measure; measure layers where a cache is given."""
        given = [Hierarchy.parse(text) for text in self.study.levels]
        if self.study.cache is None:
            return [Levels((hierarchy,)) for hierarchy in given]
        candidates, shares = self._candidates(given)
        path = folder / "layers.json"
        divergences = self._layer_divergences(candidates, path, make_progress)
        chosen = tuple(candidates[each] for each in choose(divergences, shares, self.study.cache))
        files.write_json(path, files.read_json(path) | {"chosen": list(map(str, chosen))})
        return [Levels(chosen, f"{self.study.cache:.0%} by layer")]

    def _candidates(self, given: Sequence[Hierarchy]) -> tuple[list[Hierarchy], Tensor]:
        """Return the hierarchies that layers choose from, and the cache of each as a share of the whole one."""
        candidates = candidates_of(self.layers[0].width, self.study.length, self.study.sinks, given)
        shares = [cache_share(Levels((each,)), self.layers, self.study.length) for each in candidates]
        return candidates, torch.tensor(shares, dtype=torch.float64)

    def _layer_divergences(
        self, candidates: Sequence[Hierarchy], path: Path, make_progress: MakeProgress | None
    ) -> Tensor:
        """Return what each layer loses with each candidate; read or write them in a file."""
        if not path.exists():
            progress = make_progress("each layer alone", 0, 1) if make_progress else None
            windows = list(itertools.islice(self._calibration(), _MEASURED_WINDOWS))
            with self._autocast():
                found = layer_divergences(
                    self.calibrated,
                    candidates,
                    windows,
                    None if progress is None else lambda done, of: progress.on_start(done, of, ()),
                )
            document = {"candidates": list(map(str, candidates)), "divergences": found.tolist()}
            files.write_json(path, document)
        return torch.tensor(files.read_json(path)["divergences"], dtype=torch.float64)

    def _autocast(self) -> torch.autocast:
        device = self.calibrated.model.device
        return torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(self.study.precision, device))

    def methods(self, all_levels: Sequence[Levels]) -> list[CacheMethod]:
        """Return standard attention, then levels and rivals, each whole and rounded; the uniform cuts are last."""
        study = self.study
        found: list[CacheMethod] = [CacheMethod()]
        cuts: list[CacheMethod] = []
        bits = study.bits if study.rivals else ()
        for levels in all_levels:
            window, cut = rivals_of(levels, self.layers, study.length, study.sinks)
            for method in (levels, window) if study.rivals else (levels,):
                found += [method, *(Rounded(method, each) for each in bits)]
            cuts += [cut] if study.rivals else []
        whole = Levels((Hierarchy.flat(self.layers[0].width),))
        rows = [*found, *(Rounded(whole, each) for each in bits), *cuts]
        return list(dict.fromkeys(rows))  # two hierarchies of equal bytes have the same rivals

    def row(self, method: CacheMethod, folder: Path, progress: Progress | None) -> CacheRow:
        """Return the measurement of one method."""
        saved = self._folder(method, folder)
        share = cache_share(method, self.layers, self.study.length)
        tokens = self.study.tune_steps * self.study.batch_size * self.study.context_length
        if isinstance(method, Rounded) and not method.is_standard and self.study.tune_steps:
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
        levels = method.levels if isinstance(method, Rounded) else method
        return folder / ("models" if isinstance(levels, Levels) else "rivals") / files.safe_name(levels.name)

    def _save(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _losses(self, model: Any) -> tuple[TextLoss, ...]:
        return tuple(self._loss(model.eval(), task) for task in self.texts)

    def _loss(self, model: Any, task: LanguageTask) -> TextLoss:
        """Return the losses on the validation part of one text."""
        device = model.device
        windows = torch.cat([batch["inputs"] for batch in task.evaluation_batches(1)]).to(device)
        with self._autocast():
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
        train(student, lambda steps: self.tuning, config, folder, structure=name, progress=progress)  # type: ignore[arg-type]
        shutil.rmtree(folder)  # Checkpoints serve only to resume.
