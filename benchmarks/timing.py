"""Time calls in turn.

A drift of the machine then affects all of them alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Call = Callable[[], Any]
Clock = Callable[[Call], float]
"""Runs a call and returns its seconds."""


def seconds_of(call: Call) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def seconds_on_card(call: Call) -> float:
    """Return the seconds of one call by the CUDA card's own clock."""
    # Writing 256 MB pushes the data of the previous call out of the card's cache.
    torch.empty(2**28, dtype=torch.int8, device="cuda").zero_()
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    call()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3


def clock_of(device: str) -> Clock:
    """Return the clock for calls on a device."""
    return seconds_of if device == "cpu" else seconds_on_card


def sample(
    calls: Mapping[str, Call],
    *,
    clock: Clock = seconds_of,
    min_rounds: int = 1,
    max_rounds: int = 200,
    seconds: float = math.inf,
    time_limit: float = math.inf,
) -> dict[str, list[float]]:
    """Time every call once per round; return seconds by name.

    Args:
        calls: functions by name, already warmed up.
        clock: times one call.
        min_rounds: rounds to do even if they take more than `seconds`.
        max_rounds: rounds to do at most.
        seconds: time after which no round starts.
        time_limit: time after which no round starts, whatever `min_rounds` is.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    spent, rounds = 0.0, 0
    while calls and rounds < max_rounds and (rounds < min_rounds or spent < seconds):
        for name, call in calls.items():
            samples[name].append(clock(call))
            spent += samples[name][-1]
        rounds += 1
        if spent > time_limit:
            break
    return samples


def sample_warm(calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """Call every function once untimed, then time it once per round."""
    for call in calls.values():
        call()
    return sample(calls, min_rounds=rounds, max_rounds=rounds)
