"""One level is the model's own attention; several are the formula."""

import itertools

import pytest
import torch

from structattn import Hierarchy
from structattn.integrations import transformers as st
from structattn.integrations.transformers import attention as attention_module
from structattn.models.transformers_internals import set_attention_implementation
from tests.integrations import dense
from tests.integrations.families import (
    DECODERS,
    FAMILIES,
    HEAD,
    ROTARY,
    assert_calibrated_gradients,
    gradients,
    inputs,
    make,
    mask,
    real_logits,
    tokens,
)
from tests.tolerance import assert_calibrated

PADDING = ("none", "left", "right")
DEEP = Hierarchy((4, 2, 2), (None, 8, 4), gains=(1.0, 0.7, 0.4))
WIDE = Hierarchy((2, 6), (None, 6))
NEAR = Hierarchy.parse("2|2|4v4|0|4@w9|4/1|0.7|0.4")
SLIDING = Hierarchy.parse("4|4v2|6@w11|5")


def stacks(family, value):
    return dict.fromkeys(("encoder", "decoder") if family == "t5" else ("decoder",), value)


def close(actual, expected):
    assert_calibrated(actual.detach(), expected.detach(), expected.detach())


def random_orders(family):
    """A permutation for each layer and key head."""
    generator = torch.Generator().manual_seed(5)
    heads, units = (2, HEAD // 2) if family in ROTARY else (4, HEAD)
    layer = lambda: [torch.randperm(units, generator=generator).tolist() for _ in range(heads)]  # noqa: E731
    return {stack: [layer(), layer()] for stack in stacks(family, None)}


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    @pytest.mark.parametrize("own", ["sdpa", "eager"])
    @pytest.mark.parametrize("padding", PADDING)
    def test_one_level_is_the_models_own_attention(self, family, padding, own):
        model, given = make(family), inputs(family, padding)
        set_attention_implementation(model, own)
        plain, plain_grads = real_logits(model, given).detach(), gradients(model, given)
        set_attention_implementation(model, "sdpa")  # eager attention of some families has its softmax in float32
        exact, exact_grads = real_logits(model.double(), given).detach(), gradients(model, given)
        st.set_hierarchy(model.float(), Hierarchy.flat(HEAD))
        assert_calibrated(real_logits(model, given).detach(), exact, plain)
        assert_calibrated_gradients(gradients(model, given), exact_grads, plain_grads)

    @pytest.mark.parametrize(
        ("levels", "padding", "ordered"),
        [
            *itertools.product(([DEEP, WIDE],), PADDING, (False, True)),
            ([NEAR, SLIDING], "none", True),
            ([NEAR, SLIDING], "left", False),
            ([DEEP, NEAR], "right", True),
        ],
    )
    def test_levels_are_the_formula(self, family, levels, padding, ordered):
        model, given = make(family, dtype=torch.float64), inputs(family, padding)
        hierarchies, orders = stacks(family, levels), random_orders(family) if ordered else None
        flat = real_logits(model, given)
        dense.install(model, hierarchies, orders)
        expected, expected_grads = real_logits(model, given), gradients(model, given)
        st.set_hierarchy(model, hierarchies, order=orders or "as_trained")
        close(real_logits(model, given), expected)
        for name, grad in gradients(model, given).items():
            close(grad, expected_grads[name])
        assert (expected - flat).abs().max() > 1e-3

    def test_any_order_is_exact_for_one_level(self, family):
        model, given = make(family, dtype=torch.float64), inputs(family, "left")
        expected = real_logits(model, given)
        st.set_hierarchy(model, Hierarchy.flat(HEAD), order=random_orders(family))
        assert any(getattr(m, "index", None) is not None and m.index.shape[0] > 1 for m in model.modules())
        close(real_logits(model, given), expected)

    def test_dropout_is_handed_on(self, family, monkeypatch):
        seen = []
        kept = attention_module.mlr_attention
        monkeypatch.setattr(
            attention_module, "mlr_attention", lambda *a, **k: seen.append(k["dropout_p"]) or kept(*a, **k)
        )
        field = {"gpt2": "attn_pdrop", "t5": "dropout_rate"}.get(family, "attention_dropout")
        model = make(family, **{field: 0.25})
        st.set_hierarchy(model, WIDE)
        model(**inputs(family))
        model.train()(**inputs(family))
        half = len(seen) // 2
        assert seen[:half] == [0.0] * half
        assert seen[half:] == [0.25] * half
        assert half == (4 if family == "t5" else 2)


@pytest.mark.parametrize("family", DECODERS)
def test_a_left_padded_row_gives_what_it_gives_alone(family):
    model, x, real = make(family, dtype=torch.float64), tokens(), mask("left")
    st.set_hierarchy(model, DEEP)
    positions = (real.cumsum(1) - 1).clamp(min=0)
    together = model(x, attention_mask=real, position_ids=positions).logits
    for row, count in enumerate((5, 2)):
        close(together[row, count:], model(x[row : row + 1, count:]).logits[0])


def test_cross_attention_stays_standard_whatever_its_mask():
    model = make("t5", dtype=torch.float64)
    given = {"encoder_outputs": (torch.randn(2, 21, 32, dtype=torch.float64),), "decoder_input_ids": tokens(length=9)}
    holes = torch.ones(2, 21, dtype=torch.long)
    holes[:, 3:7] = 0
    plain = model(**given, attention_mask=holes).logits
    assert (plain - model(**given).logits).abs().max() > 1e-3
    st.set_hierarchy(model, Hierarchy.flat(HEAD))
    close(model(**given, attention_mask=holes).logits, plain)
