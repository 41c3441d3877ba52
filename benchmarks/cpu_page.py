"""Write the page on attention on CPUs: a section for each JSON of `benchmarks.attention` in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import machine, roofs
from benchmarks.output import Row, describe_machine, table, table_by_length
from structattn.reporting.terminal import print_table, terminal_table

PAGE = "attention-cpu"
"""Name of the page, and start of the names of its JSON files."""
VARIANTS = ("P32", "8x8", "windows", "default", "flat")
_Result = Mapping[str, Any]
"""A JSON: a machine and a set of instructions."""
_LEGEND = (
    "All calls are causal, with one batch row and 8 heads; `r = dv = 64` unless the case names another `dv`. P32 has "
    "the level ranks `32|8|6|4|4|4|4|2`, 8x8 eight ranks of 8, both by block. `windows` is `16|16|32v@w512|128`, in "
    "keys and values. `default` is plain `mlr`: equal ranks and windows that halve from half of the length, in keys "
    "and values; 8 levels, or 5 at `T = 64`. `flat` is one level of 64. SDPA is PyTorch's own attention.",
    "Times are medians in ms; every round times each variant once. In parentheses: the time of SDPA over that of the "
    "variant, and the share of the roof. The rate of a variant is the FLOPs of visible pairs over the time; backward "
    "computes the scores again, which counts.",
)
_ROOFS = (
    "The roof of products is the fastest multiply-add unit for the dtype, measured in registers on all threads, or "
    "PyTorch's product in cache if that was faster. The "
    "roof of decode is reading as many bytes as the variant must read, again and again, on all threads: the live keys "
    "and values of its levels. What fits a cache is read from there. Roofs are measured before and after the cases, "
    "and the higher one counts."
)


def render(folder: Path) -> None:
    """Write the page of all JSON files in `folder`."""
    (folder / f"{PAGE}.md").write_text(page(folder))


def page(folder: Path) -> str:
    """Return the page of all JSON files in `folder`: with roofs first, and native before held."""
    results = {path: json.loads(path.read_text()) for path in folder.glob(f"{PAGE}*.json")}

    def place(path: Path) -> tuple[bool, bool, str]:
        return "roofs" not in results[path], _held(results[path]) != "native", path.stem

    ordered = sorted(results, key=place)
    lines = ["# MLR attention on a CPU", "", "A section for each machine and set of instructions. " + _LEGEND[0], ""]
    lines += [_LEGEND[1]]
    for path in ordered:
        lines += ["", *_section(results[path], path)]
    return "\n".join(lines) + "\n"


def print_roofs(result: _Result, console: Console) -> None:
    """Print the machine's roofs."""
    print_table(terminal_table(["roof", "rate"], _roof_rows(result["roofs"]), title=result["cpu"]), console)


def print_cases(result: _Result, console: Console) -> None:
    """Print time, ratio and share of the roof of every case."""
    header, body = _cases(result)
    print_table(terminal_table(header, body), console)


def _section(result: _Result, path: Path) -> list[str]:
    title = result["cpu"] if _held(result) == "native" else f"{result['cpu']}, held to {_held(result)}"
    lines = [f"## {title}", "", describe_machine(result, load_after=result["load_average_after"][0]), ""]
    if "roofs" in result:
        lines += [*table(["roof", "rate"], _roof_rows(result["roofs"])), "", _ROOFS]
    else:
        rates = ", ".join(f"{name} {flops / 1e9:.0f} GFLOP/s" for name, flops in result["roof"].items())
        lines += [
            f"The roof here is a square matrix product of 1,024 in PyTorch ({rates}), also for decode, which waits for "
            "memory. It is not the most that this machine can do: shares of it exceed 100%."
        ]
    lines += ["", *table(*_cases(result))]
    if "roofs" in result:
        lines += [line for operation in ("forward", "forward + backward") for line in _limit(result, operation)]
    if any(row["sweep"] for row in result["rows"]):
        lines += ["", f"![Time and memory against T]({path.with_suffix('.svg').name})", "", *_sweep(result)]
    reasons = {f"{row['variant']}, {row['case']}: {row['reason']}" for row in result["rows"] if "reason" in row}
    return [*lines, *(f"\nNot measured: {reason}." for reason in sorted(reasons))]


def _held(result: _Result) -> str:
    """Return the instructions that a run was held to."""
    return str(result.get("held_to", "native"))


