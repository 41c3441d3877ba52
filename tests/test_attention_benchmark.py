"""The parts of the CPU benchmark of attention that need no timing: cases, roofs, page."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

from benchmarks import attention, cpu_page, machine, roofs

from structattn.layers import MLRConfig
from tests import machine_facts

GIGA = 1e9
ROOFS = {
    "units": {"float32 FMA": 100 * GIGA, "bfloat16 AVX512_BF16": 50 * GIGA, "bfloat16 AMX": 1000 * GIGA},
    "product_in_cache": {"float32": 90 * GIGA, "bfloat16": 400 * GIGA},
    "memory": 10 * GIGA,
}
FACTS = machine_facts.FACTS | {"load_average_after": [0.0, 0.0, 0.0], "roofs": ROOFS}


def _row(variant, ms, **changes):
    row = {"case": "a case", "variant": variant, "sweep": False, "dtype": "float32", "flops": GIGA}
    return row | {"samples_ms": [ms]} | changes


def test_the_default_is_plain_mlr():
    for length, levels in ((64, 5), (1024, 8)):
        hierarchy = attention.hierarchy("default", length)
        assert hierarchy == MLRConfig().hierarchy(64, length)
        assert hierarchy.levels == levels


def test_every_case_can_be_counted():
    for case in [*attention.CASES, *attention.SWEEP]:
        for variant in case.variants:
            assert 0 < attention.flops(case, variant) <= attention.flops(case, "SDPA")


def test_bytes_of_decode_are_the_keys_and_values_that_the_query_sees():
    case = attention.Case("decode", "bfloat16", 16384)
    assert attention.decode_bytes(case, "SDPA") == attention.decode_bytes(case, "flat") == 2 * 8 * 16384 * 128
    # 16|16|32v@w512|128: level 1 sees everything, the others their windows, in keys and values.
    assert attention.decode_bytes(case, "windows") == 2 * 8 * 2 * (16 * 16384 + 16 * 512 + 32 * 128)


def test_the_fastest_unit_is_the_roof(monkeypatch):
    monkeypatch.setattr(machine, "is_x86", lambda: True)
    assert roofs.product_roof(ROOFS, "float32") == 100 * GIGA
    assert roofs.product_roof(ROOFS, "bfloat16") == 1000 * GIGA
    # Without a unit for it, bfloat16 is multiplied in float32; how on Arm is not known.
    plain = {"units": {"float32 FMA": 100 * GIGA}, "product_in_cache": {"float32": 120 * GIGA, "bfloat16": 20 * GIGA}}
    assert roofs.product_roof(plain, "bfloat16") == 100 * GIGA
    # A product that was faster than the loop shows that the machine was slow then.
    assert roofs.product_roof(plain, "float32") == 120 * GIGA
    monkeypatch.setattr(machine, "is_x86", lambda: False)
    assert roofs.product_roof(plain, "bfloat16") is None


def test_the_higher_of_two_measurements_counts():
    slowed = {"units": {"float32 FMA": 80 * GIGA}, "memory": 12 * GIGA}
    first = {"units": {"float32 FMA": 100 * GIGA}, "memory": 10 * GIGA}
    assert roofs.higher(first, slowed) == {"units": {"float32 FMA": 100 * GIGA}, "memory": 12 * GIGA}


def test_shares_are_rates_over_roofs():
    assert cpu_page.share_of_roof(_row("flat", 20.0), FACTS) == pytest.approx(0.5)
    decode = _row("flat", 2.0, bytes=10_000_000, read_rate=20 * GIGA)
    assert cpu_page.share_of_roof(decode, FACTS) == pytest.approx(0.25)
    # A measurement without roofs has PyTorch's product in their place.
    old = {"roof": {"float32": 50 * GIGA}}
    assert cpu_page.share_of_roof(_row("flat", 20.0), old) == pytest.approx(1.0)


def test_a_page_has_a_section_for_each_machine_and_set_of_instructions(tmp_path):
    rows = [_row("SDPA", 40.0), _row("P32", 20.0), {**_row("flat", 0.0, reason="OutOfMemory"), "case": "a case"}]
    del rows[2]["samples_ms"]
    plain = {name: value for name, value in FACTS.items() if name not in ("held_to", "roofs")}
    documents = {
        "attention-cpu-avx2": FACTS | {"held_to": "avx2", "rows": rows},
        "attention-cpu-old": plain | {"cpu": "an old one", "roof": {"float32": 50 * GIGA}, "rows": rows},
        "attention-cpu": FACTS | {"rows": rows},
    }
    for name, document in documents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    cpu_page.render(tmp_path)
    page = (tmp_path / "attention-cpu.md").read_text()
    headings = [line for line in page.splitlines() if line.startswith("## ")]
    assert headings == ["## a processor", "## a processor, held to avx2", "## an old one"]
    assert "| a case | 40.00 (25%) | 20.00 (2.00; 50%) | - |" in page
    assert "| a case | 40.00 (50%) | 20.00 (2.00; 100%) | - |" in page
    assert "Not measured: flat, a case: OutOfMemory." in page


def test_instructions_are_held_by_a_restart(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(machine.prebuilt, "instructions", lambda: {"avx2"})
    monkeypatch.delenv("OMP_PLACES", raising=False)
    monkeypatch.setattr(sys, "argv", ["attention.py", "--instructions", "avx2"])
    machine.pin_threads("benchmarks.attention", "avx2")
    _, command, environment = started.pop()
    assert command[1:] == ["-m", "benchmarks.attention", "--instructions", "avx2"]
    assert environment["ATEN_CPU_CAPABILITY"] == "avx2"
    assert environment["STRUCTATTN_CXXFLAGS"] == "-march=haswell"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    machine.pin_threads("benchmarks.attention", "avx2")
    assert started == []
    facts = machine.facts()
    assert facts["held_to"] == "avx2"
    assert facts["instructions"] == ["avx2"]
    with pytest.raises(SystemExit, match="this processor has no avx512f"):
        machine.pin_threads("benchmarks.attention", "avx512")


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="roofs.cpp needs Linux and g++")
def test_loops_of_roofs_compile_and_run():
    assert roofs.unit_rate("float32_fma", rounds=1) > 0
    assert roofs.read_rate(2**20, rounds=1) > 0
