"""Every refusal names the argument, what was expected, and what came."""

import pytest
import torch

from structattn.structures import BTT, MLBTC, MLR, Butterfly, Kronecker, Level, LowRank, Monarch, summary

CONSTRUCTORS = [
    (lambda: LowRank(0, 8, 2), ValueError, "dim_out must be a positive integer, got 0"),
    (lambda: LowRank(8, 2.0, 2), TypeError, "dim_in must be a positive integer, got 2.0"),
    (lambda: LowRank(8, 8, -1), ValueError, "rank must be a positive integer, got -1"),
    (lambda: LowRank(8, 8, 2, heads=0), ValueError, "heads must be a positive integer, got 0"),
    (lambda: LowRank(8, 8, 2, heads=True), TypeError, "heads must be a positive integer, got True"),
    (lambda: LowRank(8, 8, 2, normalize=1), TypeError, "normalize must be True or False, got 1"),
    (lambda: MLR(8, 8, ()), ValueError, "ranks must hold at least one"),
    (lambda: MLR(8, 8, 4), TypeError, "ranks must be a sequence of positive integers, got 4"),
    (lambda: MLR(8, 8, "42"), TypeError, "ranks must be a sequence of positive integers, got '42'"),
    (lambda: MLR(8, 8, (4, 0)), ValueError, r"ranks\[1\] must be a positive integer, got 0"),
    (lambda: MLR(8, 8, (4, -2)), ValueError, r"ranks\[1\] must be a positive integer, got -2"),
    (lambda: MLR(8, 8, (4, 1.5)), TypeError, r"ranks\[1\] must be a positive integer, got 1.5"),
    (lambda: MLR(8, 8, (4, 2), blocks=(1,)), ValueError, "one entry for each of the 2 ranks"),
    (lambda: MLR(8, 8, (4, 2), blocks=(2, 4)), ValueError, "global level"),
    (lambda: MLR(8, 8, (4, 2, 1), blocks=(1, 4, 2)), ValueError, "must increase"),
    (lambda: MLR(8, 8, (4, 2), blocks=(1, 1)), ValueError, "must increase"),
    (lambda: MLR(12, 12, (4, 2, 1), blocks=(1, 2, 3)), ValueError, "multiple of the one before"),
    (lambda: MLR(12, 20, (4, 2), blocks=(1, 3)), ValueError, "divide dim_out=12 and dim_in=20, got 3"),
    (lambda: MLR(7, 11, (2, 1)), ValueError, "divide dim_out=7 and dim_in=11, got 2"),
    (lambda: BTT(8, 8, 0), ValueError, "rank must be a positive integer, got 0"),
    (lambda: BTT(8, 8, 1, ((3, 3), (2, 4))), ValueError, "8 and 8, got 3·3 = 9"),
    (lambda: BTT(8, 8, 1, ((2, 4), (2, 2))), ValueError, "2·2 = 4"),
    (lambda: BTT(8, 8, 1, ((2, 4),)), ValueError, "factors must be"),
    (lambda: BTT(8, 8, 1, ((2, 2, 2), (2, 4))), ValueError, "factors must be"),
    (lambda: BTT(8, 8, 1, (8, 8)), TypeError, "factors"),
    (lambda: BTT(8, 8, 1, 8), TypeError, "factors must be"),
    (lambda: Monarch(12, 20, 3), ValueError, "blocks must divide dim_in=20, got 3"),
    (lambda: Monarch(12, 20, 0), ValueError, "blocks must be a positive integer, got 0"),
    (lambda: Kronecker(()), ValueError, "factor_shapes must hold at least one pair"),
    (lambda: Kronecker(((2, 2), (3,))), ValueError, "factor_shapes must be pairs"),
    (lambda: Kronecker((2, 2)), TypeError, r"factor_shapes\[0\]"),
    (lambda: Kronecker(((2, 0),)), ValueError, r"factor_shapes\[0\]\[1\] must be a positive integer, got 0"),
    (lambda: Butterfly(12), ValueError, "dim must be a power of two of at least 2, got 12"),
    (lambda: Butterfly(1), ValueError, "dim must be a power of two of at least 2, got 1"),
    (lambda: Butterfly(8.0), TypeError, "dim must be a positive integer, got 8.0"),
    (lambda: MLBTC([]), ValueError, "levels must hold at least one Level"),
    (lambda: MLBTC(Level(2, 2, 2, 2)), TypeError, "levels must be a sequence of Level"),
    (lambda: MLBTC([(2, 2, 2, 2)]), TypeError, "levels must hold Level objects"),
    (lambda: MLBTC([Level(2, 2, 2, 2), Level(2, 3, 2, 2)]), ValueError, r"same dim_out x dim_in.*\(6, 4\)"),
    (lambda: Level(2, 2, 2, 0), ValueError, "d must be a positive integer, got 0"),
    (lambda: Level(2, 2, 2, 2, weight=float("nan")), ValueError, "weight must be finite, got nan"),
    (lambda: Level(2, 2, 2, 2, weight=0), ValueError, "weight must not be zero"),
    (lambda: Level.low_rank(12, 20, 2, 3), ValueError, "blocks must divide dim_in=20, got 3"),
    (lambda: summary("btt"), TypeError, "structures must be Structure objects, got str at place 1"),
]


