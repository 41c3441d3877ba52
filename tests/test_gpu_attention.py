"""The timed attention of the GPU benchmark, as far as a CPU can run it: cases, check of results, verdicts, page."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("transformers")

from benchmarks.gpu import attention, goals, pages, timings
from benchmarks.gpu.attention import EAGER, FLAT, WINDOWS, Case
from benchmarks.gpu.setup import Setup
from benchmarks.output import write_json

ON_CPU = Setup(rehearse=True, case_seconds=0.001)


@pytest.fixture
def by_definition(monkeypatch):
    """Let the definition stand in for the kernels."""
    kernels = attention.mlr_attention
    monkeypatch.setattr(attention, "mlr_attention", lambda *a, **k: kernels(*a, **(k | {"backend": "reference"})))
    decode = attention.mlr_decode
    monkeypatch.setattr(attention, "mlr_decode", lambda *a, **k: decode(*a, **(k | {"backend": "dense"})))


def test_cases_cover_what_is_promised():
    cases = [*timings.GOAL_CASES, *timings.SWEEP]
    assert {(case.operation, case.rank) for case in timings.SWEEP} == {
        (operation, rank) for operation in ("forward", "forward + backward") for rank in (64, 128)
    }
    assert {case.length for case in timings.SWEEP} == {1024 * 2**power for power in range(7)}
    for case in cases:
        assert all(attention.hierarchy(case, variant).rank == case.rank for variant in case.variants)
        work = {variant: attention.work(case, variant)["flops"] for variant in (WINDOWS, "8x8", FLAT, "SDPA flash")}
        assert work["8x8"] < work[FLAT] == work["SDPA flash"]
        assert work[WINDOWS] < work[FLAT]


def test_every_goal_has_its_case():
    """A goal is measured from the rows of the cases that run, so each is met where every time of ours is least."""
    rows = []
    for job in timings.timed_jobs(Setup()):
        if job.arguments:
            case = job.arguments[0]
            variants = [*case.variants, *(f"{variant}{attention.GRAPH}" for variant in case.variants if case.is_decode)]
            for variant in variants:
                time = 1.0 if variant.startswith((FLAT, WINDOWS)) else 3.0
                named = {"operation": case.operation, "length": case.length, "rank": case.rank, "rows": case.rows}
                rows.append({**named, "variant": variant, "samples_ms": [time]})
    verdicts = {verdict["goal"]: verdict for verdict in goals.verdicts(rows)}
    speeds = [verdict for goal, verdict in verdicts.items() if "FlexAttention" in goal or "the best" in goal]
    assert len(speeds) == 12
    assert all(verdict["met"] and verdict["measured"] == 3.0 for verdict in speeds)
    assert all(verdict["met"] is None for verdict in goals.verdicts([]))


@pytest.mark.parametrize("operation", ["forward", "forward + backward"])
def test_results_are_checked(operation, by_definition):
    case = Case(operation, 128, 64, (), 1)
    call = attention.build(case, "P32", ON_CPU)
    assert "reason" not in attention.check_variant(case, "P32", ON_CPU, call)
    if not case.trains:  # a training case is called anew
        assert attention.check_variant(case, FLAT, ON_CPU, call)["reason"].startswith("wrong by")


def test_wrong_gradients_are_found(by_definition, monkeypatch):
    case = Case("forward + backward", 128, 64, (), 1)
    serve = attention.attention

    def scaled(*arguments):
        attend = serve(*arguments)
        return lambda q, k, v: attend(q, k, v) + (v * 1e-2 - (v * 1e-2).detach())

    monkeypatch.setattr(attention, "attention", scaled)
    found = attention.check_variant(case, WINDOWS, ON_CPU, attention.build(case, WINDOWS, ON_CPU))
    assert found["reason"].startswith("wrong by")


def test_measures_decode_and_renders(tmp_path, by_definition):
    case = Case("decode", 512, 128, ("SDPA flash", "SDPA flash, heads packed", FLAT, WINDOWS), 1)
    rows = [{"case": str(case), **row} for row in attention.measure(ON_CPU, case)]
    assert {row["variant"] for row in rows if "samples_ms" in row} >= {FLAT, WINDOWS, WINDOWS + attention.GRAPH}
    assert {row["variant"]: row["bytes"] for row in rows}[FLAT] == 2 * 8 * 512 * 256
    eager = Case("forward", 64, 64, ("SDPA flash", FLAT, EAGER), 1, sweep=True)
    rows += [{"case": str(eager), **row} for row in attention.measure(ON_CPU, eager)]
    rows.append({"case": "a case", "variant": FLAT, "inputs": "its inputs", "reason": "wrong by 1"})
    facts = {"card": "none", "capability": "0.0", "memory_gb": 1.0, "torch": "2", "cuda": "1", "triton": "3"}
    facts |= {"commit": "0" * 40, "time": "now", "rehearsal": False, "finished": False, "seconds": 1.0}
    document = {"part": "timings", **facts, "rows": rows, "not_run": ["another case"]}
    timings.conclude(document)
    assert document["failed"] == ["a case, flat"]
    path = tmp_path / "gpu-timings.json"
    write_json(document, path)
    pages.render(document, path)
    page = path.with_suffix(".md").read_text()
    assert "## Goals" in page
    assert "- **a case, flat** (its inputs): wrong by 1" in page
    assert "The run was cut short." in page
    assert "Not run for want of time: another case." in page
    assert "### Decode, r = dv = 128" in page
    assert "(gpu-timings.svg)" in page
    assert path.with_suffix(".svg").exists()


def test_a_case_of_the_sweep_is_a_point_of_the_plot():
    assert {(case.operation, case.rank) for case in timings.SWEEP if case.sweep} == {("forward", 64)}
    assert not any(replace(case, sweep=False) in timings.GOAL_CASES for case in timings.SWEEP if case.sweep)
