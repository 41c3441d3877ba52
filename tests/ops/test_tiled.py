"""The tiled backend's promises beside correctness: memory O(T), and FLOPs that follow the formula."""

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from structattn import Hierarchy
from structattn.ops import tiled
from structattn.ops.call import Call
from tests.ops.battery import Case, results

EQUAL = (8,) * 8


def _call(length, hierarchy, heads=1):
    query, key, value = (torch.randn(1, heads, length, 64) for _ in range(3))
    return Call(query, key, value, None, None, None, None, hierarchy, True, 0.125, 0, 0.0)


class _Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.untyped_storage().size() // tensor.element_size())
        return result


@pytest.mark.parametrize("hierarchy", [Hierarchy.flat(64), Hierarchy.dyadic(EQUAL, 4096)], ids=str)
def test_no_tensor_grows_with_the_square_of_the_length(hierarchy):
    length = 4096
    call = _call(length, hierarchy)
    with _Largest() as largest:
        out, lse = tiled.forward(call)
        tiled.backward(call, torch.ones_like(out), out, lse, needs_bias_grad=False)
    assert largest.entries <= length * 64


@pytest.mark.slow
def test_memory_of_a_long_sequence():
    """Forward and backward at 65,536 tokens, one head of 64, float32: under 1 GiB above the inputs."""
    program = f"""
import resource, torch
from structattn import Hierarchy, mlr_attention
from structattn.ops import reference
hierarchy = Hierarchy.dyadic({EQUAL}, 65_536)
def step(length):
    inputs = [torch.randn(1, 1, length, 64, requires_grad=True) for _ in range(3)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mlr_attention(*inputs, hierarchy, is_causal=True, backend="tiled").sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
step(256)
print(step(65_536) / 2**20)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 1.0


def _baddbmm_flop(_, first, second, *args, **kwargs):
    """PyTorch's counter knows the product that returns a new tensor, not the one in place."""
    (batch, rows, inner), columns = first, second[2]
    return 2 * batch * rows * inner * columns


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("64", 1.1),
        ("8x8@4096", 1.1),
        ("32|8|6|4|4|4|4|2@4096", 1.1),
        ("8x8v@4096", 1.15),
        ("16|16|32v@w512|128", 1.4),
        ("64@w512", 1.3),
    ],
)
def test_executed_flops_follow_the_formula(text, most):
    """Only visible pairs are multiplied, but for the edges of windows and of the causal mask.

    A tile is multiplied whole where an edge crosses it.
    """
    length, width = 4096, 64
    hierarchy = Hierarchy.parse(text)
    call = _call(length, hierarchy)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: _baddbmm_flop})
    with counter:
        out, lse = tiled.forward(call)
    mixing = hierarchy.mixing_flops(length, value_dim=width, is_causal=True)
    scores = hierarchy.score_flops(length, is_causal=True)
    needed = scores + mixing
    assert needed <= counter.get_total_flops() <= most * needed
    with counter:
        tiled.backward(call, torch.ones_like(out), out, lse, needs_bias_grad=False)
    needed = 3 * scores + 2 * mixing
    assert needed <= counter.get_total_flops() <= most * needed


@pytest.mark.parametrize("length", [100, 128, 500])
def test_results_do_not_depend_on_how_rows_are_parted(monkeypatch, length):
    case = Case(Hierarchy.dyadic(EQUAL, 256), length, batch=5, bias=(True, True, True, True))
    whole = results(case, "tiled")
    monkeypatch.setattr(tiled, "_SCORES", 1)
    for name, value in results(case, "tiled").items():
        torch.testing.assert_close(value, whole[name], msg=name)
