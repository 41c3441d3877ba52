"""Masks and arguments that MLR attention does not support are refused, never dropped."""

import pytest
import torch

from structattn.integrations import transformers as st
from tests.integrations.families import FAMILIES, inputs, make, mask, tokens
from tests.tolerance import assert_calibrated


def with_levels(family, **fields):
    model = make(family, **fields)
    st.set_hierarchy(model, "4|2|2@8")
    return model


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_padding_counts(self, family):
        """Tokens at padding change nothing at real tokens."""
        model = with_levels(family)
        for padding in ("left", "right"):
            given, real = inputs(family, padding), mask(padding).bool()
            other = given | {"input_ids": torch.where(real, given["input_ids"], 7)}
            keep = torch.ones(2, 18, dtype=torch.bool) if family == "t5" else real
            torch.testing.assert_close(model(**other).logits[keep], model(**given).logits[keep])

    def test_padding_between_tokens(self, family):
        """One level gives the model's own attention; with several, tokens at padding change nothing."""
        real = torch.ones(2, 21, dtype=torch.bool)
        real[1, [0, 4, 5, 12]] = False
        given = inputs(family) | {"attention_mask": real.long()}
        keep = torch.ones(2, 18, dtype=torch.bool) if family == "t5" else real
        model = make(family)
        own = model(**given).logits[keep].detach()
        exact = make(family, dtype=torch.float64)(**given).logits[keep].detach()
        st.set_hierarchy(model, "8")
        assert_calibrated(model(**given).logits[keep].detach(), exact, own)
        st.set_hierarchy(model, "4|2|2@8")
        other = given | {"input_ids": torch.where(real, given["input_ids"], 7)}
        torch.testing.assert_close(model(**other).logits[keep], model(**given).logits[keep])
        assert not torch.allclose(model(**inputs(family)).logits[keep], model(**given).logits[keep])

    def test_a_mask_of_pairs(self, family):
        pairs = torch.ones(2, 1, 21, 21, dtype=torch.bool).tril()
        with pytest.raises(ValueError, match=r"padding, not masks of pairs"):
            with_levels(family)(**inputs(family) | {"attention_mask": pairs})

    def test_a_mask_of_another_length(self, family):
        with pytest.raises(ValueError, match=r"\(B, Tk\) = \((2|B), 21\).* got \(2, 20\)"):
            with_levels(family)(**inputs(family) | {"attention_mask": torch.ones(2, 20, dtype=torch.long)})

    def test_weights(self, family):
        """GPT-2 does not pass output_attentions on to its attention, and returns none with any implementation."""
        model = with_levels(family)
        if family == "gpt2":
            assert model(**inputs(family), output_attentions=True).attentions == ()
        else:
            with pytest.raises(ValueError, match="output_attentions=True is not possible"):
                model(**inputs(family), output_attentions=True)
        with pytest.raises(ValueError, match="output_attentions"):
            model.config.output_attentions = True


def test_packed_sequences():
    model = with_levels("llama")
    positions = torch.cat([torch.arange(10), torch.arange(11)])[None].expand(2, -1)
    with pytest.raises(ValueError, match="several sequences packed"):
        model(tokens(), position_ids=positions, use_cache=False)


def test_packed_sequences_of_flash_attention():
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        with_levels("llama")(tokens(), cu_seq_lens_q=torch.tensor([0, 10, 21]))


def test_sliding_windows():
    fields = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
    model = with_levels("qwen2", **fields)
    model(tokens(length=16))
    with pytest.raises(ValueError, match=r"window of 16 tokens, in which levels by block .* use levels by window"):
        model(tokens())
