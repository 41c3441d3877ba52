"""Configs: what they accept, what they refuse, and that files bring them back."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError as WrongType
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from structattn.layers import MLRConfig, RotaryEmbedding, parse_attention
from structattn.models import LanguageModel, LanguageModelConfig, RegressionModelConfig


def test_round_trip_through_a_folder(tmp_path):
    config = LanguageModelConfig(layers=2, dim=32, heads=2, attention=["standard", "mlr:8,8"], positions="rotary")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LanguageModelConfig
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert loaded.attention == ["standard", "mlr:8|8"]


@pytest.mark.parametrize("attention", ["mlr:8,8+windows=4", ["standard", "mlr:8,8"]])
def test_files_hold_every_field_of_the_attention(attention, tmp_path):
    config = LanguageModelConfig(layers=2, dim=32, heads=2, attention=attention)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["attention"]
    given = attention if isinstance(attention, list) else [attention]
    assert (saved if isinstance(saved, list) else [saved]) == [parse_attention(text).to_dict() for text in given]
    assert AutoConfig.from_pretrained(tmp_path).attention == config.attention


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


def test_folders_of_version_0_1_load(tmp_path):
    """Fields of the config and names of the tensors are those that were saved then."""
    fields = {
        "model_type": "structattn",
        "layers": 1,
        "dim": 16,
        "heads": 2,
        "context_length": 16,
        "attention": "mlr:4|2|2+gains=none+level_weight=1/sqrt(r)+basis=true",
        "kv_heads": None,
        "positions": "learned",
        "rotary_base": 10000.0,
        "mlp_ratio": 4,
        "dropout": 0.0,
        "vocab_size": 11,
        "tie_word_embeddings": False,
    }
    block = "backbone.blocks.0."
    shapes = {
        "embedding.weight": (11, 16),
        "head.weight": (11, 16),
        "backbone.positions.weight": (16, 16),
        "backbone.norm.weight": (16,),
        f"{block}attention_norm.weight": (16,),
        f"{block}mlp_norm.weight": (16,),
        f"{block}mlp.expand.weight": (64, 16),
        f"{block}mlp.contract.weight": (16, 64),
        f"{block}attention.q_norm.weight": (8,),
        f"{block}attention.k_norm.weight": (8,),
        f"{block}attention.basis.query": (2, 8, 8),
        f"{block}attention.basis.key": (2, 8, 8),
        f"{block}attention.basis.mean": (2, 8),
    }
    shapes |= {f"{block}attention.{name}_proj.weight": (16, 16) for name in ("q", "k", "v", "out")}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert model.config.attention == "mlr:4|2|2+gains=none+level_weight=1/sqrt(r)+basis+paper"
    assert str(model.backbone.layers[0].attention.hierarchy) == "4|2|2@16"


@pytest.mark.parametrize(
    ("saved", "meant"), [("mlr", "mlr+paper"), (["standard", "mlr:4|4"], ["standard", "mlr:4|4+paper"])]
)
def test_a_spelling_saved_by_version_0_1_keeps_its_meaning(tmp_path, saved, meant):
    fields = {"model_type": "structattn", "dim": 16, "heads": 2, "attention": saved}
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.attention == meant
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).attention == meant


def test_a_saved_spelling_of_today_keeps_its_meaning(tmp_path):
    LanguageModelConfig(attention="mlr:4|4", dim=16, heads=2).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).attention == "mlr:4|4"


def test_the_kernel_of_standard_attention_is_saved(tmp_path):
    config = LanguageModelConfig(dim=16, heads=2, layers=1, standard_kernel="torch")
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).standard_kernel == "torch"
    assert AutoConfig.from_pretrained(tmp_path, standard_kernel="auto").standard_kernel == "auto"
    model = LanguageModel(config)
    assert model.backbone.layers[0].attention.standard_kernel == "torch"
    assert "standard_kernel=torch" in repr(model)


def test_a_config_saved_by_version_0_1_takes_the_faster_kernel(tmp_path):
    fields = {"model_type": "structattn", "dim": 16, "heads": 2, "attention": "standard"}
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    assert AutoConfig.from_pretrained(tmp_path).standard_kernel == "auto"
