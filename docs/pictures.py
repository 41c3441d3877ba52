"""Draw the README's picture, how many dimensions each pair of tokens gets: `python docs/pictures.py` writes it."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from structattn import Hierarchy

LENGTH = 64
RANKS = (8, 8, 8, 8)


def widths(name: str) -> np.ndarray:
    """Return the dimensions that each visible pair multiplies.

    NaN above the diagonal and beyond a window.
    """
    at = torch.arange(LENGTH)
    i, j = at[:, None], at[None, :]
    if name == "mlr":
        hierarchy = Hierarchy.dyadic(RANKS, LENGTH)
        width = torch.tensor(hierarchy.prefix_ranks)[hierarchy.depth(i, j) - 1].double()
    else:
        width = torch.full((LENGTH, LENGTH), float(sum(RANKS)), dtype=torch.float64)
    if name == "window":
        width[i - j >= LENGTH // 4] = torch.nan
    width[j > i] = torch.nan
    return width.numpy()


def main() -> None:
    """Draw three panels with one colour scale."""
    titles = {
        "standard": f"standard: {sum(RANKS)} for every pair",
        "window": f"sliding window: {sum(RANKS)} near, nothing far",
        "mlr": f"MLR {'|'.join(map(str, RANKS))}: {sum(RANKS)} near, {RANKS[0]} far",
    }
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.8), layout="constrained", sharey=True)
    for ax, (name, title) in zip(axes, titles.items(), strict=True):
        image = ax.imshow(widths(name), cmap="YlGnBu", vmin=0, vmax=sum(RANKS), interpolation="nearest")
        ax.set_title(title, fontsize=11)
        ax.set(xticks=[0, LENGTH - 1], yticks=[0, LENGTH - 1], xticklabels=["1", "T"], yticklabels=["1", "T"])
        ax.set_xlabel("key")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("query")
    figure.colorbar(image, ax=axes, label="dimensions of q · k", ticks=[0, 8, 16, 24, 32])
    folder = Path(__file__).parent / "pictures"
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / "score.png", dpi=130)


if __name__ == "__main__":
    main()
