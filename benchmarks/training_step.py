"""A training step with MLR attention against one with standard attention: `python -m benchmarks.training_step`.

Standard attention runs through PyTorch's own kernel. Steps of all structures are timed in turn, forward, backward and
AdamW, on the same batch; samples go to JSON and a table to Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import machine
from structattn.models import LanguageModel, LanguageModelConfig
from structattn.studies.table import markdown_row

STRUCTURES = ("standard", "mlr:32|8|6|4|4|4|4|2", "mlr:8x8")
SIZES = {"layers": 4, "dim": 256, "heads": 4, "context_length": 1024, "positions": "rotary"}
BATCH = 2


def step(structure: str, precision: str) -> Callable[[], None]:
    """One step of a fresh model of that structure."""
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(**SIZES, attention=structure))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(96, (BATCH, SIZES["context_length"] + 1))

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(tokens[:, :-1]).logits
        F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def measure(precision: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of every timed step by structure; the first step of each is not timed."""
    steps = {structure: step(structure, precision) for structure in STRUCTURES}
    samples: dict[str, list[float]] = {structure: [] for structure in STRUCTURES}
    for each in steps.values():
        each()
    for _ in range(rounds):
        for structure, each in steps.items():
            start = time.perf_counter()
            each()
            samples[structure].append(time.perf_counter() - start)
    return samples


def table(samples: dict[str, dict[str, list[float]]], facts: dict[str, Any]) -> str:
    """The Markdown page."""
    lines = [
        "# A training step on a CPU",
        "",
        f"{facts['cpu']}, {facts['threads']} threads pinned to {facts['pinning']}, {', '.join(facts['instructions'])}; "
        f"torch {facts['torch']}, commit {facts['commit'][:12]}, {facts['time']}. Load average "
        f"{facts['load_average_before'][0]:.1f} before.",
        "",
        f"Language model of {SIZES['layers']} layers, width {SIZES['dim']}, {SIZES['heads']} heads of 64, "
        f"T = {SIZES['context_length']}, batch {BATCH}: forward, backward and AdamW. Medians of interleaved steps; in "
        "parentheses the time of standard attention (PyTorch's SDPA) over the structure's.",
        "",
        markdown_row(["precision", *(f"`{name}`" for name in STRUCTURES)]),
        "|---" * (len(STRUCTURES) + 1) + "|",
    ]
    for precision, by_structure in samples.items():
        medians = {name: statistics.median(times) for name, times in by_structure.items()}
        cells = [f"{1e3 * median:.0f} ms ({medians['standard'] / median:.2f})" for median in medians.values()]
        lines.append(f"| {precision} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "Made by `python -m benchmarks.training_step`.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each structure")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder for JSON and Markdown")
    options = parser.parse_args()
    machine.pin_threads("benchmarks.training_step")
    facts = machine.facts()
    samples = {precision: measure(precision, options.rounds) for precision in ("float32", "bfloat16")}
    document = {"machine": facts, "sizes": SIZES, "batch": BATCH, "seconds": samples}
    (options.out / "training-step-cpu.json").write_text(json.dumps(document, indent=1) + "\n")
    page = table(samples, facts)
    (options.out / "training-step-cpu.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
