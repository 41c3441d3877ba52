"""Time whole models on a card: a training step, `torch.compile`, and decoding with the compressed cache."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import generation, machine
from benchmarks.gpu.attention import captured
from benchmarks.gpu.setup import Setup, choices_made, compile_times, kernels_serve
from benchmarks.output import Row
from benchmarks.timing import Call, clock_of, sample
from structattn.layers.kv_cache import CacheLayout, CacheSlice, KeyValueCache, mlr_cache_layout
from structattn.models import LanguageModel, LanguageModelConfig
from structattn.ops.hierarchy import Hierarchy

STANDARD, MLR = "standard", "mlr"
NEAR = "mlr:32|32|64v@w*|1024|256"
"""The levels of the speed goals, in a model with heads of 128."""
COMPILED = ", compiled"
TRAINED = {"layers": 6, "dim": 768, "heads": 12, "positions": "rotary"}
DECODING = {"layers": 6, "dim": 1024, "heads": 8, "positions": "rotary"}
TINY = {"layers": 1, "dim": 64, "heads": 1, "positions": "rotary"}
SYNCS = ("aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Names of the calls that wait for the card, as the profiler gives them."""
TOKENS_PROFILED = 8


def training_steps(setup: Setup) -> Iterator[Row]:
    """Time training steps of standard and MLR attention in turn.

    Each is timed with `torch.compile` and without. The first losses of a compiled model must be those of the same model
    without the compiler, but for twice what rounding to bfloat16 changes in standard attention's.
    """
    context, batch = (64, 1) if setup.rehearse else (4096, 4)
    sizes = TINY if setup.rehearse else TRAINED
    rows, calls, losses = [], {}, {}
    with kernels_serve(setup):
        exact = first_losses(training_step(STANDARD, sizes, context, batch, setup, torch.float32))
        for variant in (STANDARD, MLR, STANDARD + COMPILED, MLR + COMPILED):
            row = {"kind": "training step", "variant": variant, "length": context, "batch": batch, "sizes": sizes}
            rows.append(row)
            try:
                with choices_made() as choices, compile_times() as kernels:
                    step = training_step(variant, sizes, context, batch, setup, setup.half)
                    row["first_seconds"] = clock_of("cpu")(functools.partial(first_losses, step, 1))
                    losses[variant] = row["losses"] = first_losses(step)
                row |= {"choices": choices, "kernels": kernels} | _compared(variant, losses, exact, setup)
                row["peak_mb"] = machine.peak_on_card(step, setup.device)
            except Exception as failure:
                row["reason"] = machine.reason(failure)
            if "reason" not in row:
                calls[variant] = step
        yield from _timed(rows, calls, setup)


def training_step(
    variant: str, sizes: Row, context: int, batch: int, setup: Setup, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """Return a function that trains a fresh model for a step.

    The function returns the loss.
    """
    attention, compiled, _ = variant.partition(COMPILED)
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(**sizes, context_length=context, attention=attention))
    model = model.to(setup.device).train()
    tokens = torch.randint(96, (batch, context + 1), generator=torch.Generator().manual_seed(0)).to(setup.device)
    torch._dynamo.utils.counters.clear()
    called = torch.compile(model, backend=setup.compiler) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> Tensor:
        loss = loss_of(called, tokens, dtype)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def first_losses(step: Callable[[], Tensor], count: int = 3) -> list[float]:
    """Return the losses of the next steps.

    The loss before the first step is left out: an untrained model says nothing.
    """
    return [float(step()) for _ in range(count)]


def _compared(variant: str, losses: dict[str, list[float]], exact: list[float], setup: Setup) -> Row:
    """Return a compiled model's error in the losses and its graph breaks.

    Other models have neither.
    """
    if not variant.endswith(COMPILED):
        return {}
    eager = losses.get(variant.removesuffix(COMPILED))
    if eager is None:
        return {"reason": "the model without the compiler failed"}
    rounding = max(abs(a - b) for a, b in zip(losses[STANDARD][:-1], exact[1:], strict=True))
    allowed = 2 * (rounding + torch.finfo(setup.half).eps * max(exact))
    error = max(abs(a - b) for a, b in zip(losses[variant], eager, strict=True))
    found = {"error": error, "allowed": allowed, "graph_breaks": _graph_breaks()}
    wrong = f"the compiled model's losses differ by {error:.2g}, allowed: {allowed:.2g}"
    return found | ({} if error <= allowed else {"reason": wrong})


