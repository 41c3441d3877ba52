"""One battery for every backend: a case in, the op's results against the dense definition in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from structattn.ops import Hierarchy, backends, mlr_attention, operator, reference
from structattn.ops.call import Call
from tests.tolerance import Deviation, deviation

_DROPOUT_SEED = 2**40 + 12345


@dataclass(frozen=True)
class Case:
    """A call of the op, tensors drawn from a seed. `bias` holds the axes (B, Hq, Tq, Tk) that are full."""

    hierarchy: Hierarchy
    query_length: int = 100
    key_length: int | None = None
    query_offset: int = 0
    is_causal: bool = True
    heads: int = 2
    key_heads: int = 2
    value_width: int = 64
    batch: int = 2
    dtype: torch.dtype = torch.float32
    bias: tuple[bool, bool, bool, bool] | None = None
    key_start: tuple[int, ...] | None = None
    key_end: tuple[int, ...] | None = None
    scale: float | None = None
    strided: bool = False
    dropout_p: float = 0.0  # the same entries are dropped on every backend: the seed is given
    device: str = "cpu"  # where the backend runs; the definition runs on the CPU

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        """Query, key, value and bias in the case's dtype: each backend and the definition get the same numbers."""
        generator = torch.Generator().manual_seed(seed)
        keys = self.query_length if self.key_length is None else self.key_length
        shapes = {
            "query": (self.batch, self.heads, self.query_length, self.hierarchy.rank),
            "key": (self.batch, self.key_heads, keys, self.hierarchy.rank),
            "value": (self.batch, self.key_heads, keys, self.value_width),
        }
        if self.bias is not None:
            full = (self.batch, self.heads, self.query_length, keys)
            shapes["bias"] = tuple(size if used else 1 for size, used in zip(full, self.bias, strict=True))
        drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        return {name: self._laid_out(tensor.to(self.dtype)) for name, tensor in drawn.items()}

    def _laid_out(self, tensor: Tensor) -> Tensor:
        """Lay a tensor out as a projection layer leaves it.

        That is (B, T, H, w) seen as (B, H, T, w), with a gap after each row if strided.
        """
        if not self.strided:
            return tensor
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan, dtype=tensor.dtype).transpose(1, 2)
        wide = wide.contiguous().transpose(1, 2)
        wide[..., :-3] = tensor
        return wide[..., :-3]


