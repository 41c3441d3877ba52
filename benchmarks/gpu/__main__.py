"""Check and measure the GPU kernels on a card: `python -m benchmarks.gpu PART …`.

The parts are `correctness`, `timings`, `training` and `language`. Each writes `gpu-PART.json` after every case and a
page beside it. A case that fails is reported, and the rest goes on. The exit status is 1 if any case failed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks import machine, report
from benchmarks.gpu import workers
from benchmarks.gpu.record import Record
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.workers import Job
from benchmarks.output import Row

PARTS = ("correctness", "timings", "training", "language")
NO_CARD = "no CUDA device: this runs on a card alone, and nothing was written; --rehearse runs tiny cases on the CPU"


def main() -> None:
    options = _options()
    setup = Setup(
        rehearse=options.rehearse,
        processes=options.processes,
        case_seconds=options.case_seconds,
        only=options.only,
        data=options.data,
        scratch=options.scratch,
    )
    setup.prepare()
    if not setup.rehearse and not torch.cuda.is_available():
        raise SystemExit(NO_CARD)
    if "language" in options.parts and (options.data is None or not Path(options.data).exists()):
        raise SystemExit(f"the part language needs --data, a folder or file of texts, got {options.data}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes are ended, too
    failed = [part for part in options.parts if not run_part(part, setup, options.out, options.seconds)]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def run_part(part: str, setup: Setup, folder: Path, seconds: float | None) -> bool:
    """Run a part, write its JSON and page; return True on success."""
    module = _module(part)
    seconds = module.SECONDS if seconds is None else seconds
    record = Record(part, folder / f"gpu-{part}.json", setup)

    def handle(job: Job, row: Row) -> None:
        print(_line(record.add(job, row)), flush=True)
        module.conclude(record.document)
        record.write()

    begun = time.monotonic()
    for stage in module.stages(setup, record.document):
        left = stage.share * seconds - (time.monotonic() - begun)
        chosen = [job for job in stage.jobs if setup.only in job.name]
        waiting = workers.run(chosen, handle, setup, processes=stage.processes, seconds=left)
        record.document["not_run"] += [job.name for job in waiting]
        module.conclude(record.document)
        record.write()
    record.document["finished"] = True
    record.write()
    report.render(record.path)
    failed, waiting_names = record.document["failed"], record.document["not_run"]
    print(f"{part}: {record.document['seconds']:.0f} s, failed: {failed or 'none'}, not run: {waiting_names or 'none'}")
    return not failed


def _module(part: str) -> ModuleType:
    """Return the module of a part, with `SECONDS`, `stages(setup, document)` and `conclude(document)`."""
    return importlib.import_module(f"benchmarks.gpu.{part}")


def _line(row: Row) -> str:
    """Return a row in a line for the terminal."""
    if "reason" in row:
        return f"FAILED {row['case']} ({row.get('inputs', '')}): {row['reason']}"
    shown: dict[str, Any] = row.get("shown", {})
    return f"{row['at_second']:7.1f} s  {row['case']}  " + ", ".join(f"{name} {text}" for name, text in shown.items())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=machine.ROOT / "docs/results", help="folder of JSON and pages")
    parser.add_argument("--seconds", type=float, help="begin no case of a part after this; each part has a default")
    parser.add_argument(
        "--processes",
        type=int,
        default=max(1, min(12, (os.cpu_count() or 2) - 2)),
        help="processes that compile at the same time",
    )
    parser.add_argument("--case-seconds", type=float, default=1.0, help="time for the rounds of a timed case")
    parser.add_argument("--only", default="", help="run only cases whose name contains this")
    parser.add_argument("--data", help="folder of texts, for the part language")
    parser.add_argument("--scratch", type=Path, default=machine.ROOT / "runs/gpu", help="folder for trained models")
    parser.add_argument("--rehearse", action="store_true", help="run tiny cases on the CPU, in Triton's interpreter")
    return parser.parse_args()


if __name__ == "__main__":
    main()
