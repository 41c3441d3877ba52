"""The core of the battery for the compiled kernel alone, in a process of its own: `python -m tests.ops.core [case …]`.

A process loads one library, so each instruction set needs one. It prints the library's path and the number of cases.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from structattn.ops.cpu import library
from tests.ops import test_decode
from tests.ops.battery import cases, check

NARROW = ("deep-257-causal", "odd-100-full", "padding-causal", "gqa-8:2-bias", "strided", "flat-65-causal")
"""Cases that run in bfloat16 and float16, too."""


def chosen() -> list[str]:
    """Return the names of one case for each promise of the op: of its lengths and masks, few."""
    lengths = tuple(
        f"-{length}-{mask}" for length in (1, 2, 7, 63, 64, 65, 100, 257, 1023) for mask in ("causal", "full")
    )
    others = [name for name in cases() if not name.endswith(lengths)]
    return [
        *NARROW,
        *(name for name in others if name not in NARROW),
        "deep-1023-causal",
        "near-257-full",
        "equal-65-full",
    ]


def main() -> None:
    """Check every case; the first that fails raises."""
    if library.failure() is not None:
        sys.exit(library.failure())
    table, count = cases(), 0
    torch.manual_seed(0)
    for name in sys.argv[1:] or chosen():
        narrow = (torch.bfloat16, torch.float16) if name in NARROW else ()
        for dtype in (torch.float32, *narrow):
            check(replace(table[name], dtype=dtype), "cpu")
            count += 1
    for hierarchy in (test_decode.DEEP, test_decode.NEAR):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            test_decode.check("cpu", hierarchy, 2, 700, key_start=(0, 30), heads=(6, 2), dtype=dtype)
            count += 1
    sys.stdout.write(f"{library.state.path} {count}\n")


if __name__ == "__main__":
    main()
