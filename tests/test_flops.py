"""Formulas of cost against torch's counter on real calls, and against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from structattn import Hierarchy, flops, mlr_attention
from structattn.flops import Flops
from structattn.layers import Attention, build_attention
from tests.layers.cases import DIM, build, each_kind, tokens
from tests.structures.cases import Case, each_case


def counted(call, *inputs: torch.Tensor) -> Flops:
    """Return FLOPs of a real call and its backward pass.

    Gradients of all inputs and parameters are included.
    """
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    with flops.counter() as count:
        out = call(*inputs)
    forward = count.get_total_flops()
    with flops.counter() as count:
        out.sum().backward()
    return Flops(forward, count.get_total_flops())


# --- layers -----------------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length", [1, 2, 7, 65, 100])
def test_layer(spelling: str, length: int, is_causal: bool) -> None:
    layer = build(spelling, is_causal=is_causal)
    assert counted(layer, tokens(2, length)) == layer.flops(length, 2)


@each_kind
def test_layer_with_grouped_heads_biases_and_dropout(spelling: str) -> None:
    kv_heads = 1 if spelling == "standard:1" else 2
    layer = build(spelling, kv_heads=kv_heads, dropout=0.2)
    assert counted(layer, tokens(2, 20)) == layer.flops(20, 2)


@each_kind
def test_parameters(spelling: str) -> None:
    layer = build(spelling)
    norms = sum(parameter.numel() for name, parameter in layer.named_parameters() if "norm" in name)
    projections = [module for module in layer.children() if isinstance(module, nn.Linear)]
    own = layer.structure.num_parameters if hasattr(layer, "structure") else 0
    matrices = sum(p.in_features * p.out_features for p in projections)
    assert sum(parameter.numel() for parameter in layer.parameters()) == own + norms + matrices


# --- the op and its pieces --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("query_length", "offset"), [(20, 0), (5, 15), (5, 3)])
@pytest.mark.parametrize("hierarchy", [Hierarchy.flat(8), Hierarchy.dyadic((4, 2, 2), 16)], ids=str)
def test_op_call(hierarchy: Hierarchy, query_length: int, offset: int, is_causal: bool) -> None:
    query, key, value = torch.randn(2, 4, query_length, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 6)
    options = {"is_causal": is_causal, "query_offset": offset}
    expected = flops.attention(hierarchy, 6, query_length, 20, heads=4, batch=2, **options)
    call = counted(lambda q, k, v: mlr_attention(q, k, v, hierarchy, enable_gqa=True, **options), query, key, value)
    assert call == expected


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("query_length", "key_length"), [(9, 9), (5, 9), (9, 5)])
def test_pytorch_s_attention_counts_visible_pairs(query_length: int, key_length: int, is_causal: bool) -> None:
    query, key, value = torch.randn(2, 4, query_length, 8), *torch.randn(2, 2, 2, key_length, 8)

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*tensors, is_causal=is_causal, enable_gqa=True)

    visible = torch.ones(query_length, key_length)
    pairs = int((visible.tril() if is_causal else visible).sum())
    assert counted(call, query, key, value) == 8 * pairs * Flops(2 * (8 + 8), 2 * (3 * 8 + 2 * 8))


def test_every_kernel_of_pytorch_s_attention_is_known() -> None:
    """The kernels that torch's counter knows, and the CPU one; add those that a later torch counts."""
    from torch.utils.flop_counter import flop_registry

    mapped = flops.counter().flop_registry
    for packet in flop_registry:
        if "scaled_dot_product" in str(packet):
            assert mapped[packet] is not flop_registry[packet], packet
    assert torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward in mapped


def test_the_counter_binds_arguments_by_name() -> None:
    """The CUDA kernels have `is_causal` at other places: count them on shapes alone."""
    mapped = flops.counter().flop_registry
    shape, row = torch.empty(1, 2, 4, 8), torch.empty(1, 2, 4)
    forward, backward = 2 * 10 * 2 * 16, 2 * 10 * 2 * 40
    aten = torch.ops.aten
    flash, efficient = aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_efficient_attention
    assert mapped[flash](shape, shape, shape, 0.0, True, out_val=None) == forward
    assert mapped[efficient](shape, shape, shape, None, True, 0.0, True, out_val=None) == forward
    assert mapped[efficient](shape, shape, shape, None, True, 0.0, out_val=None) == 2 * 16 * 2 * 16
    given = (shape, shape, shape, shape, shape, row, None, None, 4, 4, 0.0, True, None, None)
    assert mapped[aten._scaled_dot_product_flash_attention_backward](*given, out_val=None) == backward


