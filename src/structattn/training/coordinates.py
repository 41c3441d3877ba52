"""Check that activations keep their size as the width grows.

Models of several widths take a few steps on one batch. Under muP the size of a matrix's output `W x` after these steps
does not depend on the width, nor does the size of its change `(W - W_initial) x`. If a learning rate or an initial
deviation is wrong, one of the two is a power of the width. The check fits these powers (Yang et al., *Tensor Programs
V*, 2022, appendix D).
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from structattn import checks
from structattn.structures import Structure
from structattn.training.config import TrainConfig
from structattn.training.mup import parameter_groups

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from structattn.models import LanguageModel

_VOCABULARY = 96
_BATCH, _PATTERN, _LENGTH = 2, 8, 64
_SMALLEST_SIZE = 1e-12

Curves = dict[str, tuple[float, ...]]
"""One number per width, by the name of a matrix."""


@dataclass(frozen=True)
class CoordinateCheck:
    """Sizes of matrix outputs by width, and whether they depend on it.

    Attributes:
        structure: the attention structure.
        mup: True if learning rates followed muP.
        widths: model widths, ascending.
        sizes: root mean square of each matrix's output after the last step.
        changes: root mean square of the output's change: minus that of the initial matrix for the same input.
        tolerance: largest absolute exponent that passes.
    """

    structure: str
    mup: bool
    widths: tuple[int, ...]
    sizes: Curves
    changes: Curves
    tolerance: float

    @functools.cached_property
    def slopes(self) -> dict[str, float]:
        """Exponents of each size and each change, fitted as powers of width."""
        fitted = {f"size of {name}": self._slope(values) for name, values in self.sizes.items()}
        return fitted | {f"change of {name}": self._slope(values) for name, values in self.changes.items()}

    def _slope(self, values: Sequence[float]) -> float:
        return float(np.polyfit(np.log(self.widths), np.log(values), 1)[0])

    @property
    def failures(self) -> list[str]:
        """Sizes and changes that depend on the width, worst first."""
        failed = [name for name, slope in self.slopes.items() if not abs(slope) <= self.tolerance]
        return sorted(failed, key=lambda name: -abs(self.slopes[name]))

    @property
    def passed(self) -> bool:
        """True if no size or change depends on the width."""
        return not self.failures

    @property
    def verdict(self) -> str:
        """One line: pass or fail, and the largest exponent."""
        parametrisation = "muP" if self.mup else "standard parametrisation"
        worst = max(self.slopes, key=lambda name: abs(self.slopes[name]))
        outcome = "pass" if self.passed else f"fail ({len(self.failures)} of {len(self.slopes)} beyond)"
        return (
            f"{self.structure}, {parametrisation}: {outcome}; the steepest is the {worst}, "
            f"width^{self.slopes[worst]:+.2f} (allowed: {self.tolerance:g})"
        )

    def plot(self) -> Figure:
        """Plot size and change against width; failing matrices are dashed.

        Raises:
            ImportError: matplotlib is missing; names the extra that installs it.
        """
        pyplot = checks.require("matplotlib.pyplot", "plot")
        figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.5), sharex=True, layout="constrained")
        colours = pyplot.get_cmap("viridis")(np.linspace(0, 0.95, len(self.sizes)))
        for axes, quantity, curves in zip(panels, ("size", "change"), (self.sizes, self.changes), strict=True):
            for colour, (name, values) in zip(colours, curves.items(), strict=True):
                style = "--" if f"{quantity} of {name}" in self.failures else "-"
                axes.plot(self.widths, values, style, marker="o", markersize=3, color=colour, label=name)
            axes.set(xscale="log", yscale="log", xlabel="width", ylabel=f"{quantity} of the output (root mean square)")
            axes.set_xticks(self.widths, [str(width) for width in self.widths])
            axes.minorticks_off()
        panels[1].legend(fontsize="x-small", title="matrix, block", loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.suptitle(self.verdict, fontsize="small")
        return figure


def check_coordinates(
    structure: str = "standard",
    *,
    widths: Sequence[int] = (64, 128, 256, 512),
    head_dim: int = 32,
    layers: int = 2,
    steps: int = 8,
    learning_rate: float = 4e-3,
    mup: bool = True,
    tolerance: float = 0.25,
    seeds: int = 2,
) -> CoordinateCheck:
    """Train small language models and fit how activations grow with width.

    A wrong scaling rule shows as an exponent of 0.5 or 1; correct ones leave only noise, mostly of small widths.

    Args:
        structure: attention structure, as in a model's config.
        widths: at least two, ascending; multiples of `head_dim`.
        head_dim: width of a head, the same in all models.
        layers: number of blocks.
        steps: training steps before the measurement, all on one batch.
        learning_rate: peak rate at the smallest width.
        mup: scale learning rates by muP; otherwise all are equal.
        tolerance: largest absolute exponent that passes.
        seeds: initialisations to average over.

    Raises:
        ValueError: fewer than two widths, or one that is not a multiple of `head_dim`.
    """
    if len(widths) < 2 or sorted(set(widths)) != list(widths):
        raise ValueError(f"widths must be at least two, ascending, got {tuple(widths)}")
    for width in widths:
        if width % head_dim:
            raise ValueError(f"widths must be multiples of head_dim {head_dim}, got {width}")
    config = TrainConfig(steps=steps, learning_rate=learning_rate, mup=mup, base_dim=widths[0], weight_decay=0.0)
    measured = [
        [_measure(structure, width, head_dim, layers, config, seed) for seed in range(seeds)] for width in widths
    ]
    sizes, changes = {}, {}
    for name in measured[0][0]:
        numbers = np.array([[outputs[name] for outputs in by_seed] for by_seed in measured])  # (widths, seeds, 2)
        # The geometric mean over seeds, because a power is fitted. Zero has no logarithm, hence the floor.
        averages = np.exp(np.log(np.maximum(numbers, _SMALLEST_SIZE)).mean(axis=1))
        sizes[name], changes[name] = (tuple(column) for column in averages.T.tolist())
    return CoordinateCheck(structure, mup, tuple(widths), sizes, changes, tolerance)


def _measure(
    structure: str, width: int, head_dim: int, layers: int, config: TrainConfig, seed: int
) -> dict[str, tuple[float, float]]:
    """Train one model; return size and change of every matrix's output."""
    from structattn.models import LanguageModel, LanguageModelConfig

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = {"layers": layers, "dim": width, "heads": width // head_dim, "context_length": _LENGTH}
        model = LanguageModel(LanguageModelConfig(**sizes, attention=structure, vocab_size=_VOCABULARY))
        initial = copy.deepcopy(model)
        # The same batch at every width: a repeated pattern, which a model can learn.
        pattern = torch.randint(_VOCABULARY, (_BATCH, _PATTERN), generator=torch.Generator().manual_seed(seed))
        tokens = pattern.repeat(1, _LENGTH // _PATTERN)
        optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=config.betas)
        for _ in range(config.steps or 0):
            optimizer.zero_grad()
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
        return _compare(model, initial, tokens)


@torch.no_grad()
def _compare(model: LanguageModel, initial: LanguageModel, tokens: Tensor) -> dict[str, tuple[float, float]]:
    """Return the size of every matrix's output and of its change."""
    measured: dict[str, tuple[float, float]] = {}
    initial_modules = dict(initial.named_modules())

    def record(name: str, output: Tensor, before: Tensor) -> None:
        measured[name] = (_rms(output), _rms(output - before))

    def output_hook(name: str, path: str) -> Any:
        return lambda module, inputs, output: record(name, output, initial_modules[path](*inputs))

    def feature_hook(name: str, path: str, matrix: Structure) -> Any:
        # Attention contracts a structured matrix in the order that suits the call, so its two feature maps are
        # measured instead. The norms after them make their scale irrelevant: they are compared at size one.
        def hook(attention: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            before = cast("Structure", initial_modules[path])
            record(f"left {name}", _normalised(matrix.left(*inputs)), _normalised(before.left(*inputs)))
            record(f"right {name}", _normalised(matrix.right(*inputs)), _normalised(before.right(*inputs)))

        return hook

    with contextlib.ExitStack() as hooks:
        for path, module in model.named_modules():
            name = _short_name(path)
            if isinstance(module, (nn.Linear, nn.Embedding)):
                hooks.callback(module.register_forward_hook(output_hook(name, path)).remove)
            elif isinstance(module, Structure):
                attention = model.get_submodule(path.rpartition(".")[0])
                hooks.callback(attention.register_forward_pre_hook(feature_hook(name, path, module)).remove)
        model(tokens)
    return measured


def _short_name(path: str) -> str:
    """Return `q_proj 1` for `backbone.blocks.0.attention.q_proj`."""
    parts = path.split(".")
    numbers = [int(part) + 1 for part in parts if part.isdigit()]
    return " ".join([parts[-1], *map(str, numbers)])


def _normalised(output: Tensor) -> Tensor:
    return output / _rms(output)


def _rms(output: Tensor) -> float:
    return output.square().mean().sqrt().item()
