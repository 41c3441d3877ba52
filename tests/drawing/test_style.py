"""The style of figures, and maps of pairs."""

import numpy as np
import pytest

from structattn.drawing.pairs import draw_pair_widths, sampled_positions
from structattn.drawing.style import new_figure, pens


def test_a_structure_is_drawn_alike_everywhere():
    drawn = pens([f"mlr:{rank}" for rank in range(1, 20)] + ["standard"])
    assert len({(pen.colour, str(pen.dash)) for pen in drawn.values()}) >= 18
    assert drawn["standard"].colour == pens(["btt", "standard"])["standard"].colour


@pytest.mark.parametrize(("length", "cells"), [(1, 1), (512, 512), (1000, 512), (4096, 512)])
def test_positions_of_a_map_are_even(length, cells):
    positions = sampled_positions(length)
    assert len(positions) == cells
    assert positions[0] == 0
    assert length - positions[-1] <= -(-length // cells)
    assert (np.diff(positions) > 0).all()


def test_a_map_spans_all_positions():
    pytest.importorskip("matplotlib")
    widths = np.array([[4, 2], [2, 4]])
    image = draw_pair_widths(new_figure(2, 2).add_subplot(), widths, 2000, most=8)
    assert list(image.get_extent()) == [0, 2000, 2000, 0]
    assert image.get_clim() == (0, 8)
    assert np.array_equal(image.get_array(), widths)
