"""Render the JSON of a part as a page: `python -m benchmarks.report docs/results/gpu-PART.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import machine, sweep_plot
from benchmarks.output import Row, table
from structattn.drawing.style import new_figure, styled

REHEARSAL = "**A rehearsal on the CPU: no number below is of a card.**"


def head(document: dict[str, Any], title: str) -> list[str]:
    """Return the title, card, versions and commit, and what was not run."""
    lines = [
        f"# {title}",
        "",
        f"{document['card']} (compute capability {document['capability']}, {document['memory_gb']:.0f} GB); torch "
        f"{document['torch']}, CUDA {document['cuda']}, Triton {document['triton']}, commit {document['commit'][:12]}, "
        f"{document['time']}. The part took {document['seconds']:.0f} s.",
        "",
    ]
    if document["rehearsal"]:
        lines += [REHEARSAL, ""]
    if not document["finished"]:
        lines += ["The run was cut short.", ""]
    if document["not_run"]:
        lines += [f"Not run for want of time: {', '.join(document['not_run'])}.", ""]
    return lines


def foot(part: str) -> list[str]:
    """Return the last lines of a page."""
    return ["", f"Written by `python -m benchmarks.gpu {part}`.", ""]


def failures(rows: list[Row]) -> list[str]:
    """Return the lines on the rows that failed, with their inputs."""
    failed = [row for row in rows if "reason" in row]
    if not failed:
        return []
    lines = ["## What failed", ""]
    for row in failed:
        inputs = f" ({row['inputs']})" if "inputs" in row else ""
        variant = f", {row['variant']}" if "variant" in row else ""
        lines.append(f"- **{row['case']}{variant}**{inputs}: {row['reason']}")
    return [*lines, ""]


def correctness(document: dict[str, Any], path: Path) -> str:
    """Return the page on correctness."""
    rows = document["rows"]
    right = sum("reason" not in row for row in rows)
    lines = [
        *head(document, "The GPU kernels against the definition"),
        f"{right} of {len(rows)} cases agree with the definition in float64. A result may err at most twice as much as "
        "plain PyTorch does in the same dtype, plus two roundings. Each case is run twice and must give the same "
        "numbers. The error is the largest of output and gradients, as a share of what is allowed. Seconds are those "
        "of the first call, which compiles, and of the second. Several processes compile at the same time.",
        "",
        *failures(rows),
        "## All cases",
        "",
        *table(["case", "dtype", "blocks", "error", "first call, s", "second call, s"], map(_checked, rows)),
        "",
        *_compiled(rows),
        *foot("correctness"),
    ]
    return "\n".join(lines)


def _checked(row: Row) -> list[str]:
    if "results" not in row:
        return [row["case"], row["dtype"], str(row["blocks"]), "failed", "", ""]
    shares = [each["error"] / each["allowed"] for each in row["results"] if each["allowed"] and each["error"]]
    finite = all(each["error"] is not None for each in row["results"])
    error = f"{max(shares, default=0.0):.2f}" if finite else "not finite"
    error = f"**{error}**" if "reason" in row else error
    seconds = [f"{row[name]:.2f}" for name in ("first_seconds", "second_seconds")]
    return [row["case"], row["dtype"], str(row["blocks"]), error, *seconds]


def _compiled(rows: list[Row]) -> list[str]:
    """Return the section on how long kernels compiled."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for kernel in row.get("kernels", ()):
            found.setdefault(kernel["kernel"], []).append(kernel["seconds"])
    if not found:
        return []
    body = [[name, str(len(all_)), f"{sum(all_):.0f}", f"{max(all_):.1f}"] for name, all_ in sorted(found.items())]
    return ["## Compile times", "", *table(["kernel", "compiled", "seconds in all", "longest"], body), ""]


def timings(document: dict[str, Any], path: Path) -> str:
    """Return the page on timings; plot the sweep beside it."""
    rows = document["rows"]
    attention = [row for row in rows if row.get("kind") == "attention"]
    roof = next((row["flops_per_second"] for row in rows if row.get("kind") == "roof"), 0.0)
    lines = [
        *head(document, "MLR attention on a GPU"),
        "## Goals",
        "",
        "A speed is the least time of the rivals over that of MLR attention, medians of interleaved calls. Decode is "
        "timed as a CUDA graph, in which no launch counts.",
        "",
        *table(["goal", "asked", "measured", "met"], map(_goal, document["goals"])),
        "",
        *failures(rows),
        "## Attention",
        "",
        "Calls are causal, in bfloat16. All heads together have 1024 dimensions; decode has 32 query heads and 8 key "
        "heads. A batch has 16k tokens, or one row if that is longer. `flat` is one level, `windows` `32|32|64` with "
        "windows of 1024 and 256 in keys and values (`16|16|32` at `r = 64`), P32 `32|8|6|4|4|4|4|2` by block (doubled "
        "at `r = 128`), 8x8 eight equal ranks by block. Each cell: ms; TFLOP/s over the visible pairs, and their share "
        f"of a square matrix product's {roof / 1e12:.0f}; the time of SDPA flash over that of the variant. Decode has "
        "GB/s over the bytes that must be read.",
    ]
    for operation, rank in dict.fromkeys((row["operation"], row["rank"]) for row in attention):
        mine = [row for row in attention if (row["operation"], row["rank"]) == (operation, rank)]
        lines += ["", f"### {operation.capitalize()}, r = dv = {rank}", "", *_attention_table(mine, roof)]
    if sweep_plot.draw(attention, path.with_suffix(".svg")):
        lines += ["", f"![Time and memory against T]({path.with_suffix('.svg').name})"]
    return "\n".join([*lines, "", *_models(rows), *_tuning(rows), *foot("timings")])