def loss_of(model: Callable[..., Any], tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mean cross-entropy of all tokens but the first.

    Matrix products are in `dtype`.
    """
    with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
        logits = model(tokens[:, :-1]).logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), tokens[:, 1:].flatten())


def _graph_breaks() -> list[str]:
    return [str(reason).splitlines()[0] for reason in torch._dynamo.utils.counters["graph_break"]]


def _timed(rows: list[Row], calls: dict[str, Call], setup: Setup) -> Iterator[Row]:
    """Yield the rows with the samples of their calls, timed in turn."""
    for call in calls.values():
        call()
    seconds = sample(calls, clock=clock_of(setup.device), min_rounds=setup.least_rounds, seconds=4 * setup.case_seconds)
    for row in rows:
        if row["variant"] in seconds:
            samples = [1e3 * each for each in seconds[row["variant"]]]
            row |= {"samples_ms": samples, "shown": {row["variant"]: f"{machine.median(samples):.2f} ms"}}
        yield row


def decoding(setup: Setup) -> Iterator[Row]:
    """Time a model's decoding by token, and count waits for the card."""
    context, sizes = (160, TINY) if setup.rehearse else (32_768, DECODING)
    near = "mlr:16|16|32v@w*|64|16" if setup.rehearse else NEAR
    rows, calls = [], {}
    with kernels_serve(setup), torch.inference_mode():
        for variant, attention in ((STANDARD, STANDARD), (near, near)):
            row = {"kind": "decoding", "variant": variant, "length": context, "batch": 1, "sizes": sizes}
            rows += [row, graph := {**row, "variant": f"{variant}, graph"}]
            try:
                with compile_times() as kernels:
                    steps = [_decoding_step(attention, context, sizes, setup) for _ in range(2)]
                    row["first_seconds"] = clock_of("cpu")(steps[0])
                steps[1]()
                row |= {"kernels": kernels, "waits": waits(steps[0], setup)}
            except Exception as failure:
                row["reason"] = machine.reason(failure)
                graph["reason"] = "the steps without a graph failed"
                continue
            calls[variant] = steps[0]
            try:
                calls[f"{variant}, graph"] = _graph_checked(steps[0], steps[1], setup)
            except Exception as failure:
                graph["reason"] = machine.reason(failure)
        yield from _timed(rows, calls, setup)


def _decoding_step(attention: str, context: int, sizes: Row, setup: Setup) -> Callable[[], Tensor]:
    """Return a function that decodes a token near the context's end.

    The function returns the logits.
    """
    model = generation.build(attention, context, sizes).to(setup.device, setup.half)
    torch.manual_seed(0)
    cache = generation.filled_cache(model, context - 100, concatenates=False)
    token = torch.zeros(1, 1, dtype=torch.long, device=setup.device)
    return lambda: model(token, cache=cache).logits


def _graph_checked(eager: Callable[[], Tensor], other: Callable[[], Tensor], setup: Setup) -> Call:
    """Return the replay of a step as a CUDA graph, checked.

    Its logits must be those of the step without a graph. A graph repeats one step: its lengths are those at which it
    was captured. The profiler has stepped the first model on, so the other one catches up.
    """
    for _ in range(2 * TOKENS_PROFILED):
        other()
    kept: list[Tensor] = []

    def step() -> None:
        kept[:] = [other()]

    replay = captured(step, setup)
    eager()  # `captured` warms up with one step
    expected = eager()
    replay()
    if not torch.equal(kept[0], expected) and not setup.rehearse:
        raise ValueError(f"the graph's logits differ by {float((kept[0] - expected).abs().max()):.2g}")
    return replay


def waits(step: Call, setup: Setup) -> dict[str, float]:
    """Return how often a step waits for the card: by the profiler, and by PyTorch's own warnings."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not setup.rehearse:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(TOKENS_PROFILED):
            step()
    found = {event.key: event.count / TOKENS_PROFILED for event in profile.key_averages() if event.key in SYNCS}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not setup.rehearse:
            torch.cuda.set_sync_debug_mode("warn")
        for _ in range(TOKENS_PROFILED):
            step()
        if not setup.rehearse:
            torch.cuda.set_sync_debug_mode("default")
    warned = sum("synchroniz" in str(each.message) for each in caught)
    return found | {"warnings": warned / TOKENS_PROFILED}


def live_cache(setup: Setup) -> Iterator[Row]:
    """Measure a layer's cache in bytes after a long prompt.

    It is measured for standard attention and with levels.
    """
    length, heads, width = (300, 2, 128) if setup.rehearse else (32_768, 8, 128)
    levels = Hierarchy.parse(NEAR.removeprefix("mlr:"))
    whole = CacheLayout((CacheSlice(heads, width),), (CacheSlice(heads, width),))
    for variant, layout in ((STANDARD, whole), (NEAR, mlr_cache_layout(levels, heads, width))):
        cache = KeyValueCache(layout)
        keys, values = (
            [torch.zeros(1, part.heads, length, part.width, dtype=setup.half, device=setup.device) for part in parts]
            for parts in (layout.keys, layout.values)
        )
        cache.append(keys, values)
        cache.forget()
        live = setup.half.itemsize * (cache.key_numbers + cache.value_numbers)
        shown = {variant: f"{live / 2**20:.1f} MiB live, {cache.nbytes / 2**20:.1f} MiB with room for growth"}
        about = {"kind": "cache", "variant": variant, "length": length}
        yield {**about, "live_bytes": live, "bytes": cache.nbytes, "shown": shown}
