"""The language model: causality, padding, files, generation, Hugging Face's trainer."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from structattn import flops
from structattn.models import LanguageModel, LanguageModelConfig
from structattn.models.parameters import ParameterRole
from tests.tolerance import assert_calibrated
from tests.transformers_versions import checkpoint_activations

WINDOWS = "mlr:4|2|2+windows=9|4+value_ranks=2|2|4"
STRUCTURES = ["standard", "mlr", "mlr:4,2,2", WINDOWS, "swa:4", "gswa:4,4"]
STRUCTURES += ["btt", "bmlr:4,2,2", "lowrank", "monarch"]


def small(**fields):
    torch.manual_seed(1)
    sizes = {"layers": 2, "dim": 32, "heads": 4, "context_length": 16, "vocab_size": 11}
    return LanguageModelConfig(**sizes | fields)


def woken(config):
    """A model whose zero matrices are drawn too, so that its outputs depend on everything."""
    model = LanguageModel(config).eval()
    for name, description in model.describe().items():
        if description.role in (ParameterRole.RESIDUAL, ParameterRole.READ_OUT):
            torch.nn.init.normal_(model.get_parameter(name), std=0.3)
    return model


def tokens(batch=2, length=16):
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def check_padding(model):
    """Two rows with padding at both ends give what each gives alone."""
    x = tokens(length=12)
    padded, mask = torch.zeros(2, 12, dtype=torch.long), torch.zeros(2, 12, dtype=torch.long)
    for row, (start, length) in enumerate([(5, 7), (1, 10)]):
        padded[row, start : start + length] = x[row, :length]
        mask[row, start : start + length] = 1
    together = model(padded, attention_mask=mask).logits
    assert torch.isfinite(together).all()
    exact = copy.deepcopy(model).double()
    for row, (start, length) in enumerate([(5, 7), (1, 10)]):
        alone = x[row : row + 1, :length]
        padded_logits = together[row : row + 1, start : start + length]
        assert_calibrated(padded_logits, exact(alone).logits.double(), model(alone).logits, "padded logits")


@pytest.mark.parametrize("attention", STRUCTURES)
class TestEveryStructure:
    def test_a_prediction_depends_on_earlier_tokens_alone(self, attention):
        model, x = woken(small(attention=attention)), tokens()
        changed = x.clone()
        changed[:, 9] = (changed[:, 9] + 1) % 11
        difference = (model(x).logits - model(changed).logits).abs().amax(dim=(0, 2))
        assert difference[:9].max() < 1e-5
        assert difference[9:12].min() > 1e-4

    def test_flops_are_those_counted(self, attention):
        model, x = woken(small(attention=attention)).train(), tokens(batch=3)
        with flops.counter() as count:
            loss = model(x).logits.sum()
            forward = count.get_total_flops()
            loss.backward()
        assert model.flops(16, batch=3) == flops.Flops(forward, count.get_total_flops() - forward)

    def test_files_bring_it_back(self, attention, tmp_path):
        model = woken(small(attention=attention))
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(loaded) is LanguageModel
        assert torch.equal(model(tokens()).logits, loaded(tokens()).logits)

    def test_padding_changes_nothing(self, attention):
        check_padding(woken(small(attention=attention)))

    def test_every_parameter_is_described_and_gets_a_gradient(self, attention):
        model = woken(small(attention=attention))
        assert model.describe().keys() == dict(model.named_parameters()).keys()
        model(tokens(), labels=tokens()).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_fresh_model_finds_all_tokens_equally_likely():
    model = LanguageModel(small())
    assert model(tokens(), labels=tokens()).loss.item() == pytest.approx(math.log(11))


def test_starts_follow_the_fans():
    model = LanguageModel(small(dim=256, vocab_size=300))
    for name, description in model.describe().items():
        tensor = model.get_parameter(name)
        if description.role is ParameterRole.HIDDEN:
            assert tensor.std().item() == pytest.approx(1 / math.sqrt(description.fan_in), rel=0.05), name
        elif description.role in (ParameterRole.RESIDUAL, ParameterRole.READ_OUT):
            assert tensor.abs().max() == 0, name
        elif description.role is ParameterRole.GAIN:
            assert tensor.eq(1).all(), name
    assert model.describe()["backbone.blocks.0.mlp.contract.weight"].fan_in == 1024


def test_equal_seeds_give_equal_models():
    first, second = LanguageModel(small()), LanguageModel(small())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_missing_weights_are_drawn_and_others_left(tmp_path):
    small_vocabulary = woken(small())
    small_vocabulary.save_pretrained(tmp_path)
    loaded = LanguageModel.from_pretrained(tmp_path, vocab_size=13, ignore_mismatched_sizes=True)
    assert loaded.head.weight.shape == (13, 32)
    assert loaded.head.weight.abs().max() == 0
    block = "backbone.blocks.1.mlp.contract.weight"
    assert torch.equal(loaded.get_parameter(block), small_vocabulary.get_parameter(block))


def test_loss_is_the_cross_entropy_of_the_next_token():
    model, x = woken(small()), tokens()
    output = model(x, labels=x)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    in_parts = sum(model(x[row : row + 1], labels=x[row : row + 1], num_items_in_batch=30).loss for row in range(2))
    torch.testing.assert_close(in_parts, expected)


def test_tied_embeddings_are_one_tensor(tmp_path):
    model = woken(small(tie_word_embeddings=True))
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in model.describe()
    model.save_pretrained(tmp_path)
    loaded = LanguageModel.from_pretrained(tmp_path)
    assert loaded.head.weight is loaded.embedding.weight
    assert torch.equal(model(tokens()).logits, loaded(tokens()).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_can_be_resized(tied, tmp_path):
    model, x = woken(small(tie_word_embeddings=tied)), tokens()
    before = model(x).logits
    model.resize_token_embeddings(17)
    assert model.config.vocab_size == 17
    torch.testing.assert_close(model(x).logits[..., :11], before)
    assert model(x + 6, labels=x + 6).loss.isfinite()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(LanguageModel.from_pretrained(tmp_path)(x).logits, model(x).logits)


def test_bad_calls():
    model, x = LanguageModel(small()), tokens()
    with pytest.raises(ValueError, match=r"input_ids must be \(B, T\), got shape \(16,\)"):
        model(x[0])
    with pytest.raises(ValueError, match="labels need the logits of all tokens, got logits_to_keep = 1"):
        model(x, labels=x, logits_to_keep=1)


def test_gradient_checkpointing_changes_no_gradient():
    model, x = woken(small(attention="mlr", dropout=0.0)).train(), tokens()
    model(x, labels=x).loss.backward()
    plain = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    checkpoint_activations(model, {"use_reentrant": False})
    assert model.backbone.blocks[0].gradient_checkpointing
    model(x, labels=x).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], msg=name)


def test_learned_positions_end_and_say_so():
    model = LanguageModel(small())
    with pytest.raises(ValueError, match=r"learned position table has 16 rows .* got 17 tokens; positions='rotary'"):
        model(tokens(length=17))
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[:, 0] = 0
    model(tokens(length=17), attention_mask=mask)


@pytest.mark.parametrize("attention", ["standard", "mlr:4,4", WINDOWS, "swa:4", "gswa:4,4"])
def test_rotary_positions_do_not_end(attention):
    model = woken(small(positions="rotary", attention=attention))
    check_padding(model)
    assert torch.isfinite(model(tokens(length=50)).logits).all()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 1, 1], [1, 0, 1, 1]], "one run of ones in every row, got holes or none in row 1"),
        ([[0, 0, 0, 0], [1, 1, 1, 1]], "one run of ones in every row, got holes or none in row 0"),
        ([[1, 1, 1]], r"attention_mask must have the shape \(B, T\) = \(2, 4\), got \(1, 3\)"),
    ],
)
def test_bad_masks(mask, message):
    with pytest.raises(ValueError, match=message):
        LanguageModel(small())(tokens(length=4), attention_mask=torch.tensor(mask))


class TestGenerate:
    def test_greedy_takes_the_likeliest_token(self):
        model, x = woken(small()), tokens(length=4)
        out = model.generate(x, max_new_tokens=5, do_sample=False)
        for length in range(4, 9):
            assert torch.equal(out[:, length], model(out[:, :length]).logits[:, -1].argmax(-1))

    @pytest.mark.parametrize("attention", ["mlr:4,2,2", WINDOWS, "swa:4"])
    @pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 3}])
    def test_left_padding_changes_nothing(self, options, attention):
        model, x = woken(small(attention=attention)), tokens(length=6)
        alone = model.generate(x[:1, :3], max_new_tokens=6, do_sample=False, **options)
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), x[:1, :3]], dim=1)
        mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
        batch = torch.cat([padded, x[1:]])
        together = model.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False, **options)
        assert torch.equal(together[0, 3:], alone[0])

    def test_past_the_table_it_says_so(self):
        with pytest.raises(ValueError, match="learned position table has 16 rows"):
            LanguageModel(small()).generate(tokens(length=10), max_new_tokens=10, do_sample=False)


def test_hugging_face_trainer_lowers_the_loss(tmp_path):
    model = LanguageModel(small())
    rows = [{"input_ids": row, "labels": row} for row in tokens(batch=8, length=16)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=15,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        save_strategy="no",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert before == pytest.approx(math.log(11), rel=1e-4)
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
