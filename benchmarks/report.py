"""Render a benchmark's JSON as a Markdown table and a plot: `python -m benchmarks.report FILE.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import cpu_page, machine
from benchmarks.output import table, table_by_length

_KERNELS = {
    "forward_kernel": "Forward",
    "query_grad_kernel": "Gradient of queries",
    "key_grad_kernel": "Gradient of keys and values",
    "share_kernel": "Decode",
}


def render(path: Path) -> None:
    """Write the page and the plot of a benchmark beside its JSON; CPUs share a page."""
    result = json.loads(path.read_text())
    if "limits" in result:
        path.with_suffix(".md").write_text(compiled_markdown(result))
        return
    if any(row["sweep"] for row in result["rows"]):
        plot(result, path.with_suffix(".svg"))
    if "card" in result:
        path.with_suffix(".md").write_text(gpu_markdown(result, path))
    else:
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


def gpu_markdown(result: dict[str, Any], path: Path) -> str:
    """Return the page on a CUDA card.

    A table for each operation and width.
    """
    lines = [
        "# MLR attention on a GPU",
        "",
        f"{result['card']} (compute capability {result['capability']}, {result['memory_gb']:.0f} GB); torch "
        f"{result['torch']}, CUDA {result['cuda']}, Triton {result['triton']}, commit {result['commit'][:12]}, "
        f"{result['time']}.",
        "",
        "All calls are causal, in bfloat16. All heads together have 1024 dimensions. A batch has 16k tokens, or one "
        "row if that is longer. P32 has the level ranks `32|8|6|4|4|4|4|2` (doubled at `r = 128`), 8x8 eight equal "
        "ranks, flat one level. Each cell: ms; TFLOP/s over the visible pairs, and their share of the roof; MB beyond "
        "the inputs; the time of SDPA flash over that of the variant. The roof is a square matrix product in PyTorch: "
        f"{result['roof']['bfloat16'] / 1e12:.0f} TFLOP/s.",
    ]
    groups = dict.fromkeys((row["operation"], row["rank"]) for row in result["rows"])
    for operation, rank in groups:
        rows = [row for row in result["rows"] if (row["operation"], row["rank"]) == (operation, rank)]
        lines += ["", f"## {operation.capitalize()}, r = dv = {rank}", ""]
        lines += table_by_length(rows, lambda row, sdpa: _card_cell(row, sdpa, result["roof"]), "SDPA flash")
    if any(row["sweep"] for row in result["rows"]):
        lines += ["", f"![Time and memory against T]({path.with_suffix('.svg').name})"]
    return "\n".join(lines) + "\n"


def _card_cell(row: dict[str, Any], sdpa: dict[str, Any], roof: dict[str, float]) -> str:
    if "samples_ms" not in row:
        return str(row["reason"])
    rate = row["flops"] / (_median(row) / 1e3)
    ratio = f"; {_median(sdpa) / _median(row):.2f}" if "samples_ms" in sdpa else ""
    return f"{_median(row):.3g}; {rate / 1e12:.3g}, {rate / roof[row['dtype']]:.0%}; {row['peak_mb']:.0f}{ratio}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot time and memory against T, all axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time_axes, memory_axes) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    rows = [row for row in result["rows"] if row["sweep"] and "samples_ms" in row]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        points = [row for row in rows if row["variant"] == variant]
        lengths = [row["length"] for row in points]
        time_axes.plot(lengths, [_median(row) for row in points], marker="o", markersize=3, label=variant)
        if all("peak_mb" in row for row in points):
            memory_axes.plot(lengths, [max(row["peak_mb"], 0.1) for row in points], marker="o", markersize=3)
        else:
            memory_axes.plot([], [])
    for axes, label in (
        (time_axes, f"ms, forward, {rows[0]['dtype']}" if rows else "ms"),
        (memory_axes, "MB beyond the inputs"),
    ):
        axes.set(xscale="log", yscale="log", xlabel="T", ylabel=label)
        axes.set_xticks(sorted({row["length"] for row in rows}))
        axes.set_xticklabels([f"{length // 1024}k" for length in sorted({row["length"] for row in rows})])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    time_axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def _median(row: dict[str, Any]) -> float:
    return machine.median(row["samples_ms"])


if __name__ == "__main__":
    render(Path(sys.argv[1]))
