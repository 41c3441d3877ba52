"""Retrofit models of Hugging Face transformers, from their folders and through the command."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from structattn.cli import main
from structattn.models import LanguageModel, LanguageModelConfig
from structattn.retrofit.measure import Retrofit, RetrofitResults, measure_retrofit
from structattn.retrofit.models import load_model

TEXT = "The cat sat on the mat. The dog ran to the door; the cat slept.\n" * 60
_TOKENS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.2}
_HIDDEN = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_LLAMA = _HIDDEN | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32}


def gpt2(vocabulary=96):
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=vocabulary, **_TOKENS))


def rotary(model, config, **fields):
    return model(config(vocab_size=96, **_LLAMA | _TOKENS | fields))


def bytes_tokenizer():
    """A tokenizer with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text and several models."""
    folder = tmp_path_factory.mktemp("huggingface")
    (folder / "text.txt").write_text(TEXT)
    torch.manual_seed(0)
    made = {"gpt2": gpt2(), "bytes": gpt2(256), "no tokenizer": gpt2(50), "few tokens": gpt2(100)}
    made["llama"] = rotary(LlamaForCausalLM, LlamaConfig)
    made["qwen2"] = rotary(Qwen2ForCausalLM, Qwen2Config)
    made["qwen3"] = rotary(Qwen3ForCausalLM, Qwen3Config)
    made["windows"] = rotary(MistralForCausalLM, MistralConfig, sliding_window=8)
    made["t5"] = T5ForConditionalGeneration(T5Config(vocab_size=96, d_model=16, d_kv=8, d_ff=16, num_layers=1))
    made["bert"] = BertLMHeadModel(BertConfig(vocab_size=96, **_HIDDEN))
    made["own"] = LanguageModel(LanguageModelConfig(layers=1, dim=16, heads=2, context_length=32))
    for name, model in made.items():
        model.save_pretrained(folder / name)
    for name in ("bytes", "few tokens"):
        bytes_tokenizer().save_pretrained(folder / name)
    return folder


def study_of(folder, name, **fields):
    options = {"ranks": ((8,), (4, 4)), "tune_steps": 2, "batch_size": 4, "evaluation_tokens": 64}
    return Retrofit(folder / name, str(folder / "text.txt"), **options | {"calibration_tokens": 256} | fields)


@pytest.mark.parametrize("pairs", ["far", "all"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "qwen3", "bytes"])
def test_rows(folder, tmp_path, name, pairs):
    results = measure_retrofit(study_of(folder, name, pairs=pairs), tmp_path)
    assert results.unit == ("nats per token" if name == "bytes" else "nats per character")
    assert results.positions == ("learned" if name in ("gpt2", "bytes") else "rotary")
    assert results.context_length == 32
    standard, measured, trained, *split = results.rows
    assert standard.ranks == (8,)
    assert standard.key_numbers_per_token == 2 * 2 * 8  # layers, key heads, width
    for row in (measured, trained):  # one level is the model itself
        assert row.loss == pytest.approx(standard.loss, abs=1e-4)
        assert row.flops_per_token == standard.flops_per_token
        assert row.score_flops_per_token == standard.score_flops_per_token
    for row in split:
        assert row.loss != pytest.approx(standard.loss, abs=1e-6)
        assert row.key_numbers_per_token == 2 * 2 * (32 * 4 + 16 * 4) / 32
        # Counted and by formula: only scores cost less.
        saved = standard.score_flops_per_token - row.score_flops_per_token
        assert saved > 0
        assert standard.flops_per_token - row.flops_per_token == saved
    assert split[0].loss != split[1].loss
    assert all(row.tuned_loss != row.loss for row in results.rows)
    assert RetrofitResults.load(tmp_path) == results


def test_score_flops_are_those_of_visible_pairs(folder):
    model = load_model(study_of(folder, "llama"))
    cost = model.variant(None, None).flops(32)
    assert cost.scores == 2 * 2 * 4 * 8 * 32 * 33 // 2  # multiply-add, layers, heads, width, pairs
    assert cost.backward > cost.forward


def test_variants_leave_the_model(folder):
    model = load_model(study_of(folder, "gpt2"))
    x = torch.arange(32)[None]
    before = model.variant(None, None)(x).logits
    fitted = model.variant((4, 4), "measured")
    assert not torch.equal(fitted(x).logits, before)
    assert torch.equal(model.variant(None, None)(x).logits, before)
    assert all(parameter.grad is None for parameter in fitted.parameters())


def test_the_text_is_read_with_the_tokenizer(folder):
    task = load_model(study_of(folder, "bytes")).task
    tokenizer = bytes_tokenizer()
    assert tokenizer.decode(task.corpus.train[:23]) == TEXT[:23]


def test_a_longer_context_is_a_choice(folder):
    assert load_model(study_of(folder, "gpt2", context_length=16)).task.context_length == 16
    assert "context_length" not in study_of(folder, "gpt2").to_dict()


@pytest.mark.parametrize("name", ["gpt2", "llama", "bytes"])
def test_command(folder, tmp_path, capsys, name):
    command = ["retrofit", "--model", str(folder / name), "--data", str(folder / "text.txt"), "--out", str(tmp_path)]
    assert main([*command, "--ranks", "4,4", "--tune-steps", "2", "--batch-size", "4", "--context-length", "16"]) == 0
    printed = capsys.readouterr().out
    assert "4|4" in printed
    assert f"losses in nats per {'token' if name == 'bytes' else 'character'}, costs at 16 tokens" in printed
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert len(rows) == 3
    assert (tmp_path / "retrofit.png").exists()
    assert not list((tmp_path / "tuned").iterdir())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("t5", [], "the model here, 't5', is not a causal language model"),
        ("bert", [], "the model here, 'bert', is not a causal language model"),
        ("no tokenizer", [], "knows 50 tokens and there is no tokenizer"),
        ("few tokens", [], "and the model's vocabulary has 100"),
        ("windows", [], "sliding"),
        ("llama", ["--ranks", "5,3"], "hierarchy's ranks must be even at model.layers.0.self_attn"),
        ("gpt2", ["--ranks", "5,4"], "ranks must sum to the head width 8 of transformer.h.0.attn, got 5|4 = 9"),
        ("gpt2", ["--context-length", "64"], "context_length must be at most the model's 32 positions, got 64"),
        ("gpt2", ["--context-length", "0"], "context_length must be a positive integer, got 0"),
        ("own", ["--context-length", "16"], "context_length must be the one the model was trained at, 32, got 16"),
        (".", [], "there is no model here (neither run.json nor config.json)"),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, capsys, name, options, message):
    base = ["retrofit", "--model", str(folder / name), "--data", str(folder / "text.txt"), "--ranks", "4,4"]
    assert main([*base, "--out", str(tmp_path / "out"), *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len([line for line in error.splitlines() if line.startswith("structattn:")]) == 1
    assert not (tmp_path / "out").exists()
