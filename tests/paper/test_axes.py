"""The authors' count of FLOPs, against sums over pairs."""

import pytest

from paper.axes import authors_flops, visible_pair_flops
from structattn.models import LanguageModel, LanguageModelConfig

D, H, R, LAYERS, T = 32, 2, 16, 3, 48


def model(attention):
    return LanguageModel(LanguageModelConfig(layers=LAYERS, dim=D, heads=H, context_length=T, attention=attention))


def expected(score_numbers):
    """Return the count for one row; `score_numbers` are the multiply-adds of all scores of one head."""
    matrices = T * (4 * D * D + 8 * D * D)
    norms = 5 * T * (2 * D + 2 * H * R)
    return LAYERS * (matrices + norms + H * (score_numbers + R * T * T)) + 5 * T * D


def window_pairs(window):
    """Return the keys that their loop over queries multiplies, both sides of each."""
    return sum(min(T, place + window) - max(0, place - window) for place in range(T))


@pytest.mark.parametrize(
    ("attention", "score_numbers"),
    [
        ("standard", R * T * T),
        ("swa:8", R * window_pairs(8)),
        ("swa:100", R * T * T),
        ("gswa:8|4", 4 * T * T + 12 * window_pairs(8)),
        ("mlr:8|4|4+paper", 8 * T * T + 4 * 2 * 24**2 + 4 * 4 * 12**2),
        ("mlr:8|8+block_sizes=*|20", 8 * T * T + 8 * (2 * 20**2 + 8**2)),
        ("mlr:8|8+windows=8", 8 * T * T + 8 * window_pairs(8)),
    ],
)
def test_authors_count(attention, score_numbers):
    assert authors_flops(model(attention), T) == expected(score_numbers)


def test_values_and_hidden_pairs_count_whatever_the_structure():
    whole = model("mlr:8|8+windows=8+value_ranks=16|0")
    assert authors_flops(model("mlr:8|8+windows=8"), T) == authors_flops(whole, T)
    assert visible_pair_flops(model("mlr:8|8+windows=8"), T) < visible_pair_flops(whole, T)


def test_visible_pairs_are_the_count_of_the_package():
    assert visible_pair_flops(model("standard"), T) == model("standard").flops(T).training


def test_bilinear_attention_has_no_count_of_theirs():
    with pytest.raises(TypeError, match="linear queries and keys"):
        authors_flops(model("btt"), T)
