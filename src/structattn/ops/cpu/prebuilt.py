"""Choose among the compiled libraries that a wheel brings.

There is one for each instruction set, a whole library of the same sources (csrc). A process loads one. An installation
from source has none.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "prebuilt"
_AVX2 = frozenset(("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"))
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
# Best first, each with what Linux calls the instructions it needs: x86-64-v4 with products of bfloat16, x86-64-v4,
# x86-64-v3, and NEON, which every Arm machine of 64 bits has.
NEEDS = {"avx512_bf16": _AVX512 | {"avx512_bf16"}, "avx512": _AVX512, "avx2": _AVX2, "neon": frozenset(("asimd",))}
# Intel's AVX512_BF16 multiplies no faster than its float32 units: docs/results/attention-cpu.md has both.
_SLOW_BFLOAT16 = "GenuineIntel"


def choose(named: str = "") -> Path | None:
    """Return the named library, the best for this machine, or None.

    Raises:
        ValueError: the named library is not there, or needs instructions that the machine lacks.
    """
    if named:
        return _checked(named)
    slow = {"avx512_bf16"} if _reported("vendor_id") == [_SLOW_BFLOAT16] else set()
    paths = (_path(name) for name in NEEDS if name not in slow and not _lacking(name))
    return next((path for path in paths if path.exists()), None)


def _path(name: str) -> Path:
    return FOLDER / f"{name}.so"


def _checked(name: str) -> Path:
    if name not in NEEDS or not _path(name).exists():
        there = ", ".join(each for each in NEEDS if _path(each).exists()) or "none"
        raise ValueError(
            f"STRUCTATTN_KERNEL must be 'source' or one of the kernels of this installation ({there}), got {name!r}"
        )
    lacking = _lacking(name)
    if lacking:
        raise ValueError(f"STRUCTATTN_KERNEL={name} needs instructions that this machine lacks: {', '.join(lacking)}")
    return _path(name)


def _lacking(name: str) -> list[str]:
    return sorted(NEEDS[name] - instructions())


def instructions() -> set[str]:
    """Return the instruction sets that Linux reports; none on other systems."""
    return set(_reported("flags") or _reported("Features"))


def _reported(key: str) -> list[str]:
    """Return the words under a key of the first processor in /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return next((line.partition(":")[2].split() for line in lines if line.startswith(key)), [])
