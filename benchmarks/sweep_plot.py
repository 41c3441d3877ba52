"""Plot a sweep over lengths."""

from __future__ import annotations

from pathlib import Path

from benchmarks import machine
from benchmarks.output import Row


def draw(rows: list[Row], path: Path) -> bool:
    """Plot a sweep's time and memory against T; return False without rows.

    All axes are logarithmic.
    """
    rows = [row for row in rows if row.get("sweep") and "samples_ms" in row]
    if not rows:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time_axes, memory_axes) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for variant in dict.fromkeys(row["variant"] for row in rows):
        points = [row for row in rows if row["variant"] == variant]
        lengths = [row["length"] for row in points]
        time_axes.plot(
            lengths, [machine.median(row["samples_ms"]) for row in points], marker="o", markersize=3, label=variant
        )
        if all("peak_mb" in row for row in points):
            memory_axes.plot(lengths, [max(row["peak_mb"], 0.1) for row in points], marker="o", markersize=3)
        else:
            memory_axes.plot([], [])
    for axes, label in (
        (time_axes, f"ms, forward, {rows[0]['dtype']}"),
        (memory_axes, "MB beyond the inputs"),
    ):
        axes.set(xscale="log", yscale="log", xlabel="T", ylabel=label)
        axes.set_xticks(sorted({row["length"] for row in rows}))
        axes.set_xticklabels([f"{length // 1024}k" for length in sorted({row["length"] for row in rows})])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    time_axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    return True
