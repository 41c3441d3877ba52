"""The operators of the compiled library, called with no Python in between.

They refuse what would reach past a tensor's memory, agree with the operators in Python, and hand back to Python what
the kernel does not serve.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from structattn import Hierarchy, mlr_attention
from structattn.ops import mlr_decode, schema
from structattn.ops.attention import attend_with_lse
from structattn.ops.cpu import library
from tests.ops.battery import HIERARCHIES
from tests.ops.drawn import drawn_hierarchies
from tests.tolerance import assert_calibrated

pytestmark = pytest.mark.skipif(library.failure() is not None, reason=f"no kernel: {library.failure()}")
needs_derivatives = pytest.mark.skipif(
    not library.state.differentiates, reason="derivatives in C++ come with a build from source"
)
Q, K, V = torch.randn(2, 4, 10, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 5)
LSE = torch.zeros(2, 4, 10)
OUT = torch.zeros(2, 4, 10, 5)
TEXT = "4|2|2@8|4"


def attention_arguments(**changes):
    arguments = {
        "query": Q,
        "key": K,
        "value": V,
        "bias": None,
        "key_start": None,
        "key_end": None,
        "seed": None,
        "hierarchy": "4|2|2@*|8|4",
        "is_causal": True,
        "scale": 0.3,
        "query_offset": 2,
        "dropout_p": 0.0,
    }
    return list((arguments | changes).values())


BAD = {
    "query-axes": ({"query": Q[0]}, "query must have shape"),
    "key-batch": ({"key": K[:1]}, "key must have shape"),
    "key-width": ({"key": K[..., :7]}, "key must have shape"),
    "key-dtype": ({"key": K.bfloat16()}, "key must have the query's dtype"),
    "key-heads": ({"key": K[:, :0], "value": V[:, :0]}, "key heads must divide"),
    "value-length": ({"value": V[:, :, :11]}, "value must have shape"),
    "value-heads": ({"value": V[:, :1]}, "value must have shape"),
    "width": ({"query": Q[..., :0], "key": K[..., :0]}, "query must have a width of at least 1"),
    "bias-axes": ({"bias": torch.zeros(10, 12)}, "bias must have shape"),
    "bias-shape": ({"bias": torch.zeros(1, 1, 10, 10)}, "bias must broadcast"),
    "bias-dtype": ({"bias": torch.zeros(1, 1, 1, 1).half()}, "bias must be float32"),
    "start-shape": ({"key_start": torch.tensor([0])}, "key_start must have one entry per row"),
    "start-dtype": ({"key_start": torch.tensor([0, 0], dtype=torch.int32)}, "key_start must be int64"),
    "start-negative": ({"key_start": torch.tensor([0, -1])}, "key_start = -1, key_end = 12 in row 1"),
    "end-past": ({"key_end": torch.tensor([13, 12])}, "key_end = 13 in row 0"),
    "offset": ({"query_offset": 3}, "query_offset must be between 0 and 2, got 3"),
    "offset-negative": ({"query_offset": -1}, "query_offset must be between 0 and 2, got -1"),
    "dropout-seed": ({"dropout_p": 0.5}, "dropout needs a seed"),
    "dropout-share": ({"dropout_p": 1.5}, "dropout_p must be"),
    "seed-dtype": ({"dropout_p": 0.5, "seed": torch.tensor(1.0)}, "seed must be one int64"),
    "seed-empty": ({"seed": torch.zeros(0, dtype=torch.int64)}, "seed must be one int64"),
}
BAD_TEXTS = [
    "", "8@", "4|2|2", "4|2|2@*|8", "4|2|2@*|8|3", "4|2|2@*|4|8", "4|2|2@8|4|2", "4|2|2@*|8|-4", "4|2|2@*|8|0",
    "4|4@w8|8", "4|4@w*|9|3", "4|2|2@*|8|4/1|2", "4|2|2@*|8|4/1|2|x", "4|2|2@*|8|4/1|2|3y", "4|2|2v5|0@*|8|4", "9",
    "4|2|2v4|2|2@*|8|4", "4|2|2@*|8|99999999999999999999", "4|2|2@*|8|4@", "8@0", "4|2|2@x", "0|8@*|4",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_attention_refuses(name):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        torch.ops.structattn_cpu.attention(*attention_arguments(**changes))
    with pytest.raises(ValueError, match=message):
        torch.ops.structattn_cpu.attention_backward(OUT, OUT, LSE, False, *attention_arguments(**changes))


@pytest.mark.parametrize("text", BAD_TEXTS)
def test_attention_refuses_a_text_that_is_no_hierarchy_of_the_call(text):
    with pytest.raises(ValueError):
        torch.ops.structattn_cpu.attention(*attention_arguments(hierarchy=text))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("grad_out", {"grad_out": OUT[:, :, :9]}),
        ("grad_out", {"grad_out": OUT.double()}),
        ("out", {"out": OUT[..., :4]}),
        ("lse", {"lse": LSE[:1]}),
        ("lse", {"lse": LSE.bfloat16()}),
    ],
)
def test_backward_refuses(name, change):
    results = {"grad_out": OUT, "out": OUT, "lse": LSE} | change
    with pytest.raises(ValueError, match=f"{name} must"):
        torch.ops.structattn_cpu.attention_backward(*results.values(), False, *attention_arguments())


def decode_arguments(**changes):
    arguments = {
        "query": torch.randn(1, 2, 1, 6),
        "key_levels": [torch.randn(1, 2, width, 12) for width in (4, 2)],
        "value_levels": [torch.randn(1, 2, 12, 3)],
        "key_start": None,
        "hierarchy": "4|2@*|8",
        "key_length": 11,
        "level_starts": [0, 0],
        "scale": 0.3,
    }
    return list((arguments | changes).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.randn(1, 2, 1, 5)}, "query must have shape"),
        ({"query": torch.randn(2, 2, 1, 6)}, "value_levels.* must have shape"),
        ({"key_levels": [torch.randn(1, 2, 4, 12)]}, "one entry per level"),
        ({"key_levels": [torch.randn(1, 2, 4, 10), torch.randn(1, 2, 2, 12)]}, r"key_levels\[0\] must hold"),
        ({"key_levels": [torch.randn(1, 2, 4, 12), torch.randn(1, 2, 3, 12)]}, "key_levels must have shape"),
        ({"value_levels": [torch.randn(1, 2, 9, 3)]}, r"value_levels\[0\] must have width 3 and hold 11"),
        ({"value_levels": [torch.randn(1, 3, 12, 3)]}, "key heads must divide"),
        ({"hierarchy": "4|2v2|1@*|8"}, r"value_levels\[0\] must have width 2"),
        ({"key_length": 0}, "key_length must be at least"),
        ({"level_starts": [1, 0]}, r"level_starts\[0\] must be between 0 and 0"),
        ({"level_starts": [0, 9]}, r"level_starts\[1\] must be between 0 and 8"),
        ({"level_starts": [0, -1]}, r"level_starts\[1\] must be between 0 and 8, .* got -1"),
        ({"key_start": torch.tensor([12])}, "key_start must be between 0 and key_length"),
        ({"key_start": torch.tensor([1, 1])}, "key_start must have one entry per row"),
    ],
)
def test_decode_refuses(change, message):
    torch.ops.structattn_cpu.decode(*decode_arguments())
    with pytest.raises(ValueError, match=message):
        torch.ops.structattn_cpu.decode(*decode_arguments(**change))


# --- one schema, one text form ----------------------------------------------------------------------------------------


def test_schemas_in_cpp_are_those_of_python():
    """C++ counts its arguments, but takes their order and their types on trust."""
    pairs = {"mlr_attention": "attention", "mlr_attention_backward": "attention_backward", "mlr_decode": "decode"}
    for python, cpp in pairs.items():
        theirs = getattr(torch.ops.structattn_cpu, cpp).default._schema
        ours = getattr(torch.ops.structattn, python).default._schema
        described = [
            [(argument.name, str(argument.type).replace("SymInt", "int")) for argument in schema.arguments]
            for schema in (theirs, ours)
        ]
        assert described[0] == described[1][:-1]
        assert described[1][-1] == ("backend", "str")
        assert [str(each.type) for each in theirs.returns] == [str(each.type) for each in ours.returns]


def test_every_hierarchy_is_read_as_python_reads_it():
    """Each level's reach, rank and gain shows in the output."""

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(drawn_hierarchies())
    def run(drawn):
        hierarchy, width = drawn
        tensors = [torch.randn(1, 1, 100, wide) for wide in (hierarchy.rank, hierarchy.rank, width)]
        arguments = [*tensors, None, None, None, None, hierarchy.text, True, 1.0, 0, 0.0]
        out, _ = torch.ops.structattn_cpu.attention(*arguments)
        plain, exact = (
            mlr_attention(
                *(each.to(dtype) for each in tensors), hierarchy, is_causal=True, scale=1.0, backend="reference"
            )
            for dtype in (torch.float32, torch.float64)
        )
        assert_calibrated(out, exact, plain, largest_term=float(tensors[2].abs().max()))

    run()


