"""The choice of a hierarchy for each layer."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from structattn import Hierarchy
from structattn.integrations.transformers import set_hierarchy
from structattn.retrofit.cache_methods import Calibrated
from structattn.retrofit.layer_choice import candidates_of, choose, layer_divergences
from tests.retrofit.test_cache_study import SIZES


def test_candidates():
    more = Hierarchy.parse("2|6v@w16")
    assert list(map(str, candidates_of(8, 1024, 4, [more]))) == ["8", "8@w32+4", "8@w128+4", "8@w256+4", "2|6v@w*|16+4"]
    assert list(map(str, candidates_of(8, 32, 4))) == ["8", "8@w5+4", "8@w8+4"]  # a window holds more than the sinks


thousandths = st.integers(1, 1000).map(lambda part: part / 1000)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=1, max_size=5),
    st.lists(thousandths, min_size=3, max_size=3),
    thousandths,
)
def test_the_choice_is_the_best_of_all(divergences, shares, budget):
    table = torch.tensor(divergences, dtype=torch.float64)
    allowed = [
        sum(row[each] for row, each in zip(divergences, choice, strict=True))
        for choice in itertools.product(range(3), repeat=len(divergences))
        if round(1000 * sum(shares[each] for each in choice)) <= round(1000 * budget) * len(divergences)
    ]
    if not allowed:
        with pytest.raises(ValueError, match=f"cache must be at least {min(shares):.1%}, the smallest"):
            choose(table, torch.tensor(shares, dtype=torch.float64), budget)
        return
    chosen = choose(table, torch.tensor(shares, dtype=torch.float64), budget)
    assert sum(row[each] for row, each in zip(divergences, chosen, strict=True)) == min(allowed)
    assert sum(shares[each] for each in chosen) <= budget * len(divergences) + 1e-9


def test_divergences_against_the_definition():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **SIZES)).eval()
    windows = list(torch.randint(50, (2, 1, 48)))
    candidates = [Hierarchy.flat(8), Hierarchy.parse("8@w4+1"), Hierarchy.parse("2|6v@w8")]
    calibrated, seen = Calibrated(model, lambda: windows), []
    found = layer_divergences(calibrated, candidates, windows, lambda done, of: seen.append((done, of)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert found[:, 0].tolist() == [0, 0]
    for row, column in itertools.product(range(2), (1, 2)):
        changed, order = calibrated.arranged([candidates[column]] * 2)
        set_hierarchy(changed, [candidates[column if at == row else 0] for at in range(2)], order=order)
        with torch.no_grad():
            p, q = (torch.cat([each(x).logits[0, 3::4] for x in windows]).double() for each in (model, changed))
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        exact = (p.exp() * (p - q)).sum(-1).mean()
        assert exact > 0
        assert float(found[row, column]) == pytest.approx(float(exact), rel=1e-3)