def _goal(goal: Row) -> list[str]:
    asked = f"at least {goal['least']:g}" if goal["least"] is not None else f"at most {goal['most']:g}"
    measured = "not measured" if goal["measured"] is None else f"{goal['measured']:.2f}"
    return [goal["goal"], asked, measured, {True: "yes", False: "**no**", None: ""}[goal["met"]]]


def _attention_table(rows: list[Row], roof: float) -> list[str]:
    """Return a table by length and batch (rows) and variant (columns)."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    body = []
    for length, batch in dict.fromkeys((row["length"], row["rows"]) for row in rows):
        found = {row["variant"]: row for row in rows if (row["length"], row["rows"]) == (length, batch)}
        cells = [_cell(found[name], found, roof) if name in found else "" for name in variants]
        body.append([f"{length:,}" if batch is None else f"{length:,}, batch {batch}", *cells])
    return table(["T", *variants], body)


def _cell(row: Row, found: dict[str, Row], roof: float) -> str:
    if "samples_ms" not in row:
        return str(row["reason"])
    median = machine.median(row["samples_ms"])
    flash = found.get("SDPA flash, graph" if row["variant"].endswith(", graph") else "SDPA flash", {})
    ratio = f"; {machine.median(flash['samples_ms']) / median:.2f}" if "samples_ms" in flash else ""
    if "bytes" in row:
        return f"{median:.3g}; {row['bytes'] / median / 1e6:.0f} GB/s{ratio}"
    rate = row["flops"] / (median / 1e3)
    share = f", {rate / roof:.0%}" if roof else ""
    return f"{median:.3g}; {rate / 1e12:.3g}{share}{ratio}"


def _models(rows: list[Row]) -> list[str]:
    """Return the sections on whole models and their cache."""
    lines: list[str] = []
    for kind, title in (("training step", "A training step"), ("decoding", "Decoding a token")):
        mine = [row for row in rows if row.get("kind") == kind and "variant" in row]
        if not mine:
            continue
        sizes, first = mine[0]["sizes"], mine[0]
        lines += [
            f"## {title}",
            "",
            f"A model of {sizes['layers']} layers, width {sizes['dim']} and {sizes['heads']} heads; "
            f"{first['length']:,} tokens, {first['batch']} rows, bfloat16.",
            "",
            *table(
                ["attention", "ms", "MB beyond the weights", "waits per token", "graph breaks"], map(_model_row, mine)
            ),
            "",
        ]
    caches = [row for row in rows if row.get("kind") == "cache" and "live_bytes" in row]
    if caches:
        body = [[row["variant"], *(f"{row[name] / 2**20:.2f}" for name in ("live_bytes", "bytes"))] for row in caches]
        lines += [f"## The cache of a layer after {caches[0]['length']:,} tokens", ""]
        lines += [*table(["attention", "live, MiB", "with room for growth, MiB"], body), ""]
    return lines


def _model_row(row: Row) -> list[str]:
    time = f"{machine.median(row['samples_ms']):.2f}" if "samples_ms" in row else row.get("reason", "")
    peak = f"{row['peak_mb']:.0f}" if "peak_mb" in row else ""
    waits = f"{max(row['waits'].values()):g}" if "waits" in row else ""
    return [row["variant"], time, peak, waits, str(len(row["graph_breaks"])) if "graph_breaks" in row else ""]


def _tuning(rows: list[Row]) -> list[str]:
    """Return the sections on compile times and on tuned block sizes."""
    body = [
        [row["case"], row["variant"], f"{row['first_seconds']:.1f}", choice["kernel"], choice["chosen"]]
        for row in rows
        for choice in row.get("choices", ())
        if "first_seconds" in row
    ]
    head = ["case", "attention", "first call, s", "kernel", "chosen"]
    return [*_compiled(rows), *(["## Block sizes that tuning took", "", *table(head, body)] if body else [])]


def training(document: dict[str, Any], path: Path) -> str:
    """Return the page on training and generation; plot the losses' errors."""
    rows = document["rows"]
    trained = [row for row in rows if row.get("kind") == "training" and "losses" in row]
    wrote = [row for row in rows if row.get("kind") == "generation" and "tokens" in row]
    lines = [
        *head(document, "Training and generation: the card against the CPU"),
        "Each model takes the same steps from the same weights on the card in float32, and on the CPU in float32 (two "
        "kernels) and in float64, which is the truth. The card's loss may err at most twice as much as the CPU's so "
        "far. Then card and CPU continue a text greedily with the compressed cache. Their tokens may differ only where "
        "float64 sees a tie.",
        "",
        *failures(rows),
        *table(
            ["model", "steps", "loss, first and last", "largest error of the card", "of the CPU"],
            map(_trained, trained),
        ),
        "",
        *table(["model", "tokens", "alike"], map(_wrote, wrote)),
    ]
    if trained:
        _draw_errors(trained, path.with_suffix(".svg"))
        lines += ["", f"![Error of the loss by step]({path.with_suffix('.svg').name})"]
    return "\n".join([*lines, *foot("training")])


