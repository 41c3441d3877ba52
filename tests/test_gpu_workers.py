"""Jobs in processes: what fails is reported, the rest goes on, and the JSON is whole at all times."""

from __future__ import annotations

import json
import os
import time

import pytest
from benchmarks.gpu.record import Record
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.workers import Job, run

pytest.importorskip("triton")

SETUP = Setup(rehearse=True)


def two_rows(setup):
    yield {"number": 1}
    yield {"number": 2}


def fails(setup):
    yield {"number": 1}
    raise ValueError("a kernel is wrong")


def dies(setup):
    yield {"number": 1}
    os._exit(7)


def hangs(setup):
    time.sleep(1000)
    yield {}


def test_the_rest_goes_on():
    found = []
    jobs = [Job("fails", fails), Job("dies", dies), Job("hangs", hangs, limit=1.0), Job("works", two_rows)]
    assert run(jobs, lambda job, row: found.append((job.name, row)), SETUP, processes=2, seconds=1e6) == []
    reasons = {name: row["reason"] for name, row in found if "reason" in row}
    assert reasons == {
        "fails": "ValueError: a kernel is wrong",
        "dies": "the process ended by itself, exit code 7",
        "hangs": "not done after 1 s",
    }
    assert [row for name, row in found if name == "works"] == [{"number": 1}, {"number": 2}]
    assert [name for name, row in found if row.get("number") == 1] != []


def test_jobs_past_the_time_are_named():
    jobs = [Job("one", two_rows), Job("two", two_rows)]
    assert run(jobs, lambda *_: None, SETUP, processes=1, seconds=0.0) == jobs


def test_the_file_is_whole_after_every_row(tmp_path):
    record = Record("correctness", tmp_path / "gpu-correctness.json", SETUP)
    for count in range(3):
        document = json.loads(record.path.read_text())
        assert len(document["rows"]) == count
        assert not document["finished"]
        record.add(Job("a case", two_rows, about={"inputs": "some"}), {"number": count})
    assert document["rows"][1] | {"at_second": 0} == {"case": "a case", "inputs": "some", "number": 1, "at_second": 0}