@pytest.mark.parametrize("hierarchy", HIERARCHIES.values(), ids=HIERARCHIES)
def test_text_forms(hierarchy):
    assert schema.hierarchy_of(hierarchy.text) == hierarchy


# --- what the kernel does not serve -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "backend", "text"),
    [
        (torch.float64, "auto", "4|2|2@*|8|4"),
        (torch.float32, "tiled", "4|2|2@*|8|4"),
        (torch.float64, "auto", "4|2|2@w9|7|4+3"),
        (torch.float32, "tiled", "4|2|2@w9|7|4+3/mean"),
    ],
    ids=str,
)
def test_python_serves_the_rest(dtype, backend, text):
    tensors = [tensor.to(dtype).requires_grad_() for tensor in (Q, K, V)]
    options = [text, True, 0.3, 2, 0.0]
    out, lse = torch.ops.structattn.mlr_attention(*tensors, None, None, None, None, *options, backend)
    expected = mlr_attention(
        *tensors,
        Hierarchy.parse(options[0]),
        is_causal=True,
        scale=0.3,
        query_offset=2,
        enable_gqa=True,
        backend="tiled",
    )
    assert lse.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    upstream = torch.randn_like(out)
    grads = (torch.autograd.grad(each, tensors, upstream) for each in (out, expected))
    for actual, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("text", ["4|2|2@w9|7|4+3", "4|2|2@w9|7|4+3/1.0|1e-05|1e+20"])
