"""Draw the pictures of README and pages, how many dimensions each pair of tokens gets: `python docs/pictures.py`."""

import itertools
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from structattn import Hierarchy

LENGTH = 64
FOLDER = Path(__file__).parent / "pictures"


def widths(hierarchy: Hierarchy, ranks: tuple[int, ...]) -> np.ndarray:
    """Return the dimensions that each visible pair of a causal row gets; NaN for the other pairs."""
    at = torch.arange(LENGTH)
    i, j = at[:, None], at[None, :]
    prefixes = torch.tensor((torch.nan, *itertools.accumulate(ranks)), dtype=torch.float64)
    return prefixes[hierarchy.depth(i, j)].masked_fill(j > i, torch.nan).numpy()


def draw(file: str, panels: list[tuple[str, Hierarchy, tuple[int, ...]]], label: str) -> None:
    """Draw panels (title, hierarchy, ranks of its levels) with one colour scale."""
    figure, axes = plt.subplots(1, len(panels), figsize=(10.5, 3.8), layout="constrained", sharey=True)
    most = max(sum(ranks) for _, _, ranks in panels)
    image: Any = None
    for ax, (title, hierarchy, ranks) in zip(axes, panels, strict=True):
        image = ax.imshow(widths(hierarchy, ranks), cmap="YlGnBu", vmin=0, vmax=most, interpolation="nearest")
        ax.set_title(title, fontsize=11)
        ax.set(xticks=[0, LENGTH - 1], yticks=[0, LENGTH - 1], xticklabels=["1", "T"], yticklabels=["1", "T"])
        ax.set_xlabel("key")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("query")
    figure.colorbar(image, ax=axes, label=label, ticks=[0, 8, 16, 24, 32])
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / file, dpi=130)


def main() -> None:
    """Draw both pictures."""
    flat, window = Hierarchy.flat(32), Hierarchy((32,), windows=(LENGTH // 4,))
    blocks = Hierarchy.dyadic((8, 8, 8, 8), LENGTH)
    levels = Hierarchy((8, 8, 8, 8), windows=(None, 32, 16, 8), value_ranks=(8, 8, 8, 8))
    near = Hierarchy((8, 8, 16), windows=(None, 24, 8), value_ranks=(8, 24, 0))
    draw(
        "score.png",
        [
            ("standard: 32 for every pair", flat, flat.ranks),
            ("sliding window: 32 near, nothing far", window, window.ranks),
            ("levels 8|8|8|8: 32 near, 8 far", levels, levels.ranks),
        ],
        "dimensions of q, k and v",
    )
    draw(
        "levels.png",
        [
            ("keys 8|8|8|8, blocks 64, 32, 16, 8", blocks, blocks.ranks),
            ("keys 8|8|16, windows all, 24, 8", near, near.ranks),
            ("values 8|24|0, the same windows", near, near.value_widths()),
        ],
        "dimensions of the pair",
    )


if __name__ == "__main__":
    main()