@pytest.mark.parametrize(("make", "error", "message"), CONSTRUCTORS)
def test_constructors(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("method", ["forward", "right", "adjoint", "left"])
def test_inputs(method):
    m = BTT(12, 20)
    dim, name = (20, "y") if method in ("forward", "right") else (12, "x")
    call = getattr(m, method)
    with pytest.raises(ValueError, match=rf"{name} must have shape \(\.\.\., {dim}\), got \(3, 7\)"):
        call(torch.zeros(3, 7))
    with pytest.raises(ValueError, match=rf"{name} must have shape"):
        call(torch.tensor(1.0))
    with pytest.raises(TypeError, match=f"{name} must be torch.float32 as the factors are, got torch.float64"):
        call(torch.zeros(3, dim, dtype=torch.float64))
    with pytest.raises(ValueError, match=f"{name} must be on cpu as the factors are, got meta"):
        call(torch.zeros(3, dim, device="meta"))
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
        call([0.0] * dim)


def test_projection_targets():
    m = BTT(12, 20, normalize=False, heads=2)
    before = m.dense().detach()
    for target, error, message in [
        (torch.zeros(12, 20), ValueError, r"target must have shape \(2, 12, 20\), got \(12, 20\)"),
        (torch.zeros(2, 12, 20, dtype=torch.int64), TypeError, "floating tensor.*got torch.int64"),
        ([[1.0]], TypeError, "floating tensor.*got list"),
        (torch.full((2, 12, 20), float("inf")), ValueError, "target must be finite"),
    ]:
        with pytest.raises(error, match=message):
            m.project_(target)
    assert torch.equal(m.dense(), before)


def test_projection_of_a_normalised_structure_says_what_to_do():
    with pytest.raises(ValueError, match=r"normalize=False.*bounds the factors.*BTT\(\.\.\., normalize=False\)"):
        BTT(12, 20).project_(torch.zeros(12, 20))


def test_unknown_operation():
    with pytest.raises(ValueError, match=r"operation must be one of .* did you mean 'adjoint'"):
        BTT(8, 8).flops_of("adjont")


def test_factors_of_the_wrong_size():
    level = Level.low_rank(4, 6, 2)
    with pytest.raises(ValueError, match=r"lefts must hold one factor for each of 1 levels, got 2"):
        MLBTC.from_factors([level], [torch.zeros(1, 4, 2)] * 2, [torch.zeros(1, 6, 2)])
    with pytest.raises(ValueError, match=r"rights\[0\] must have shape \(1, 6, 2\), got \(1, 5, 2\)"):
        MLBTC.from_factors([level], [torch.zeros(1, 4, 2)], [torch.zeros(1, 5, 2)])