def _trained(row: Row) -> list[str]:
    card = max(abs(a - b) for a, b in zip(row["losses"], row["exact"], strict=True))
    losses = f"{row['losses'][0]:.3f}, {row['losses'][-1]:.3f}"
    return [row["case"], str(len(row["losses"])), losses, f"{card:.1e}", f"{max(_cpu_errors(row)):.1e}"]


def _cpu_errors(row: Row) -> list[float]:
    return [max(abs(run[at] - exact) for run in row["cpu"]) for at, exact in enumerate(row["exact"])]


def _wrote(row: Row) -> list[str]:
    alike = sum(a == b for a, b in zip(row["tokens"], row["cpu_tokens"], strict=True))
    return [row["case"], str(len(row["tokens"])), str(alike)]


def _draw_errors(rows: list[Row], path: Path) -> None:
    """Plot each step's error of the loss, on card and CPU.

    The CPU's is in float32.
    """
    with styled():
        figure = new_figure(6.2, 3.4)
        axes = figure.add_subplot()
        for index, row in enumerate(rows):
            errors = [abs(a - b) for a, b in zip(row["losses"], row["exact"], strict=True)]
            axes.plot(errors, color=f"C{index}", label=row["case"])
            axes.plot(_cpu_errors(row), ":", color=f"C{index}")
        axes.set(yscale="log", xlabel="step", ylabel="error of the loss (dotted: CPU)")
        axes.legend(frameon=False, fontsize="small")
        figure.savefig(path, metadata={"Date": None})


def language(document: dict[str, Any], path: Path) -> str:
    """Return the page on the comparison of language models; plot the losses."""
    rows = document["rows"]
    evaluations = [row for row in rows if row.get("kind") == "evaluation"]
    finals = [row for row in rows if row.get("kind") == "final"]
    lines = [
        *head(document, "Language models on a GPU, at equal steps"),
        "Six layers, width 512, 8 heads of 64, rotary positions, a context of 2,048 bytes, batches of 16, bfloat16 "
        "products, one seed. All structures do equally many steps on the same data in the same order. Losses are those "
        "of the held-out part.",
        "",
        *failures(rows),
        *table(["structure", "steps", "nats per byte", "bits per byte", "seconds", "tokens/s"], map(_final, finals)),
    ]
    if evaluations:
        _draw_losses(evaluations, path.with_suffix(".svg"))
        lines += ["", f"![Held-out loss by step]({path.with_suffix('.svg').name})"]
    return "\n".join([*lines, *foot("language --data FOLDER")])


def _final(row: Row) -> list[str]:
    losses = [f"{row[name]:.4f}" for name in ("nats_per_byte", "bits_per_byte")]
    return [
        f"`{row['case']}`",
        f"{row['step']:,}",
        *losses,
        f"{row['seconds']:.0f}",
        f"{row['tokens_per_second']:,.0f}",
    ]


def _draw_losses(rows: list[Row], path: Path) -> None:
    with styled():
        figure = new_figure(6.2, 3.4)
        axes = figure.add_subplot()
        for name in dict.fromkeys(row["case"] for row in rows):
            mine = [row for row in rows if row["case"] == name]
            axes.plot([row["step"] for row in mine], [row["nats_per_byte"] for row in mine], label=name)
        axes.set(xlabel="step", ylabel="nats per byte")
        axes.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})


PAGES = {"correctness": correctness, "timings": timings, "training": training, "language": language}


def render(document: dict[str, Any], path: Path) -> None:
    """Write the page of a part beside its JSON."""
    path.with_suffix(".md").write_text(PAGES[document["part"]](document, path), encoding="utf-8")
