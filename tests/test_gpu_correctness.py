"""The cases that are checked on a card: they meet every branch of every kernel, and are calls of the op."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import correctness
from benchmarks.gpu.setup import Setup
from triton.runtime.jit import JITFunction

from structattn.ops.call import Call, DecodeCall
from structattn.ops.triton import backward_kernels, decode_kernels, forward_kernel, launch, parts, static
from tests.ops import decode_battery
from tests.ops.battery import Case

JOBS = correctness.jobs(Setup())
KERNELS = ("forward_kernel", "query_grad_kernel", "key_grad_kernel")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def launches():
    """Return the arguments of every launch of every kernel; nothing is compiled or run."""
    made = defaultdict(list)

    def record(kernel, *args, grid=None, warmup=False, **options):
        made[kernel.__name__].append(dict(zip(kernel.arg_names, args, strict=False)) | options)

    def first_choice(kernel, name, row):
        return _Launches(kernel, name, launch.configs(name, row)[0], record)

    processors = patch.object(decode_kernels, "PROGRAMS", 132 * decode_kernels.PROGRAMS)  # as many as a card has
    with processors, patch.object(JITFunction, "run", record), patch.object(launch, "tuned", first_choice):
        for job in JOBS:
            case = replace(job.arguments[0], device="cpu")
            if isinstance(case, Case):
                _launch_attention(case)
            else:
                _launch_decode(case)
    return made


class _Launches:
    """Replaces a tuned kernel: records its arguments with the first choice of block sizes."""

    def __init__(self, kernel, name, config, record):
        self.kernel, self.name, self.config, self.record = kernel, name, config, record
        self.cache = {}  # of choices: nothing is tuned

    def __getitem__(self, grid):
        def launched(**options):
            chosen = options | self.config.all_kwargs()
            self.record(self.kernel, **chosen, EVEN=launch.is_even(chosen, self.name))

        return launched


def _launch_attention(case):
    tensors = case.tensors()
    bounds = (None if bound is None else torch.tensor(bound) for bound in (case.key_start, case.key_end))
    seed = torch.tensor(1) if case.dropout_p else None
    call = Call(
        *(tensors.get(name) for name in ("query", "key", "value", "bias")), *bounds, seed, case.hierarchy,
        case.is_causal, 0.1, case.query_offset, case.dropout_p,
    )  # fmt: skip
    out, lse = forward_kernel.forward(call)
    backward_kernels.backward(call, out, out, lse, needs_bias_grad=call.attn_bias is not None)


def _launch_decode(case):
    def keep(call: DecodeCall):
        decode_kernels.decode(call)
        return torch.zeros(*call.query.shape[:3], call.value_dim, dtype=call.query.dtype)

    with patch("structattn.ops.decode._choose", lambda backend, call: keep):
        decode_battery.result(case, "triton")


def _branches(kernel, options):
    """Return what tells one launch of an attention kernel from another, where code differs."""
    ranks, values, gains = options["RANKS"], options["VALUES"], options["GAINS"]
    own, other = ("BLOCK_K", "BLOCK_Q") if kernel == "key_grad_kernel" else ("BLOCK_Q", "BLOCK_K")
    found = parts.parts_of.fn(
        ranks, values, options["SIZES"], options["BY_WINDOW"], options["CAUSAL"], options[own], options[other],
        options["STEP"], options["EVEN"],
    )  # fmt: skip
    kinds = [parts.Part(*part) for part in found]
    near = [part for part in kinds if part.own]
    yield "dtype", options["query"].dtype
    for name in ("EVEN", "BY_WINDOW", "CAUSAL"):
        yield name, options[name]
    for name in ("bias", "key_start", "key_end", "seed"):
        yield name, options[name] is not None
    yield "offset", options["query_offset"] > 0
    yield "groups", options["group"] > 1
    yield "values in levels", any(values[1:])
    yield "values of width 0", 0 in values
    yield "held rows", sum(ranks) <= static.RESIDENT
    yield "gains", len(set(gains)) > 1
    yield "one level", len(ranks) == 1
    yield "far", any(part.far for part in kinds)
    yield "band", any(not part.far and not part.own for part in kinds)
    yield "band of levels", any(not part.far and not part.own and part.partial - part.whole > 1 for part in kinds)
    yield "far levels share code", any(part.far and part.stop - part.first > 1 for part in kinds)
    yield "levels in the near part", any(part.partial > part.whole for part in near)
    yield "finite first window", any(not part.far and part.whole == 0 for part in kinds)
    if kernel == "query_grad_kernel":
        yield "gradient of the bias", options["bias_grad"] is not None
    if kernel != "forward_kernel":
        yield "first chunk", options["CHUNKS"][0] == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_cases_meet_every_branch(kernel, launches):
    met = defaultdict(set)
    for options in launches[kernel]:
        for name, value in _branches(kernel, options):
            met[name].add(value)
    assert met.pop("dtype") == set(DTYPES)
    assert {name for name, values in met.items() if values != {True, False}} == set()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cases_meet_every_row_of_the_tables_of_blocks(dtype):
    rows = set()
    for job in JOBS:
        case = job.arguments[0]
        if isinstance(case, Case) and case.dtype == dtype:
            rows.add(launch.width_class(case.hierarchy.rank, case.value_width, dtype))
    assert rows == {launch.width_class(rank, min(rank, 256), dtype) for rank in range(1, 1025)}


def test_cases_meet_every_choice_of_blocks():
    tables = (launch.FORWARD, launch.QUERY_GRAD, launch.KEY_GRAD)
    assert max(len(choices) for table in tables for choices in table.values()) <= correctness.CHOICES
    tried = {job.arguments for job in JOBS if "choice" in job.name}
    assert len(tried) == correctness.CHOICES * len(correctness.BY_WIDTH)
    cases = correctness.BY_WIDTH.values()
    rows = {launch.width_class(case.hierarchy.rank, case.value_width, case.dtype) for case in cases}
    assert rows == set(launch.FORWARD)


def test_cases_meet_every_branch_of_decode(launches):
    met = defaultdict(set)
    for options in launches["share_kernel"]:
        met["dtype"].add(options["query"].dtype)
        met["BY_WINDOW"].add(options["BY_WINDOW"])
        met["padding"].add(options["key_start"] is not None)
        met["held rows"].add(sum(options["RANKS"]) <= static.RESIDENT)
        met["levels in values"].add(len(options["VALUES"]) > 1)
        met["groups"].add(options["rows"] > options["queries"])
        met["queries"].add(options["queries"] > 1)
        met["finite first window"].add(options["SIZES"][0] < parts.WHOLE)
        met["aligned"].add(options["ALIGNED"])
        met["splits"].add(options["splits"] > 1)
    assert met.pop("dtype") == set(DTYPES)
    assert met.pop("splits") == {True, False}
    assert {name for name, values in met.items() if values != {True, False}} == set()
    assert launches["join_kernel"]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_cases_are_calls_of_the_op(job):
    """The definition in the case's dtype stands in for the kernels."""
    case = replace(job.arguments[0], device="cpu")
    if not isinstance(case, Case):
        assert not [
            each.message for each in decode_battery.compare(case, decode_battery.result(case, "dense")) if each.message
        ]
        return
    assert case.heads % case.key_heads == 0
    assert case.batch == len(case.key_start or range(case.batch)) == len(case.key_end or range(case.batch))
    assert case.value_width == sum(case.hierarchy.value_ranks or (case.value_width,))


def test_a_description_says_what_is_not_the_default():
    case = Case(correctness.GOAL, 700, batch=3, is_causal=False)
    assert correctness.describe(case) == "32|32|64v@w*|1024|256, query_length=700, is_causal=False, batch=3, seed=0"