def test_linear() -> None:
    layer = nn.Linear(5, 7, bias=False)
    assert counted(layer, torch.randn(3, 5)) == flops.linear(5, 7, 3)


@each_case
@pytest.mark.parametrize("operation", ["forward", "adjoint", "left", "right"])
def test_structure(case: Case, operation: str) -> None:
    matrix = case.make(heads=3)
    width = matrix.dim_out if operation in ("adjoint", "left") else matrix.dim_in
    expected = flops.structure(matrix, operation, 4)
    assert counted(getattr(matrix, operation), torch.randn(4, width)) == expected


def test_arithmetic() -> None:
    assert Flops(1, 2) + Flops(3, 4) == Flops(4, 6)
    assert 3 * Flops(1, 2) == Flops(1, 2) * 3 == Flops(3, 6)
    assert Flops(1, 2).training == 3


# --- against numbers worked out by hand -------------------------------------------------------------------------------


def paper_multiply_adds(layer: Attention, length: int) -> int:
    """Forward multiply-adds as the paper counts them: one each, every pair of the `T x T` scores."""
    return layer.flops(length, dense=True).forward // 2


def scores_alone(spelling: str, length: int) -> int:
    """The paper's multiply-adds of a head's scores: those of the layer without projections and values."""
    layer = build_attention(spelling, 64, 1, length)
    others = 4 * length * 64 * 64 + length * length * 64
    return paper_multiply_adds(layer, length) - others


def test_the_paper_s_counting() -> None:
    """Scores in `T² Σ r_l / 2^{l-1}` against `T² r`: of 64 dimensions, 38.4 and 15.9 (arXiv 2509.07963, section 4)."""
    square = 1024**2
    assert scores_alone("standard", 1024) == 64 * square
    assert (
        scores_alone("mlr:32|8|6|4|4|4|4|2+paper", 1024) / square == 32 + 4 + 1.5 + 0.5 + 0.25 + 0.125 + 0.0625 + 1 / 64
    )
    assert round(scores_alone("mlr:8x8+paper", 1024) / square, 1) == 15.9
    window = build_attention("swa:128", 64, 1, 1024)
    assert paper_multiply_adds(window, 1024) == 4 * 1024 * 64 * 64 + 1024 * 128 * (64 + 64)


def test_dense_counting_is_the_layer_without_its_mask() -> None:
    for spelling in ("standard", "mlr", "btt", "lowrank"):
        causal, full = build(spelling), build(spelling, is_causal=False)
        assert causal.flops(33, dense=True) == full.flops(33)


def test_key_numbers() -> None:
    def per_token(spelling: str, length: int = 1024, **options) -> int:
        return build_attention(spelling, 512, 8, 1024, **options).key_numbers(length)

    assert per_token("standard") == 1024 * 512
    assert per_token("standard", kv_heads=2) == 1024 * 128
    assert per_token("standard", is_causal=False) == 1024 * 512
    assert per_token("swa:128") == 128 * 512
    assert per_token("swa:128", length=100) == 100 * 512
    assert per_token("swa:128", is_causal=False) == 1024 * 512
    assert per_token("gswa:128|32") == 8 * (1024 * 32 + 128 * 32)
    assert per_token("mlr:32|32+paper", length=700) == 8 * (700 * 32 + 188 * 32)
    assert per_token("mlr:32|32+paper", length=700, is_causal=False) == 8 * 700 * 64
    assert per_token("lowrank") == 1024 * 8 * 64
    assert per_token("btt+side=key") == 1024 * 8 * 512
    assert per_token("btt+side=query+norm=none") == 1024 * 512
    assert per_token("btt+side=query") == 1024 * (512 + 16)
    assert per_token("btt") == 1024 * (512 + 16)


def test_key_numbers_of_an_op_call() -> None:
    assert Hierarchy.dyadic((32, 32), 1024).key_numbers(700) == 700 * 32 + 188 * 32


def test_causal_attention_is_half_of_dense() -> None:
    layer = build_attention("standard", DIM, 4, 64)
    visible = layer.mixing_flops(1000).forward
    assert visible / layer.mixing_flops(1000, dense=True).forward == pytest.approx(0.5, abs=1e-3)


def test_torch_s_own_counter_does_not_see_the_cpu_kernel() -> None:
    """The reason for our counter: once torch counts this kernel, the test fails and the mapping can shrink."""
    query = torch.randn(1, 1, 8, 8)
    with FlopCounterMode(display=False) as count:
        F.scaled_dot_product_attention(query, query, query, is_causal=True)
    assert count.get_total_flops() == 0
