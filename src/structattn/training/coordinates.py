"""The coordinate check: do activations keep their size as the width grows, as muP promises?

Models of growing width take a few steps on one batch. Under muP neither the size of what a matrix `W` puts out after
them, `W x`, nor the part of it that training brought, `(W - W_start) x`, depends on the width; where a rate or a start
is wrong, one of the two grows or shrinks as a power of the width. The check fits these powers (Yang et al., *Tensor
Programs V*, 2022, appendix D).
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
_NOTHING = 1e-12

Curves = dict[str, tuple[float, ...]]
"""A number for each width, by the name of a layer."""


@dataclass(frozen=True)
class CoordinateCheck:
    """Sizes of activations against width, and the verdict.

    Attributes:
        structure: the attention structure.
        mup: whether rates were muP's.
        widths: model widths, ascending.
        sizes: root mean square of each matrix's output after the last step.
        changes: root mean square of the difference between that and what it made of the same input at the start.
        tolerance: largest exponent, up or down, that passes.
    """

    structure: str
    mup: bool
    widths: tuple[int, ...]
    sizes: Curves
    changes: Curves
    tolerance: float

    @functools.cached_property
    def slopes(self) -> dict[str, float]:
        """Fitted exponent of each size and each change as a power of the width."""
        fitted = {f"size of {name}": self._slope(values) for name, values in self.sizes.items()}
        return fitted | {f"change of {name}": self._slope(values) for name, values in self.changes.items()}

    def _slope(self, values: Sequence[float]) -> float:
        return float(np.polyfit(np.log(self.widths), np.log(values), 1)[0])

    @property
    def failures(self) -> list[str]:
        """What depends on the width, worst first."""
        failed = [name for name, slope in self.slopes.items() if not abs(slope) <= self.tolerance]
        return sorted(failed, key=lambda name: -abs(self.slopes[name]))

    @property
    def passed(self) -> bool:
        """Whether nothing depends on the width."""
        return not self.failures

    @property
    def verdict(self) -> str:
        """One line: pass or fail, and the worst of it."""
        parametrisation = "muP" if self.mup else "standard parametrisation"
        worst = max(self.slopes, key=lambda name: abs(self.slopes[name]))
        outcome = "pass" if self.passed else f"fail ({len(self.failures)} of {len(self.slopes)} beyond)"
        return (
            f"{self.structure}, {parametrisation}: {outcome}; the steepest is the {worst}, "
            f"width^{self.slopes[worst]:+.2f} (allowed: {self.tolerance:g})"
        )

    def plot(self) -> Figure:
        """Size and change against width, a line for each matrix, axes logarithmic; dashed where it fails.

        Raises:
            ImportError: without matplotlib, naming the extra that brings it.
        """
        pyplot = checks.require("matplotlib.pyplot", "plot")
        figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.5), sharex=True, layout="constrained")
        colours = pyplot.get_cmap("viridis")(np.linspace(0, 0.95, len(self.sizes)))
        for axes, what, curves in zip(panels, ("size", "change"), (self.sizes, self.changes), strict=True):
            for colour, (name, values) in zip(colours, curves.items(), strict=True):
                style = "--" if f"{what} of {name}" in self.failures else "-"
                axes.plot(self.widths, values, style, marker="o", markersize=3, color=colour, label=name)
            axes.set(xscale="log", yscale="log", xlabel="width", ylabel=f"{what} of the output (root mean square)")
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
    """Train a language model of each width for a few steps on one batch and measure every matrix's output.

    A wrong power shows as an exponent of one half or one; what is left of a right one is the smallest widths' noise.

    Args:
        structure: spelling of the attention.
        widths: at least two, ascending; multiples of `head_dim`.
        head_dim: width of a head, the same at every width.
        layers: blocks.
        steps: steps, after which to measure.
        learning_rate: peak rate at the smallest width.
        mup: whether rates are muP's or one for all.
        tolerance: largest exponent that passes.
        seeds: initialisations to average over.

    Raises:
        ValueError: fewer than two widths, or one that is no multiple of `head_dim`.
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
        numbers = np.array([[one[name] for one in row] for row in measured])  # (widths, seeds, 2)
        # The geometric mean over initialisations, since a power is fitted; what is exactly zero has no logarithm.
        averages = np.exp(np.log(np.maximum(numbers, _NOTHING)).mean(axis=1))
        sizes[name], changes[name] = (tuple(column) for column in averages.T.tolist())
    return CoordinateCheck(structure, mup, tuple(widths), sizes, changes, tolerance)


def _measure(
    structure: str, width: int, head_dim: int, layers: int, config: TrainConfig, seed: int
) -> dict[str, tuple[float, float]]:
    """Size and change of every matrix's output after the last step."""
    from structattn.models import LanguageModel, LanguageModelConfig

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = {"layers": layers, "dim": width, "heads": width // head_dim, "context_length": _LENGTH}
        model = LanguageModel(LanguageModelConfig(**sizes, attention=structure, vocab_size=_VOCABULARY))
        start = copy.deepcopy(model)
        # The same batch at every width: a pattern that repeats, so that there is something to learn.
        pattern = torch.randint(_VOCABULARY, (_BATCH, _PATTERN), generator=torch.Generator().manual_seed(seed))
        tokens = pattern.repeat(1, _LENGTH // _PATTERN)
        optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=config.betas)
        for _ in range(config.steps or 0):
            optimizer.zero_grad()
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
        return _compare(model, start, tokens)


@torch.no_grad()
def _compare(model: LanguageModel, start: LanguageModel, tokens: Tensor) -> dict[str, tuple[float, float]]:
    """Size of every matrix's output, and of its difference from what `start` makes of the same input."""
    found: dict[str, tuple[float, float]] = {}
    at_start = dict(start.named_modules())

    def measure(name: str, output: Tensor, before: Tensor) -> None:
        found[name] = (_size(output), _size(output - before))

    def watch(name: str, path: str) -> Any:
        return lambda module, inputs, output: measure(name, output, at_start[path](*inputs))

    def watch_features(name: str, path: str, matrix: Structure) -> Any:
        # Attention takes from a structured matrix what suits the call, but its two feature maps are always there.
        # Norms make their scale free, so they are compared at size one.
        def hook(attention: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            before = cast("Structure", at_start[path])
            measure(f"left {name}", _unit(matrix.left(*inputs)), _unit(before.left(*inputs)))
            measure(f"right {name}", _unit(matrix.right(*inputs)), _unit(before.right(*inputs)))

        return hook

    with contextlib.ExitStack() as hooks:
        for path, module in model.named_modules():
            name = _short(path)
            if isinstance(module, (nn.Linear, nn.Embedding)):
                hooks.callback(module.register_forward_hook(watch(name, path)).remove)
            elif isinstance(module, Structure):
                attention = model.get_submodule(path.rpartition(".")[0])
                hooks.callback(attention.register_forward_pre_hook(watch_features(name, path, module)).remove)
        model(tokens)
    return found


def _short(path: str) -> str:
    """`q_proj 1` for `backbone.blocks.0.attention.q_proj`."""
    parts = path.split(".")
    numbers = [int(part) + 1 for part in parts if part.isdigit()]
    return " ".join([parts[-1], *map(str, numbers)])


def _unit(output: Tensor) -> Tensor:
    return output / _size(output)


def _size(output: Tensor) -> float:
    return output.square().mean().sqrt().item()
