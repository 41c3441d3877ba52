"""The coordinate check: do activations keep their size as the width grows, as muP promises?

Models of growing width take a few steps on one batch. Under muP the size of what every layer puts out after them
does not depend on the width; where one rate or one start is wrong, it grows or shrinks as a power of the width. The
check fits that power (Yang et al., *Tensor Programs V*, 2022, appendix D).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from structattn import checks
from structattn.training.config import TrainConfig
from structattn.training.mup import parameter_groups

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from structattn.models import LanguageModel

_VOCABULARY = 96
_BATCH, _LENGTH = 8, 64


@dataclass(frozen=True)
class CoordinateCheck:
    """Sizes of activations against width, and the verdict.

    Attributes:
        structure: the attention structure.
        mup: whether rates were muP's.
        widths: model widths, ascending.
        sizes: root mean square of each layer's output after the last step, one for each width, by the layer's name.
        slopes: fitted exponent of the size as a power of the width, by the layer's name.
        tolerance: largest slope, up or down, that passes.
    """

    structure: str
    mup: bool
    widths: tuple[int, ...]
    sizes: dict[str, tuple[float, ...]]
    slopes: dict[str, float]
    tolerance: float

    @property
    def failures(self) -> list[str]:
        """Layers whose size depends on the width, worst first."""
        failed = [name for name, slope in self.slopes.items() if not abs(slope) <= self.tolerance]
        return sorted(failed, key=lambda name: -abs(self.slopes[name]))

    @property
    def passed(self) -> bool:
        """Whether no layer's size depends on the width."""
        return not self.failures

    @property
    def verdict(self) -> str:
        """One line: pass or fail, and why."""
        parametrisation = "muP" if self.mup else "standard parametrisation"
        worst = max(self.slopes, key=lambda name: abs(self.slopes[name]))
        shown = self.failures or [worst]
        slopes = ", ".join(f"{name} {self.slopes[name]:+.2f}" for name in shown)
        outcome = "pass, largest slope" if self.passed else f"FAIL, slopes beyond {self.tolerance:g}:"
        return f"{self.structure}, {parametrisation}: {outcome} {slopes}"

    def plot(self) -> Figure:
        """Size against width, one line for each layer, both axes logarithmic.

        Raises:
            ImportError: without matplotlib, naming the extra that brings it.
        """
        pyplot = checks.require("matplotlib.pyplot", "plot")
        figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
        colours = pyplot.get_cmap("viridis")(np.linspace(0, 0.9, len(self.sizes)))
        for colour, (name, sizes) in zip(colours, self.sizes.items(), strict=True):
            style = "--" if name in self.failures else "-"
            axes.plot(self.widths, sizes, style, marker="o", color=colour, label=f"{name} ({self.slopes[name]:+.2f})")
        axes.set(xscale="log", yscale="log", xlabel="width", ylabel="size of the output (root mean square)")
        axes.set_xticks(self.widths, [str(width) for width in self.widths])
        axes.minorticks_off()
        axes.set_title(self.verdict, fontsize="small", wrap=True)
        axes.legend(fontsize="x-small", title="layer (slope)", loc="center left", bbox_to_anchor=(1.0, 0.5))
        return figure


def check_coordinates(
    structure: str = "standard",
    *,
    widths: Sequence[int] = (64, 128, 256, 512),
    head_dim: int = 32,
    layers: int = 2,
    steps: int = 5,
    learning_rate: float = 5e-3,
    mup: bool = True,
    tolerance: float = 0.2,
    seeds: int = 2,
) -> CoordinateCheck:
    """Train a language model of each width for a few steps on one batch and measure every layer's output.

    Args:
        structure: spelling of the attention.
        widths: at least two, ascending; multiples of `head_dim`.
        head_dim: width of a head, the same at every width.
        layers: blocks.
        steps: steps at a constant rate.
        learning_rate: the rate at the smallest width.
        mup: whether rates are muP's or one for all.
        tolerance: largest slope that passes.
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
    columns = [
        _average(_sizes(structure, width, head_dim, layers, config, seed) for seed in range(seeds)) for width in widths
    ]
    sizes = {name: tuple(column[name] for column in columns) for name in columns[0]}
    slopes = {name: _slope(widths, values) for name, values in sizes.items()}
    return CoordinateCheck(structure, mup, tuple(widths), sizes, slopes, tolerance)


def _sizes(structure: str, width: int, head_dim: int, layers: int, config: TrainConfig, seed: int) -> dict[str, float]:
    """Root mean square of every layer's output after the last step."""
    from structattn.models import LanguageModel, LanguageModelConfig

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LanguageModel(
            LanguageModelConfig(
                layers=layers,
                dim=width,
                heads=width // head_dim,
                context_length=_LENGTH,
                attention=structure,
                vocab_size=_VOCABULARY,
            )
        )
        # The same batch at every width: a pattern that repeats, so that there is something to learn.
        pattern = torch.randint(_VOCABULARY, (_BATCH, 16), generator=torch.Generator().manual_seed(seed))
        tokens = pattern.repeat(1, _LENGTH // 16)
        optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=config.betas)
        for _ in range(config.steps or 0):
            optimizer.zero_grad()
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
        with torch.no_grad(), _recorded(model) as outputs:
            model(tokens)
    return {name: output.square().mean().sqrt().item() for name, output in outputs.items()}


@contextlib.contextmanager
def _recorded(model: LanguageModel) -> Iterator[dict[str, Tensor]]:
    """The output of every layer of the calls made inside, by the layer's name."""
    outputs: dict[str, Tensor] = {}
    watched: dict[str, nn.Module] = {"embedding": model.embedding}
    for index, block in enumerate(model.backbone.layers, start=1):
        watched |= {f"attention {index}": block.attention, f"mlp {index}": block.mlp}
    watched["head"] = model.head

    def keep(name: str) -> Any:
        return lambda module, inputs, output: outputs.__setitem__(name, output)

    handles = [module.register_forward_hook(keep(name)) for name, module in watched.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _average(columns: Any) -> dict[str, float]:
    """Geometric mean over initialisations: sizes are fitted as powers."""
    listed = list(columns)
    return {name: math.exp(sum(math.log(column[name]) for column in listed) / len(listed)) for name in listed[0]}


def _slope(widths: Sequence[int], sizes: Sequence[float]) -> float:
    """Least-squares exponent of `sizes` as a power of `widths`."""
    return float(np.polyfit(np.log(widths), np.log(sizes), 1)[0])
