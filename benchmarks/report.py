"""Render a benchmark's JSON as a Markdown table and a plot: `python -m benchmarks.report FILE.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import cpu_page, sweep_plot
from benchmarks.gpu import pages
from benchmarks.output import table

_KERNELS = {
    "forward_kernel": "Forward",
    "query_grad_kernel": "Gradient of queries",
    "key_grad_kernel": "Gradient of keys and values",
    "share_kernel": "Decode",
}


def render(path: Path) -> None:
    """Write a benchmark's page and plot beside its JSON.

    CPUs share a page.
    """
    result = json.loads(path.read_text())
    if "part" in result:
        pages.render(result, path)
        return
    if "limits" in result:
        path.with_suffix(".md").write_text(compiled_markdown(result))
        return
    sweep_plot.draw(result["rows"], path.with_suffix(".svg"))
    cpu_page.render(path.parent)


def compiled_markdown(result: dict[str, Any]) -> str:
    """Return the page on compiled kernels, a table per kernel and rank."""
    lines = [
        "# The GPU kernels as compiled",
        "",
        f"Compiled by Triton {result['triton']} and its ptxas without a card, so no speed is measured. Commit "
        f"{result['commit'][:12]}, {result['time']}.",
        "",
        "All calls are causal, in bfloat16, with `r = dv` (values of at most 256 dimensions). A row is a choice of "
        "blocks: queries by keys (decode: keys alone), warps, stages. A cell has the registers per thread (255 is the "
        "most), the bytes per thread that spilled out of registers, if any, and the KiB of shared memory per block. "
        "The KiB are struck out if the card has fewer. Tuning times all choices; without tuning the first one is used.",
    ]
    for capability, limit in result["limits"].items():
        rows = [row for row in result["rows"] if str(row["capability"]) == capability and row["kernel"] in _KERNELS]
        products = ", ".join(sorted({f"`{row['products']}`" for row in rows}))
        lines += ["", f"## Compute capability {int(capability) / 10}: {limit / 1024:.0f} KiB, products by {products}"]
        for kernel in _KERNELS:
            mine = [row for row in rows if row["kernel"] == kernel]
            for rank in sorted({row["rank"] for row in mine}):
                lines += ["", f"{_KERNELS[kernel]}, r = {rank}:", "", *_compiled_table(mine, rank, limit)]
    return "\n".join(lines) + "\n"


def _compiled_table(rows: list[dict[str, Any]], rank: int, limit: int) -> list[str]:
    cells = {(row["blocks"], row["hierarchy"]): row for row in rows if row["rank"] == rank}
    hierarchies = list(dict.fromkeys(hierarchy for _, hierarchy in cells))

    def row(blocks: str) -> list[str]:
        found = [cells.get((blocks, hierarchy)) for hierarchy in hierarchies]
        return [blocks, *(_compiled_cell(cell, limit) if cell else "" for cell in found)]

    header = ["blocks", *(f"`{hierarchy}`".replace("|", ",") for hierarchy in hierarchies)]
    return table(header, [row(blocks) for blocks in dict.fromkeys(blocks for blocks, _ in cells)])


def _compiled_cell(row: dict[str, Any], limit: int) -> str:
    shared = f"{row['shared'] / 1024:.0f} KiB"
    spilled = f"{row['spilled']} spilled; " if row["spilled"] else ""
    return f"{row['registers']}; {spilled}{shared if row['shared'] <= limit else f'~~{shared}~~'}"


if __name__ == "__main__":
    render(Path(sys.argv[1]))