def _roof_rows(measured: Mapping[str, Any]) -> list[list[str]]:
    return [
        *(["multiply-add in registers, " + name, _flops(rate)] for name, rate in measured["units"].items()),
        *(
            [f"PyTorch's best product in cache, {name}", _flops(rate)]
            for name, rate in measured["product_in_cache"].items()
        ),
        [f"reading {roofs.LARGE // 2**20} MiB", f"{measured['memory'] / 1e9:.1f} GB/s"],
    ]


def _flops(rate: float) -> str:
    return f"{rate / 1e9:.0f} GFLOP/s"


def _limit(result: _Result, operation: str) -> list[str]:
    """Return lines on the most that float32 at `T = 4096` could gain.

    There are none without such a case.
    """
    case = f"float32 {operation}, T=4096"
    rows = {row["variant"]: row for row in result["rows"] if row["case"] == case and not row["sweep"]}
    if not {"SDPA", "flat", "windows"} <= {name for name, row in rows.items() if "samples_ms" in row}:
        return []
    shares = {name: share_of_roof(row, result) for name, row in rows.items() if "samples_ms" in row}
    sdpa, flat, windows = (shares[name] or 0.0 for name in ("SDPA", "flat", "windows"))
    return [
        "",
        f"*What limits {operation}.* At 4,096 tokens SDPA reaches {sdpa:.0%} of the roof, so that a kernel without any "
        f"loss would be {1 / sdpa:.1f} times as fast with one level. This one reaches {flat:.0%}. `windows` has "
        f"{rows['flat']['flops'] / rows['windows']['flops']:.1f} times fewer multiply-adds than one level and reaches "
        f"{windows:.0%}: softmax costs as much per pair, and short products load and store more for each multiply-add.",
    ]


def _cases(result: _Result) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of cases."""
    rows = [row for row in result["rows"] if not row["sweep"]]
    variants = [variant for variant in VARIANTS if any(row["variant"] == variant for row in rows)]
    body = []
    for case in dict.fromkeys(row["case"] for row in rows):
        found = {row["variant"]: row for row in rows if row["case"] == case}
        cells = [_cell(found[each], found["SDPA"], result) if each in found else "" for each in ("SDPA", *variants)]
        body.append([case, *cells])
    return ["case", "SDPA", *variants], body


def _cell(row: Row, sdpa: Row, result: _Result) -> str:
    if "samples_ms" not in row:
        return "-"
    is_sdpa = row["variant"] == "SDPA"
    ratio = "" if is_sdpa or "samples_ms" not in sdpa else f"{median(sdpa) / median(row):.2f}"
    share = share_of_roof(row, result)
    notes = "; ".join(filter(None, [ratio, "" if share is None else f"{share:.0%}"]))
    return f"{median(row):.2f} ({notes})" if notes else f"{median(row):.2f}"


def share_of_roof(row: Row, result: _Result) -> float | None:
    """Return a row's rate over its roof, or None without a roof."""
    seconds = median(row) / 1e3
    if "read_rate" in row:
        return float(row["bytes"] / seconds / row["read_rate"])
    roof = roofs.product_roof(result["roofs"], row["dtype"]) if "roofs" in result else result["roof"][row["dtype"]]
    return None if roof is None else float(row["flops"] / seconds / roof)


def _sweep(result: _Result) -> list[str]:
    """Return the lines on time and memory by length."""
    rows = [row for row in result["rows"] if row["sweep"]]
    rates = {
        row["length"]: row["flops"] / median(row) / 1e6
        for row in rows
        if row["variant"] == "P32" and "samples_ms" in row
    }
    return [
        "Forward in float32: ms, and in parentheses MB beyond the inputs.",
        "",
        *table_by_length(rows, lambda row, _: _point(row), "SDPA"),
        "",
        "GFLOP/s of P32 by `T`: " + ", ".join(f"{rate:.0f} at {length}" for length, rate in rates.items()) + ".",
    ]


def _point(row: Row) -> str:
    if "samples_ms" not in row:
        return "-"
    memory = f" ({row['peak_mb']:.0f})" if "peak_mb" in row else ""
    return f"{median(row):.2f}{memory}"


def median(row: Row) -> float:
    """Return the median of a row's samples, in ms."""
    return machine.median(row["samples_ms"])
