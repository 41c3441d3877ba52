from __future__ import annotations

import string

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structattn.tasks.characters import NEWLINE, VOCABULARY, decode, encode

quick = settings(deadline=None, max_examples=200)


def test_vocabulary_is_newline_and_printable_ascii_in_order():
    assert len(VOCABULARY) == 96
    assert list(VOCABULARY) == sorted(set(string.printable) - set("\t\r\v\f"))
    assert VOCABULARY[NEWLINE] == "\n"


def test_tokens_by_hand():
    tokens = encode("\n a~")
    assert tokens.dtype == np.uint8
    assert tokens.tolist() == [0, 1, 66, 95]
    assert encode("").shape == (0,)


@quick
@given(st.text(alphabet=VOCABULARY))
def test_round_trip(text):
    assert decode(encode(text)) == text


@quick
@given(st.text())
def test_any_text_becomes_tokens_and_a_second_pass_changes_nothing(text):
    tokens = encode(text)
    assert tokens.size == 0 or tokens.max() < 96
    assert np.array_equal(encode(decode(tokens)), tokens)


@quick
@given(st.text(), st.text())
def test_text_may_be_encoded_in_pieces(first, second):
    pieces = np.concatenate([encode(first), encode(second)])
    if not (first.endswith("\r") and second.startswith("\n")):
        assert np.array_equal(encode(first + second), pieces)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb\rc\u2028d\u2029e\x85f", "a\nb\nc\nd\ne\nf"),
        ("\tx", "    x"),
        ("a\u00a0b\u2009c\u3000d", "a b c d"),
        ("“Don’t,” ‘she’ said „so‟ «là» ‹ici›", '"Don\'t," \'she\' said "so" "la" \'ici\''),
        ("5′ 3″ ´", "5' 3\" '"),
        ("a‐b‑c–d−e—f", "a-b-c-d-e--f"),
        ("wait… • no", "wait... * no"),
        ("naïve café Ångström ÇĞŞ", "naive cafe Angstrom CGS"),
        ("e\u0301", "e"),
        ("ﬁn ½ ™ ① 𝐀", "fin 1/2 TM 1 A"),
        ("Æsop œuvre straße Øre Łódź Þór ðað ı", "AEsop oeuvre strasse Ore Lodz Thor dad i"),
        ("a日b本cд£😀\u200b\ufeff\0\x0c\x7f", "abc"),
    ],
)
def test_characters_outside_the_vocabulary(text, expected):
    assert decode(encode(text)) == expected


def test_tokens_can_be_written_by_torch_without_harm():
    text = "some text"
    torch.from_numpy(encode(text)).zero_()
    assert decode(encode(text)) == text


def test_decode_takes_lists_arrays_and_tensors():
    for tokens in ([41, 74], np.array([41, 74], dtype=np.uint8), torch.tensor([41, 74])):
        assert decode(tokens) == "Hi"
    assert decode([]) == ""


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 96], "tokens must be at least 0 and below 96, got 1 to 96"),
        ([-1, 5], "tokens must be at least 0 and below 96, got -1 to 5"),
        ([[1, 2]], r"tokens must have one dimension, got shape \(1, 2\)"),
    ],
)
def test_decode_refuses_other_values(tokens, message):
    with pytest.raises(ValueError, match=message):
        decode(tokens)
