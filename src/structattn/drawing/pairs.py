"""Map the dimensions that each pair of positions gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from structattn import checks
from structattn.drawing.style import MAP

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

_MOST_CELLS = 512


def sampled_positions(length: int) -> NDArray[np.int64]:
    """Return the positions of a map's cells: at most 512, spread evenly."""
    cells = min(length, _MOST_CELLS)
    return np.arange(cells, dtype=np.int64) * length // cells


def draw_pair_widths(axes: Axes, widths: ArrayLike, length: int, most: int | None = None) -> AxesImage:
    """Draw a map of the dot product's dimensions, query by key.

    Args:
        axes: to draw on.
        widths: `(C, C)`, dimensions between `sampled_positions(length)`. Masked cells stay empty.
        length: positions that the map spans.
        most: dimensions at the end of the colour scale; by default the largest of `widths`.
    """
    colours: Any = checks.require("matplotlib", "plot").colormaps[MAP].with_extremes(bad="none")
    edges = (0, length, length, 0)
    return axes.imshow(widths, extent=edges, cmap=colours, vmin=0, vmax=most, interpolation="nearest")
