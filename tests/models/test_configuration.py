"""Configs: what they accept, what they refuse, and that files bring them back."""

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError as WrongType
from transformers import AutoConfig

from structattn.layers import MLRConfig, RotaryEmbedding
from structattn.models import LanguageModelConfig, RegressionModelConfig


def test_round_trip_through_a_folder(tmp_path):
    config = LanguageModelConfig(layers=2, dim=32, heads=2, attention=["standard", "mlr:8,8"], positions="rotary")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LanguageModelConfig
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert loaded.attention == ["standard", "mlr:8|8"]


def test_attention_is_kept_in_its_shortest_spelling():
    assert LanguageModelConfig(attention="mlr:16,8,8").attention == "mlr:16|8|8"
    assert LanguageModelConfig(attention=MLRConfig(ranks=(16, 16)).to_dict()).attention == "mlr:16|16"


def test_a_list_of_structures_is_cycled_over_the_blocks():
    config = LanguageModelConfig(layers=5, attention=["standard", "swa:8"])
    assert [config.structure(block) for block in range(5)] == ["standard", "swa:8"] * 2 + ["standard"]
    assert LanguageModelConfig(attention="swa:8").structure(3) == "swa:8"


def test_rotary_base():
    assert LanguageModelConfig().rotary is None
    assert LanguageModelConfig(positions="rotary", rotary_base=500.0).rotary == RotaryEmbedding(500.0)


def test_hugging_face_names():
    config = LanguageModelConfig(layers=3, dim=64, heads=2, context_length=100)
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
    assert [getattr(config, name) for name in names] == [3, 64, 2, 100]
    assert LanguageModelConfig(hidden_size=48).dim == 48


@pytest.mark.parametrize(
    ("config", "fields", "error", "message"),
    [
        (
            LanguageModelConfig,
            {"layer": 3},
            TypeError,
            "LanguageModelConfig has no field 'layer'; did you mean 'layers'?",
        ),
        (LanguageModelConfig, {"dim": 0}, ValueError, "dim must be a positive integer, got 0"),
        (LanguageModelConfig, {"dim": "a"}, WrongType, "Field 'dim' expected int, got str"),
        (LanguageModelConfig, {"vocab_size": 0}, ValueError, "vocab_size must be a positive integer, got 0"),
        (LanguageModelConfig, {"dropout": 1.0}, ValueError, "dropout must be at least 0 and below 1, got 1.0"),
        (
            LanguageModelConfig,
            {"positions": "learnt"},
            WrongType,
            "Field 'positions' expected one of .*'learned', 'rotary'",
        ),
        (LanguageModelConfig, {"attention": "standart"}, ValueError, "attention must be one of .* mean 'standard'"),
        (LanguageModelConfig, {"attention": []}, ValueError, "attention must name at least one structure"),
        (LanguageModelConfig, {"kv_heads": "two"}, WrongType, "Field 'kv_heads' expected int"),
        (LanguageModelConfig, {"rotary_base": 1}, ValueError, "rotary_base must be above 1, got 1"),
        (RegressionModelConfig, {"input_dim": -1}, ValueError, "input_dim must be a positive integer, got -1"),
    ],
)
def test_bad_fields(config, fields, error, message):
    with pytest.raises(error, match=message):
        config(**fields)
