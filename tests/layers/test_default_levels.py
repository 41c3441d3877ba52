"""Default ranks and windows of MLR attention, and the paper's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from structattn.layers import (
    MLRAttention,
    RotaryEmbedding,
    build_attention,
    default_ranks,
    default_windows,
    paper_ranks,
)
from structattn.ops.hierarchy import Hierarchy


@pytest.mark.parametrize(
    ("head_dim", "context", "levels", "ranks"),
    [
        (64, 1024, None, (32, 8, 6, 4, 4, 4, 4, 2)),  # the paper's
        (128, 1024, None, (64, 16, 12, 8, 8, 8, 8, 4)),
        (64, 256, None, (32, 8, 6, 4, 4, 10)),  # the smallest block keeps 8 tokens
        (64, 16, None, (32, 32)),
        (64, 5, None, (64,)),
        (64, 96, 4, (32, 8, 6, 18)),
        (64, 1024, 2, (32, 32)),
        (64, 1024, 1, (64,)),
        (32, 1024, None, (16, 4, 4, 2, 2, 2, 2)),  # even, for rotary pairs
        (7, 1024, None, (4, 1, 1, 1)),
        (1, 1024, None, (1,)),
    ],
)
def test_paper_ranks(head_dim: int, context: int, levels: int | None, ranks: tuple[int, ...]) -> None:
    assert paper_ranks(head_dim, context, levels) == ranks


@given(st.integers(1, 300), st.integers(1, 10_000))
def test_paper_ranks_fill_the_head(head_dim: int, context: int) -> None:
    ranks = paper_ranks(head_dim, context)
    assert sum(ranks) == head_dim
    assert min(ranks) >= 1
    assert head_dim % 2 or all(rank % 2 == 0 for rank in ranks)
    assert context >= 8 * 2 ** (len(ranks) - 1) or len(ranks) == 1


@pytest.mark.parametrize(
    ("head_dim", "context", "levels", "ranks", "windows"),
    [
        (32, 512, None, (4,) * 8, (256, 128, 64, 32, 16, 8, 4)),
        (128, 16_384, None, (16,) * 8, (8192, 4096, 2048, 1024, 512, 256, 128)),
        (64, 256, None, (8,) * 6 + (16,), (128, 64, 32, 16, 8, 4)),  # the last window keeps 4 tokens
        (64, 16, None, (8, 8, 48), (8, 4)),
        (64, 5, None, (64,), ()),
        (64, 1024, 2, (8, 56), (512,)),
        (64, 1024, 16, (4,) * 16, (512, 256, 128, 64, 32, 16, 9, 8, 7, 6, 5, 4, 3, 2, 1)),
        (12, 1024, None, (2,) * 6, (512, 256, 128, 64, 32)),  # even, for rotary pairs
        (7, 1024, None, (1,) * 7, (512, 256, 128, 64, 32, 16)),
        (1, 1024, None, (1,), ()),
    ],
)
def test_default_ranks_and_windows(head_dim, context, levels, ranks, windows) -> None:
    assert default_ranks(head_dim, context, levels) == ranks
    assert default_windows(len(ranks), context) == (None, *windows)


@given(st.integers(1, 300), st.integers(1, 10_000), st.none() | st.integers(1, 20))
def test_default_levels_fill_the_head(head_dim: int, context: int, levels: int | None) -> None:
    if levels is not None and levels > head_dim // (2 - head_dim % 2):
        with pytest.raises(ValueError, match=f"levels must be at most .* for heads of {head_dim}"):
            default_ranks(head_dim, context, levels)
        return
    ranks = default_ranks(head_dim, context, levels)
    assert sum(ranks) == head_dim
    assert levels is None or len(ranks) == levels
    assert head_dim % 2 or all(rank % 2 == 0 for rank in ranks)
    Hierarchy(ranks, windows=default_windows(len(ranks), context))  # checks that windows shrink


def test_mlr_is_levels_by_window_in_keys_and_values() -> None:
    layer = build_attention("mlr", 512, 8, 1024, rotary=RotaryEmbedding())
    assert isinstance(layer, MLRAttention)
    assert str(layer.hierarchy) == "8|8|8|8|8|8|8|8v@w*|512|256|128|64|32|16|8"
    assert layer.level_weights == (1 / 8**0.5,) * 8
    assert layer.rotary == RotaryEmbedding(frequencies="per_level")
    assert layer.cache_numbers(1024) < 0.25 * build_attention("standard", 512, 8, 1024).cache_numbers(1024)


def test_more_levels_than_the_split_has() -> None:
    with pytest.raises(ValueError, match="levels must be at most 8 for heads of 64, got 9; or give ranks"):
        build_attention("mlr+paper+levels=9", 512, 8, 1024)


def test_mlr_paper_is_the_paper_s_language_setting() -> None:
    layer = build_attention("mlr+paper", 512, 8, 1024)
    assert isinstance(layer, MLRAttention)
    assert str(layer.hierarchy) == "32|8|6|4|4|4|4|2@1024/mean"
    assert layer.level_weights == (1 / 32, 1 / 8, 1 / 6, 1 / 4, 1 / 4, 1 / 4, 1 / 4, 1 / 2)
    assert layer.q_norm is not None
    assert layer.k_norm is not None
