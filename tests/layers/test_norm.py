"""A LayerNorm over two numbers or fewer cannot learn: what it computes, and who says so."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from structattn.layers import BilinearAttention, DegenerateNormWarning, build_attention
from structattn.layers.norm import LevelNorm
from structattn.structures import MLR


def gradients(width: int) -> tuple[Tensor, Tensor]:
    """Outputs of the norm on 10,000 normal draws, and the largest entry of the Jacobian of each."""
    x = torch.randn(10_000, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm = LevelNorm((width,), dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: torch.func.functional_call(norm, {}, (row,))))(x)
    return norm(x), jacobian.abs().amax(dim=(1, 2)).detach()


def test_over_two_numbers_it_is_a_sign_function() -> None:
    out, largest = gradients(2)
    assert (out.abs() > 0.99).double().mean() > 0.97  # the rest has two numbers within 0.05 of each other
    torch.testing.assert_close(out[:, 0], -out[:, 1])
    assert largest.median() < 1e-4
    assert (largest < 0.01).double().mean() > 0.9
    assert largest.max() > 10  # a spike, where the two are nearly equal


def test_over_one_number_it_is_zero() -> None:
    out, largest = gradients(1)
    assert (out == 0).all()
    assert (largest == 0).all()


@pytest.mark.parametrize("width", [3, 4, 8])
def test_over_more_it_learns(width: int) -> None:
    _, largest = gradients(width)
    assert largest.median() > 0.1
    assert (largest < 0.01).double().mean() < 0.01


@pytest.mark.parametrize(
    ("spelling", "dim", "message"),
    [
        ("bmlr:2|1|1", 16, r"LayerNorm needs at least 3 numbers to learn, got 2\|2\|4.*take norm=none, or ranks"),
        ("lowrank:1", 16, "got 1.*take norm=none"),
        ("standard", 8, "got 2.*take qk_norm=false, or fewer heads"),
        ("mlr:1|1", 8, "got 2.*take qk_norm=false"),
        ("gswa:4|1", 8, "got 2.*take qk_norm=false"),
        ("swa:4", 4, "got 1.*take qk_norm=false"),
    ],
)
def test_layers_warn(spelling: str, dim: int, message: str) -> None:
    with pytest.warns(DegenerateNormWarning, match=message):
        build_attention(spelling, dim, 4, 16)


def test_a_layer_made_by_hand_warns() -> None:
    with pytest.warns(DegenerateNormWarning, match=r"got 2\|2\|4"):
        BilinearAttention(MLR(16, 16, (2, 1, 1), heads=4))


@pytest.mark.parametrize(
    ("spelling", "dim"),
    [
        ("bmlr:2|1|1+norm=none", 16),
        ("bmlr:2|1|1+norm=key+scale=1/sqrt(D)", 16),
        ("bmlr:3|2|1", 16),
        ("standard+qk_norm=false", 8),
        ("mlr:1|1+qk_norm=false", 8),
        ("mlr:1|1|1|1", 16),  # the norm runs over the whole head
        ("standard:1", 8),
        ("standard", 12),
    ],
)
def test_the_ways_out_do_not(spelling: str, dim: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_attention(spelling, dim, 4, 16)