def test_the_kernel_has_no_sinks(text):
    with pytest.raises(ValueError, match=r"expected an integer, got '4\+3'"):
        torch.ops.structattn_cpu.attention(Q, K, V, None, None, None, None, text, True, 0.3, 2, 0.0)


def test_a_large_gain_is_no_sink():
    """Its text has a plus sign, too."""
    options = ["4|2|2@*|8|4/1.0|1e-05|1e+20", True, 1e-19, 2, 0.0]
    out, _ = torch.ops.structattn.mlr_attention(Q, K, V, None, None, None, None, *options, "auto")
    kernel, _ = torch.ops.structattn_cpu.attention(Q, K, V, None, None, None, None, *options)
    assert torch.equal(out, kernel)


def test_an_error_in_python_keeps_its_message():
    options = ["4|2|2@*|8|4", True, 0.3, 2, 0.0]
    tensors = [tensor.double() for tensor in (Q, K, V)]
    with pytest.raises(
        ValueError, match="backend 'cpu' cannot serve this call: it serves float32, bfloat16 and float16"
    ):
        torch.ops.structattn.mlr_attention(*tensors, None, None, None, None, *options, "cpu")
    with pytest.raises(RuntimeError, match=r"^split_with_sizes"):
        torch.ops.structattn.mlr_attention(
            tensors[0], tensors[1][..., :3], *tensors[2:], *[None] * 4, *options, "reference"
        )


def test_python_decodes_what_the_kernel_does_not():
    call = decode_arguments()
    wide = [call[0].double(), *([tensor.double() for tensor in tensors] for tensors in call[1:3]), *call[3:]]
    out = torch.ops.structattn.mlr_decode(*wide, "auto")
    torch.testing.assert_close(out.float(), torch.ops.structattn.mlr_decode(*call, "auto"), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="it serves float32"):
        torch.ops.structattn.mlr_decode(*wide, "cpu")


# --- derivatives in C++ -----------------------------------------------------------------------------------------------


def leaves():
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 10, 8), (2, 2, 12, 8), (2, 2, 12, 5), (2, 1, 10, 12)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def attend(query, key, value, bias, backend="auto"):
    return mlr_attention(
        query, key, value, Hierarchy.parse(TEXT.replace("@", "@*|")), is_causal=True, query_offset=2, attn_bias=bias,
        enable_gqa=True, key_start=torch.tensor([0, 3]), backend=backend,
    )  # fmt: skip


def differentiate(attend_, given, wanted=None):
    out = attend_(*given)
    upstream = torch.linspace(-1, 1, out.numel()).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, wanted or given, upstream)]


