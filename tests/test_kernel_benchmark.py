"""The benchmark behind the choice of standard attention's kernel, on fabricated numbers and one small case."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")

from benchmarks import standard_kernel, training_step

from structattn.ops.cpu import library
from tests.machine_facts import FACTS


def _row(length, torch, compiled, chosen):
    case = {"dtype": "float32", "training": True, "is_causal": True, "width": 64, "length": length}
    return case | {"chosen": chosen, "seconds": {"torch": [torch], "compiled": [compiled]}}


def test_the_page_marks_the_calls_that_take_the_compiled_kernel(tmp_path):
    rows = [_row(64, 1.0, 2.0, "torch"), _row(256, 3.0, 2.0, "compiled")]
    (tmp_path / "standard-kernel-cpu.json").write_text(json.dumps({"machine": FACTS, "rows": rows}))
    held = {"machine": FACTS | {"held_to": "avx2"}, "rows": rows}
    (tmp_path / "standard-kernel-cpu-avx2.json").write_text(json.dumps(held))
    page = standard_kernel.page(tmp_path)
    assert "\n## a processor\n" in page
    assert "\n## a processor, held to avx2\n" in page
    assert page.count("| float32 | training | causal | 64 | 0.50 |  | **1.50** |  |  |  |") == 2


@pytest.mark.skipif(library.failure() is not None, reason=f"no kernel: {library.failure()}")
def test_both_kernels_are_timed():
    row = standard_kernel.measure(standard_kernel.Case("float32", True, True, 32, 64), 0.0)
    assert {kernel: len(samples) for kernel, samples in row["seconds"].items()} == {"torch": 5, "compiled": 5}
    assert row["chosen"] == "torch"


def test_a_training_step_shows_standard_attention_with_both_kernels():
    samples = {"float32": {"standard": [0.2], "standard, compiled kernel": [0.1], "mlr:8x8": [0.1]}}
    page = training_step.page(samples, FACTS)
    assert "| precision | `standard` | `standard`, compiled kernel | `mlr:8x8` |" in page
    assert "| float32 | 200 ms (1.00) | 100 ms (2.00) | 100 ms (2.00) |" in page
