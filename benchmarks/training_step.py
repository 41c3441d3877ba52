"""Compare training steps with MLR and standard attention: `python -m benchmarks.training_step`.

Standard attention runs with PyTorch's own kernel and with this package's. A step is forward, backward and AdamW on one
batch. The structures are timed in turn. Samples go to JSON, a table to Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import machine
from benchmarks.output import describe_machine, table, write_json
from benchmarks.timing import sample_warm
from structattn.models import LanguageModel, LanguageModelConfig

STANDARD, COMPILED = "standard", "standard, compiled kernel"
STRUCTURES = (STANDARD, COMPILED, "mlr", "mlr:32|8|6|4|4|4|4|2+paper", "mlr:8x8+paper")
SIZES = {"layers": 4, "dim": 256, "heads": 4, "context_length": 1024, "positions": "rotary"}
BATCH = 2


def step(structure: str, precision: str) -> Callable[[], None]:
    """Return a function that trains a fresh model for one step."""
    torch.manual_seed(0)
    attention, kernel = ("standard", "compiled") if structure == COMPILED else (structure, "torch")
    model = LanguageModel(LanguageModelConfig(**SIZES, attention=attention, standard_kernel=kernel))
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
    """Return the seconds of every timed step, by structure."""
    return sample_warm({structure: step(structure, precision) for structure in STRUCTURES}, rounds)


def page(samples: dict[str, dict[str, list[float]]], facts: dict[str, Any]) -> str:
    """Return the Markdown page."""
    rows = []
    for precision, by_structure in samples.items():
        medians = {name: machine.median(times) for name, times in by_structure.items()}
        times = [f"{1e3 * median:.0f} ms ({medians[STANDARD] / median:.2f})" for median in medians.values()]
        rows.append([precision, *times])
    lines = [
        "# A training step on a CPU",
        "",
        describe_machine(facts),
        "",
        f"The language model has {SIZES['layers']} layers, width {SIZES['dim']} and {SIZES['heads']} heads of 64. A "
        f"step is forward, backward and AdamW on {BATCH} rows of {SIZES['context_length']} tokens. Times are medians "
        "of interleaved steps. In parentheses: the time of standard attention (PyTorch's SDPA) over that of the "
        "structure.",
        "",
        *table(["precision", *map(_heading, next(iter(samples.values())))], rows),
        "",
        "Written by `python -m benchmarks.training_step`.",
        "",
    ]
    return "\n".join(lines)


def _heading(structure: str) -> str:
    spelling, comma, kernel = structure.partition(", ")
    return f"`{spelling}`{comma}{kernel}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each structure")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder for JSON and Markdown")
    options = parser.parse_args()
    machine.pin_threads("benchmarks.training_step")
    facts = machine.facts()
    samples = {precision: measure(precision, options.rounds) for precision in ("float32", "bfloat16")}
    document = {"machine": facts, "sizes": SIZES, "batch": BATCH, "seconds": samples}
    write_json(document, options.out / "training-step-cpu.json")
    text = page(samples, facts)
    (options.out / "training-step-cpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