@needs_derivatives
def test_autograd_in_cpp_is_that_of_python(monkeypatch):
    given = leaves()
    in_cpp = differentiate(attend, given)
    monkeypatch.setattr(library.state, "differentiates", False)
    in_python = differentiate(attend, given)
    for actual, expected in zip(in_cpp, in_python, strict=True):
        assert torch.equal(actual, expected)


@needs_derivatives
def test_only_gradients_that_are_asked_for():
    given = leaves()
    expected = differentiate(attend, given)
    for tensor in (given[1], given[3]):
        tensor.requires_grad_(False)
    actual = differentiate(attend, given, [given[0], given[2]])
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(actual[2], expected[3])
    given[3].requires_grad_()
    assert torch.equal(differentiate(attend, given, [given[3]])[1], expected[4])


@needs_derivatives
def test_log_sum_exp_has_no_gradient():
    query, key, value, _ = leaves()
    options = ["4|2|2@*|8|4", True, 0.3, 2, 0.0, "auto"]
    out, lse = torch.ops.structattn.mlr_attention(query, key, value, None, None, None, None, *options)
    assert out.requires_grad
    assert not lse.requires_grad


@needs_derivatives
@pytest.mark.filterwarnings("ignore:`torch.jit")  # PyTorch's own use, when its compiler is first called.
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_with_gradients(backend):
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    given = leaves()
    for actual, expected in zip(differentiate(compiled, given), differentiate(attend, given), strict=True):
        torch.testing.assert_close(actual, expected)


@needs_derivatives
def test_flops_of_backward_are_counted():
    with FlopCounterMode(display=False) as counter:
        differentiate(attend, leaves())
    counted = counter.get_flop_counts()["Global"]
    assert counted.keys() >= {torch.ops.structattn.mlr_attention, torch.ops.structattn.mlr_attention_backward}


@needs_derivatives
def test_decode_has_no_derivative():
    query, *rest = decode_arguments()
    out = torch.ops.structattn.mlr_decode(query.requires_grad_(), *rest, "auto")
    with pytest.raises(RuntimeError, match="no autograd formula"):
        out.sum().backward()
    with torch.no_grad():
        assert not mlr_decode(query, rest[0], rest[1][0], Hierarchy.parse(rest[3]), key_length=11).requires_grad


@pytest.mark.parametrize("axis", ["batch", "heads", "queries", "keys"])
def test_attention_of_nothing_is_nothing(axis):
    sizes = {"batch": 2, "heads": 2, "queries": 5, "keys": 7} | {axis: 0}
    query = torch.randn(sizes["batch"], sizes["heads"], sizes["queries"], 8)
    key = torch.randn(sizes["batch"], 1, sizes["keys"], 8)
    arguments = [query, key, key, None, None, None, None, "4|4@*|4", False, 1.0, 0, 0.0]
    out, lse = torch.ops.structattn_cpu.attention(*arguments)
    assert out.shape == query.shape
    assert not out.any()
    grads = torch.ops.structattn_cpu.attention_backward(torch.ones_like(out), out, lse, False, *arguments)
    assert [grad.shape for grad in grads] == [query.shape, key.shape, key.shape]
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("shape", [(1, 2, 0, 6), (0, 2, 1, 6)], ids=str)
def test_decode_of_nothing_is_nothing(shape):
    _, keys, values, *_ = decode_arguments()
    levels = {"key_levels": [each[: shape[0]] for each in keys], "value_levels": [each[: shape[0]] for each in values]}
    out = torch.ops.structattn_cpu.decode(*decode_arguments(query=torch.randn(shape), **levels))
    assert out.shape == (*shape[:3], 3)


def test_fake_tensors_are_checked_in_python():
    with FakeTensorMode(), pytest.raises(ValueError, match="hierarchy's ranks must sum to the query's width 8"):
        mlr_attention(*(torch.randn(1, 2, 5, 8) for _ in range(3)), Hierarchy.flat(6))


def test_the_decoder_has_no_derivative():
    """Neither does a call that goes straight to C++ lose a gradient in silence."""
    query, keys, values, _, _, key_length, *_ = decode_arguments()
    out = mlr_decode(query.requires_grad_(), keys, values[0], Hierarchy((4, 2), (None, 8)), key_length=key_length)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        out.sum().backward()


def test_transforms_see_output_and_log_sum_exp():
    query = torch.randn(1, 2, 9, 8)

    def total(query):
        return attend_with_lse(query, query, query, Hierarchy.flat(8), is_causal=True, scale=1.0)[0].sum()

    leaf = query.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(total)(query), expected)
