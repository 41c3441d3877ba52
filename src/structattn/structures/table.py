"""Tabulate size and cost of structures as Table 1 of arXiv 2509.07963."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from structattn.structures.base import Structure

HEADER = ("structure", "parameters", "rank bound", "feature width", "FLOPs of M y")


@dataclass(frozen=True)
class StructureCost:
    """Size and cost of one structure.

    Attributes:
        structure: Its constructor's call.
        parameters: Of all heads.
        rank_bound: Of one matrix.
        feature_dim: Width of the dot product in attention, per head.
        flops: Of `M y` for one vector and all heads; a multiply-add is 2.
    """

    structure: str
    parameters: int
    rank_bound: int
    feature_dim: int
    flops: int


@dataclass(frozen=True)
class Summary:
    """Rows of :func:`summary`.

    `str()` gives plain text, :meth:`markdown` a Markdown table.
    """

    rows: tuple[StructureCost, ...]

    def __str__(self) -> str:
        lines = [HEADER, *self._cells()]
        widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
        return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)

    def markdown(self) -> str:
        """Return the table in Markdown."""
        lines = [HEADER, ("---", *["---:"] * (len(HEADER) - 1))]
        lines += [(f"`{name}`", *numbers) for name, *numbers in self._cells()]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def _cells(self) -> list[tuple[str, ...]]:
        return [(row.structure, *(f"{number:,}" for number in astuple(row)[1:])) for row in self.rows]


def summary(*structures: Structure) -> Summary:
    """Return a table with one row for each structure, in order.

    Raises:
        TypeError: an argument is not a `Structure`.
    """
    for position, structure in enumerate(structures, start=1):
        if not isinstance(structure, Structure):
            raise TypeError(f"structures must be Structure objects, got {type(structure).__name__} at place {position}")
    costs = (
        StructureCost(each.describe(), each.num_parameters, each.rank_bound, each.feature_dim, each.flops)
        for each in structures
    )
    return Summary(tuple(costs))
