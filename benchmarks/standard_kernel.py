"""Compare the kernels of standard attention: `python -m benchmarks.standard_kernel`.

PyTorch's kernel and this package's compiled one are timed in turn, for every dtype, mask, head width and length, with
gradients and without. `structattn.ops.standard.faster_kernel` follows these numbers.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.output import describe_machine, table, write_json
from benchmarks.timing import Call, sample
from structattn.ops.standard import StandardKernel, faster_kernel, standard_attention

PAGE = "standard-kernel-cpu"
"""Name of the page, and start of the names of its JSON files."""
LENGTHS = (64, 128, 256, 512, 1024, 2048)
WIDTHS = (32, 64, 128)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KERNELS: tuple[StandardKernel, ...] = ("torch", "compiled")
HEADS = 8


@dataclass(frozen=True)
class Case:
    """A call of standard attention."""

    dtype: str
    training: bool
    is_causal: bool
    width: int
    length: int

    def tensors(self) -> list[Tensor]:
        """Return query, key and value."""
        generator = torch.Generator().manual_seed(0)
        shape = (1, HEADS, self.length, self.width)
        made = [torch.randn(shape, generator=generator).to(DTYPES[self.dtype]) for _ in range(3)]
        return [each.requires_grad_(self.training) for each in made]

    def call(self, kernel: StandardKernel) -> Call:
        """Return the call to time: forward, or forward and backward."""
        inputs = self.tensors()
        upstream = torch.ones_like(inputs[0]).detach()

        def attend() -> Tensor:
            return standard_attention(*inputs, is_causal=self.is_causal, kernel=kernel)

        return (lambda: torch.autograd.grad(attend(), inputs, upstream)) if self.training else attend

    def chosen(self) -> str:
        """Return the kernel that `"auto"` takes on this machine."""
        return faster_kernel(*self.tensors(), is_causal=self.is_causal)


CASES = [Case(*each) for each in itertools.product(DTYPES, (False, True), (True, False), WIDTHS, LENGTHS)]


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """Return the samples of both kernels, and which one `"auto"` takes."""
    calls: dict[str, Callable[[], Any]] = {kernel: case.call(kernel) for kernel in KERNELS}
    for call in calls.values():
        call()
    samples = sample(calls, min_rounds=5, seconds=seconds)
    return {**asdict(case), "chosen": case.chosen(), "seconds": samples}


def ratio(row: Mapping[str, Any]) -> float:
    """Return the time of PyTorch's kernel over that of the compiled one."""
    torchs, compiled = (machine.median(row["seconds"][kernel]) for kernel in KERNELS)
    return torchs / compiled


def page(folder: Path) -> str:
    """Return a page with a section for each JSON file of `folder`."""
    lines = [
        "# The kernel of standard attention on a CPU",
        "",
        f"One batch row and {HEADS} heads. A cell is the time of PyTorch's kernel over that of the compiled one, "
        "medians of interleaved calls: above 1 the compiled one is faster. It is bold where `standard` takes the "
        'compiled kernel by itself (`standard_kernel="auto"`). Training is forward and backward.',
    ]
    for path in sorted(folder.glob(f"{PAGE}*.json"), key=lambda path: path.stem):
        document = json.loads(path.read_text())
        held = document["machine"]["held_to"]
        title = document["machine"]["cpu"] + ("" if held == "native" else f", held to {held}")
        lines += ["", f"## {title}", "", describe_machine(document["machine"]), ""]
        lines += table(["dtype", "call", "mask", "head width", *map(str, LENGTHS)], _rows(document["rows"]))
    return "\n".join([*lines, "", "Written by `python -m benchmarks.standard_kernel`.", ""])


def _rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    groups: dict[tuple[str, ...], dict[int, str]] = {}
    for row in rows:
        name = (
            row["dtype"],
            "training" if row["training"] else "forward",
            "causal" if row["is_causal"] else "none",
            str(row["width"]),
        )
        text = f"{ratio(row):.2f}"
        groups.setdefault(name, {})[row["length"]] = f"**{text}**" if row["chosen"] == "compiled" else text
    return [[*name, *(cells.get(length, "") for length in LENGTHS)] for name, cells in groups.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each case's rounds")
    parser.add_argument("--instructions", choices=machine.INSTRUCTIONS, default="native", help="most that may be used")
    parser.add_argument("--out", type=Path, default=machine.ROOT / f"docs/results/{PAGE}.json")
    options = parser.parse_args()
    if not options.out.name.startswith(PAGE):
        parser.error(f"--out: the page takes files whose names start with {PAGE}, got {options.out.name}")
    machine.pin_threads("benchmarks.standard_kernel", options.instructions)
    facts = machine.facts()
    rows = []
    for case in CASES:
        rows.append(measure(case, options.seconds))
        print(case, f"{ratio(rows[-1]):.2f}", rows[-1]["chosen"], flush=True)
    write_json({"machine": facts, "heads": HEADS, "rows": rows}, options.out)
    options.out.with_name(f"{PAGE}.md").write_text(page(options.out.parent))


if __name__ == "__main__":
    main()
