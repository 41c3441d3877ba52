"""Hierarchies that hypothesis draws."""

from __future__ import annotations

from hypothesis import strategies as st

from structattn.ops import Hierarchy


@st.composite
def drawn_hierarchies(draw: st.DrawFn, *, with_sinks: bool = False) -> tuple[Hierarchy, int]:
    """Draw a hierarchy, by block or window, and a fitting value width.

    Levels are in keys alone or in values too.
    """
    levels = draw(st.integers(1, 4))
    reach: dict[str, tuple[int | None, ...]] = {}
    if draw(st.booleans()):
        finite = sorted(draw(st.sets(st.integers(1, 90), min_size=levels, max_size=levels)), reverse=True)
        reach["windows"] = (draw(st.sampled_from([None, finite[0]])), *finite[1:])
    else:
        sizes = [draw(st.sampled_from([2, 3, 4, 8]))]
        for _ in range(levels - 2):
            sizes.append(sizes[-1] * draw(st.sampled_from([2, 3, 4])))
        reach["block_sizes"] = (None, *reversed(sizes[: levels - 1]))
    ranks = draw(st.lists(st.integers(1, 9), min_size=levels, max_size=levels))
    gains = draw(st.sampled_from([None, "mean", (1.0, -0.5, 0.0, 2.0)[:levels]]))
    value_ranks = draw(st.none() | st.lists(st.integers(0, 7), min_size=levels, max_size=levels).filter(any))
    width = draw(st.integers(1, 20)) if value_ranks is None else sum(value_ranks)
    smallest = reach.get("windows", (None,))[-1]
    sinks = draw(st.integers(0, min(smallest - 1, 9))) if with_sinks and smallest is not None else 0
    return Hierarchy(ranks, gains=gains, value_ranks=value_ranks, sinks=sinks, **reach), width