def results(case: Case, backend: str | None, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Output and gradients; `backend` None is the definition itself, differentiated by autograd."""
    device = "cpu" if backend is None else case.device
    inputs = {name: tensor.to(device, dtype or case.dtype).detach() for name, tensor in case.tensors().items()}
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    bounds = (case.key_start, case.key_end)
    start, end = (None if bound is None else torch.tensor(bound, device=device) for bound in bounds)
    if backend is None or case.dropout_p:
        scale = case.hierarchy.rank**-0.5 if case.scale is None else case.scale
        # The state of a generator is its device's own, so the seed is given, as the operator takes it.
        seed = torch.tensor(_DROPOUT_SEED, device=device) if case.dropout_p else None
        tensors = (leaves["query"], leaves["key"], leaves["value"], leaves.get("bias"), start, end, seed)
        call = Call(*tensors, case.hierarchy, case.is_causal, scale, case.query_offset, case.dropout_p)
        out = reference.forward(call)[0] if backend is None else operator.attend(call, backend)
    else:
        out = mlr_attention(
            leaves["query"],
            leaves["key"],
            leaves["value"],
            case.hierarchy,
            is_causal=case.is_causal,
            scale=case.scale,
            attn_bias=leaves.get("bias"),
            key_start=start,
            key_end=end,
            query_offset=case.query_offset,
            enable_gqa=case.heads != case.key_heads,
            backend=backend,
        )
    upstream = _upstream(case).to(device, out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), upstream)
    named = {"output": out.detach()} | dict(zip([f"{name} gradient" for name in leaves], grads, strict=True))
    return {name: tensor.cpu() for name, tensor in named.items()}


def definition(
    query: Tensor, key: Tensor, value: Tensor, hierarchy: Hierarchy, **options: object
) -> tuple[Tensor, Tensor]:
    """Return what the definition gives in float64 and in the tensors' own dtype, for `assert_calibrated`."""
    exact, plain = (
        mlr_attention(*(x.to(dtype) for x in (query, key, value)), hierarchy, backend="reference", **options)
        for dtype in (torch.float64, query.dtype)
    )
    return exact, plain


def _upstream(case: Case) -> Tensor:
    """The gradient that reaches the output, the same numbers for every backend and dtype."""
    shape = (case.batch, case.heads, case.query_length, case.value_width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(case.dtype)


def largest_terms(case: Case) -> dict[str, float]:
    """The largest of the terms that each result sums, before they cancel.

    A score's gradient is `p · (dp - Σ p dp)` with `dp = upstream · value`: where one key takes all, it is a difference
    of equal numbers, each as far from the truth as the terms of its dot product are large.
    """
    top = {
        name: float(tensor.double().abs().max()) if tensor.numel() else 0.0 for name, tensor in case.tensors().items()
    }
    value = case.tensors()["value"].double().repeat_interleave(case.heads // case.key_heads, 1)
    upstream = _upstream(case).double()
    score_grad = float((upstream.abs() @ value.abs().mT).max())
    factor = max(map(abs, case.hierarchy.gains)) * abs(case.hierarchy.rank**-0.5 if case.scale is None else case.scale)
    terms = {
        "output": top["value"],
        "query gradient": score_grad * top["key"] * factor,
        "key gradient": score_grad * top["query"] * factor,
        "value gradient": float(upstream.abs().max()),
        "bias gradient": score_grad,
    }
    return {name: term / (1 - case.dropout_p) for name, term in terms.items()}


def deviations(case: Case, backend: str) -> list[Deviation]:
    """Compare a backend's output and gradients with the definition.

    Plain PyTorch in the same dtype sets tolerances.
    """
    return compare(case, results(case, backend))


def compare(case: Case, actual: dict[str, Tensor]) -> list[Deviation]:
    """Compare what `results` gave with the definition."""
    exact, plain, terms = results(case, None, torch.float64), results(case, None), largest_terms(case)
    return [deviation(each, exact[name], plain[name], name, terms[name]) for name, each in actual.items()]


def check(case: Case, backend: str) -> None:
    """Assert that each of `deviations` is allowed."""
    for each in deviations(case, backend):
        each.check()


DEEP = Hierarchy.dyadic((32, 8, 6, 4, 4, 4, 4, 2), 1024, "mean")
EQUAL = Hierarchy.dyadic((8,) * 8, 1024)
FLAT = Hierarchy.flat(64)
SMALL = Hierarchy((3, 2, 1), (None, 64, 16), (1.0, 0.5, 2.0))
ODD = Hierarchy((16, 24, 16, 8), (None, 96, 48, 12), "mean")
NEAR = Hierarchy((16, 16, 24, 8), None, "mean", windows=(None, 200, 70, 9), value_ranks=(24, 0, 24, 16))
SLIDING = Hierarchy((64,), windows=(33,))
WITHIN = Hierarchy((5, 9, 2), None, (1.0, -0.5, 0.7), windows=(150, 64, 1), value_ranks=(3, 5, 56))
BLOCK_VALUES = Hierarchy((16, 24, 16, 8), (None, 96, 48, 12), "mean", value_ranks=(20, 12, 32, 0))
SINKS = Hierarchy((64,), windows=(33,), sinks=4)
SINKS_AND_LEVELS = Hierarchy(
    (16, 16, 24, 8), None, "mean", windows=(150, 70, 30, 9), value_ranks=(24, 0, 24, 16), sinks=5
)
HIERARCHIES = {
    "flat": FLAT,
    "deep": DEEP,
    "equal": EQUAL,
    "small": SMALL,
    "odd": ODD,
    "near": NEAR,
    "sliding": SLIDING,
    "within": WITHIN,
    "block-values": BLOCK_VALUES,
}


def cases() -> dict[str, Case]:
    """The table of cases: one line per promise of the op."""
    base = Case(DEEP)
    table: dict[str, Case] = {}
    for name, hierarchy in HIERARCHIES.items():
        for length in (1, 2, 7, 63, 64, 65, 100, 257, 1023):
            for is_causal in (True, False):
                batch, heads = (1, 1) if length > 300 else (2, 2)
                mask = "causal" if is_causal else "full"
                table[f"{name}-{length}-{mask}"] = Case(
                    hierarchy, length, is_causal=is_causal, batch=batch, heads=heads, key_heads=heads
                )
    for is_causal in (True, False):
        mask = "causal" if is_causal else "full"
        for queries, keys, offset in ((1, 257, 256), (5, 100, 95), (64, 300, 130), (100, 257, 3), (33, 70, 0)):
            table[f"offset-{queries}-{keys}-{offset}-{mask}"] = replace(
                base, query_length=queries, key_length=keys, query_offset=offset, is_causal=is_causal
            )
        table[f"padding-{mask}"] = replace(
            base, batch=4, key_start=(0, 7, 0, 31), key_end=(100, 100, 61, 90), is_causal=is_causal
        )
        table[f"padding-odd-{mask}"] = replace(
            base,
            hierarchy=ODD,
            batch=3,
            query_length=257,
            key_start=(0, 50, 200),
            key_end=(257, 257, 255),
            is_causal=is_causal,
        )
        table[f"padding-offset-{mask}"] = replace(
            base, batch=3, query_length=40, key_length=100, query_offset=60, key_start=(0, 70, 99), is_causal=is_causal
        )
        table[f"empty-row-{mask}"] = replace(
            base, batch=3, key_start=(0, 50, 100), key_end=(100, 50, 100), is_causal=is_causal
        )
        table[f"bias-full-{mask}"] = replace(base, bias=(True, True, True, True), is_causal=is_causal)
        # Late queries whose window lies behind the last valid key.
        table[f"sliding-padding-{mask}"] = Case(SLIDING, 300, key_end=(50, 300), is_causal=is_causal)
        table[f"sliding-empty-row-{mask}"] = Case(SLIDING, 300, key_end=(0, 300), is_causal=is_causal)
        # Scores too large for one shift of all powers.
        for name, hierarchy in (("", DEEP), ("windows-", NEAR)):
            table[f"{name}large-scores-{mask}"] = Case(hierarchy, 257, scale=0.5, is_causal=is_causal)
    table["sliding-queries-past-keys"] = Case(SLIDING, 300, key_length=33, is_causal=False)
    table["queries-past-keys"] = replace(base, query_length=70, key_length=33, is_causal=False)
    for name, key_heads in (("8:2", 2), ("8:1", 1)):
        table[f"gqa-{name}"] = replace(base, heads=8, key_heads=key_heads)
        table[f"gqa-{name}-bias"] = replace(base, heads=8, key_heads=key_heads, bias=(False, True, True, True))
    for width in (16, 96):
        table[f"value-width-{width}"] = replace(base, value_width=width)
    for axis in range(4):
        full = tuple(at == axis for at in range(4))
        table[f"bias-axis-{axis}"] = replace(base, bias=full, batch=3, key_start=(0, 3, 9), key_end=(100, 90, 100))
    table["bias-no-axis"] = replace(base, bias=(False, False, False, False))
    for name in ("near", "within", "block-values"):
        _add_levels_in_values(table, name, HIERARCHIES[name])
    _add_sinks(table)
    table["strided"] = replace(base, strided=True, query_length=257, bias=(True, False, True, True))
    table["scale"] = replace(base, scale=-0.3)
    return table


def _add_levels_in_values(table: dict[str, Case], name: str, hierarchy: Hierarchy) -> None:
    """Add the cases of offsets, padding, groups, biases and widths for one hierarchy."""
    prefix = "windows" if name == "near" else name
    base = Case(hierarchy)
    for is_causal in (True, False):
        mask = "causal" if is_causal else "full"
        table[f"{prefix}-offset-{mask}"] = replace(
            base, query_length=100, key_length=357, query_offset=203, is_causal=is_causal
        )
        table[f"{prefix}-padding-{mask}"] = replace(
            base,
            batch=4,
            query_length=257,
            key_start=(0, 50, 200, 257),
            key_end=(257, 257, 255, 257),
            is_causal=is_causal,
        )
        table[f"{prefix}-bias-{mask}"] = replace(base, bias=(True, True, True, True), is_causal=is_causal)
    table[f"{prefix}-gqa-bias"] = replace(base, heads=4, key_heads=2, bias=(False, True, True, True))
    table[f"{prefix}-padding-offset"] = replace(
        base, batch=3, query_length=40, key_length=100, query_offset=60, key_start=(0, 70, 99)
    )
    table[f"{prefix}-queries-past-keys"] = replace(base, query_length=170, key_length=33, is_causal=False)
    table[f"{prefix}-strided"] = replace(base, strided=True, query_length=257)


def _add_sinks(table: dict[str, Case]) -> None:
    """Add the cases of sinks: windows and levels, padding on both sides, offsets, groups and biases."""
    for is_causal in (True, False):
        mask = "causal" if is_causal else "full"
        base = Case(SINKS_AND_LEVELS, is_causal=is_causal)
        table[f"sinks-257-{mask}"] = Case(SINKS, 257, is_causal=is_causal)
        table[f"sinks-levels-257-{mask}"] = replace(base, query_length=257)
        # Rows that end among the sinks, or before the first.
        table[f"sinks-padding-{mask}"] = replace(
            base, batch=5, query_length=200, key_start=(0, 50, 0, 196, 200), key_end=(200, 190, 3, 200, 200)
        )
        table[f"sinks-offset-{mask}"] = replace(
            base, batch=3, query_length=40, key_length=100, query_offset=60, key_start=(0, 57, 98)
        )
        table[f"sinks-gqa-bias-{mask}"] = replace(
            base, heads=4, bias=(False, True, True, True), key_start=(0, 7), key_end=(100, 97)
        )


def names() -> list[str]:
    """Backends that serve this machine's CPU; the GPU's has `test_triton.py`."""
    return [status.name for status in backends() if status.eligible and status.name != "triton"]
