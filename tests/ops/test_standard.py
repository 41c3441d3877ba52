"""Standard attention: which kernel serves a call, and that all of them agree."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from structattn import Hierarchy, mlr_attention
from structattn.ops import standard
from structattn.ops.cpu import library
from structattn.ops.key_span import KeySpan
from structattn.ops.standard import faster_kernel, standard_attention
from tests.tolerance import assert_calibrated

needs_kernel = pytest.mark.skipif(library.failure() is not None, reason=f"no kernel: {library.failure()}")
LONG = 256


def tensors(length=LONG, dtype=torch.float32, *, heads=2, key_heads=None, width=16, training=False):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, length, width) for count in (heads, key_heads or heads, key_heads or heads)]
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [each.requires_grad_() for each in made] if training else made


@pytest.fixture
def measured(monkeypatch):
    """A machine with a kernel, on which it has been measured."""
    monkeypatch.setattr(standard, "_has_measured_kernel", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def results(call, inputs, dtype):
    """Return the output of a call and its gradients."""
    inputs = [each.detach().to(dtype).requires_grad_() for each in inputs]
    out = call(*inputs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


@needs_kernel
@pytest.mark.parametrize("kernel", ["auto", "torch", "compiled"])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_agree_with_the_definition(kernel, is_causal, dtype):
    inputs = tensors(300, dtype)

    def plain(query, key, value):
        hierarchy = Hierarchy.flat(query.shape[-1])
        return mlr_attention(query, key, value, hierarchy, is_causal=is_causal, scale=0.3, backend="reference")

    def chosen(query, key, value):
        return standard_attention(query, key, value, is_causal=is_causal, scale=0.3, kernel=kernel)

    each = results(chosen, inputs, dtype), results(plain, inputs, torch.float64), results(plain, inputs, dtype)
    for name, *tensors_of in zip(("out", "query", "key", "value"), *each, strict=True):
        assert_calibrated(*tensors_of, what=name, largest_term=4.0)


@pytest.mark.parametrize("training", [True, False])
def test_torch_is_pytorch_s_kernel_to_the_bit(measured, training):
    query, key, value = tensors(training=training)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert torch.equal(standard_attention(query, key, value, is_causal=True, kernel="torch"), expected)


@needs_kernel
def test_the_faster_kernel_serves_by_default(measured, monkeypatch):
    served = []
    monkeypatch.setattr(standard, "mlr_attention", lambda *_, backend, **__: served.append(backend))
    monkeypatch.setattr(standard.F, "scaled_dot_product_attention", lambda *_, **__: served.append("torch"))
    for length in (LONG, LONG - 1):
        standard_attention(*tensors(length), is_causal=True)
    standard_attention(*tensors(LONG), is_causal=True, kernel="torch")
    standard_attention(*tensors(8), is_causal=True, kernel="compiled")
    assert served == ["cpu", "torch", "torch", "cpu"]


def test_the_choice_follows_dtype_training_mask_and_length(measured):
    def choice(length=LONG, dtype=torch.float32, is_causal=True, **options):
        return faster_kernel(*tensors(length, dtype, heads=8, **options), is_causal=is_causal)

    assert choice() == choice(training=True) == "compiled"
    assert choice(is_causal=False) == choice(training=True, is_causal=False) == "torch"
    assert choice(LONG - 1) == "torch"
    assert choice(dtype=torch.bfloat16) == "torch"
    assert choice(128, torch.bfloat16, training=True) == "compiled"
    assert choice(128, torch.bfloat16, training=True, is_causal=False) == "compiled"
    assert choice(64, torch.bfloat16, training=True) == "torch"
    assert choice(dtype=torch.float64) == choice(dtype=torch.float16) == "torch"
    assert choice(key_heads=2) == "torch"
    with torch.no_grad():
        assert choice(128, torch.bfloat16, training=True) == "torch"
    with torch.autocast("cpu", torch.bfloat16):
        assert choice() == "torch"
        assert choice(training=True) == "compiled"


def test_fewer_heads_than_threads_are_left_to_pytorch(measured, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert faster_kernel(*tensors(heads=2), is_causal=True) == "torch"
    assert faster_kernel(*tensors(heads=3), is_causal=True) == "compiled"


def test_other_devices_compilers_and_transforms_are_left_to_pytorch(measured, monkeypatch):
    inputs = tensors()
    assert faster_kernel(*(each.to("meta") for each in inputs), is_causal=True) == "torch"
    choices = []

    def attend(*qkv):
        choices.append(faster_kernel(*qkv, is_causal=True))
        return qkv[0].sum()

    torch.func.grad(attend)(*inputs)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    attend(*inputs)
    assert choices == ["torch", "torch"]


def test_calls_that_pytorch_does_not_serve_go_to_the_op(measured):
    """The choice is among kernels that serve a call: `torch` keeps no scores in memory either."""
    query, key, value = tensors(40)
    span = KeySpan(key_start=torch.tensor([3]))
    exact = standard_attention(query.double(), key.double(), value.double(), span, is_causal=True)
    for kernel in ("auto", "torch"):
        out = standard_attention(query, key, value, span, is_causal=True, kernel=kernel)
        torch.testing.assert_close(out, exact.float())


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel must be one of auto, torch, compiled, got 'torhc'"):
        standard_attention(*tensors(4), kernel="torhc")


def test_a_named_kernel_that_cannot_serve_says_why():
    with pytest.raises(ValueError, match=r"cannot serve this call: it serves float32, bfloat16 and float16"):
        standard_attention(*tensors(4, torch.float64), kernel="compiled")
    with pytest.raises(ValueError, match="kernel 'compiled' needs tensors on a CPU or a CUDA device, got meta"):
        standard_attention(*(each.to("meta") for each in tensors(4)), kernel="compiled")


WITHOUT = """
import torch
from structattn.ops.standard import faster_kernel, standard_attention
import torch.nn.functional as F
query = torch.randn(1, 8, 512, 16)
assert faster_kernel(query, query, query, is_causal=True) == "torch"
out = standard_attention(query, query, query, is_causal=True)
assert torch.equal(out, F.scaled_dot_product_attention(query, query, query, is_causal=True))
"""


def test_without_a_compiler_nothing_changes_and_nothing_is_said(tmp_path):
    environment = os.environ | {
        "CXX": "no-such-compiler",
        "STRUCTATTN_CACHE": str(tmp_path),
        "STRUCTATTN_KERNEL": "source",
    }
    environment["OMP_NUM_THREADS"] = "1"  # calls with fewer heads than threads are left to PyTorch in any case
    command = [sys.executable, "-W", "error::UserWarning", "-c", WITHOUT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
