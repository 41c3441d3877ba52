"""Options, checks and samples shared by the CPU and GPU benchmarks."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from benchmarks import machine
from structattn import Hierarchy, mlr_attention


class AttentionCase(Protocol):
    """A row of a table: an operation on tensors of one length."""

    @property
    def length(self) -> int:
        """Number of keys."""


Case = TypeVar("Case", bound=AttentionCase)


def option_parser(description: str | None, *, out: Path, seconds: float) -> argparse.ArgumentParser:
    """Return a parser of the options that the benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--seconds", type=float, default=seconds, help="time for each case's rounds")
    parser.add_argument("--longest", type=float, default=math.inf, help="leave out longer sequences")
    parser.add_argument("--only", default="", help="measure only cases whose name contains this")
    return parser


def selected(cases: Sequence[Case], options: argparse.Namespace) -> Iterator[Case]:
    """Yield the cases that the command line asks for."""
    return (case for case in cases if case.length <= options.longest and options.only in str(case))


def reference(levels: Hierarchy, inputs: Sequence[Tensor], length: int, upstream: Tensor | None = None) -> list[Tensor]:
    """Return the definition's output for the last queries, and its gradients.

    Gradients are those of the inputs that require them.

    Args:
        levels: levels of the scores.
        inputs: the last queries, all keys and all values.
        length: number of keys.
        upstream: gradient of the output; None if no gradient is needed.
    """
    offset = length - inputs[0].shape[2]
    out = mlr_attention(*inputs, levels, is_causal=True, query_offset=offset, enable_gqa=True, backend="reference")
    if upstream is None:
        return [out]
    return [out, *torch.autograd.grad(out, [each for each in inputs if each.requires_grad], upstream)]


def check(
    actual: Sequence[Tensor], exact: Sequence[Tensor], plain: Sequence[Tensor], inputs: Sequence[Tensor]
) -> dict[str, Any]:
    """Judge results by the rule of `tests/tolerance.py`.

    Args:
        actual: the variant's output and gradients.
        exact: the same in float64.
        plain: the same by plain PyTorch in the variant's dtype.
        inputs: query, key, value and the output's gradient. The largest of their numbers is the largest term that the
            results sum: mixed values cancel, so that they are smaller.

    Returns:
        `error`, the largest of all tensors. Also `reason` if it exceeds twice the error of plain PyTorch plus two
        roundings.
    """
    error, plain_error = _largest_error(actual, exact), _largest_error(plain, exact)
    largest = max(float(each.detach().abs().max()) for each in inputs)
    allowed = 2 * (plain_error + torch.finfo(plain[0].dtype).eps * largest)
    return {"error": error} | ({} if error <= allowed else {"reason": f"wrong by {error:.2g}, allowed: {allowed:.2g}"})


def add_samples(rows: Sequence[dict[str, Any]], seconds: Mapping[str, Sequence[float]]) -> None:
    """Store the samples of each variant in its row, in milliseconds."""
    for row in rows:
        if row["variant"] in seconds:
            row["samples_ms"] = [1e3 * each for each in seconds[row["variant"]]]


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the median of each variant, or why there is none."""
    return {
        row["variant"]: f"{machine.median(row['samples_ms']):.3f} ms" if "samples_ms" in row else str(row["reason"])
        for row in rows
    }


def _largest_error(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    # The maximum of tensors keeps NaN, that of Python's numbers may not.
    return float(torch.stack([(a - b).detach().double().abs().max() for a, b in zip(actual, exact, strict=True)]).max())
