"""The in-context regression model."""

import pytest
import torch
from transformers import AutoModel

from structattn import flops
from structattn.models import RegressionModel, RegressionModelConfig
from structattn.models.parameters import ParameterRole
from structattn.tasks import RegressionConfig, RegressionTask


def small(**fields):
    torch.manual_seed(1)
    sizes = {"layers": 2, "dim": 32, "heads": 4, "context_length": 24, "input_dim": 6}
    return RegressionModelConfig(**sizes | fields)


def woken(config):
    model = RegressionModel(config).eval()
    for name, description in model.describe().items():
        if description.role in (ParameterRole.RESIDUAL, ParameterRole.READ_OUT):
            torch.nn.init.normal_(model.get_parameter(name), std=0.3)
    return model


@pytest.fixture
def batch():
    task = RegressionTask(RegressionConfig(input_dim=6, curriculum=0.0), total_steps=10)
    return task.batch(0, 3)


@pytest.mark.parametrize("attention", ["standard", "standard:1", "btt", "mlr:4,4", "bmlr:4,2,2"])
def test_a_prediction_depends_on_nothing_after_its_input(attention, batch):
    model, x = woken(small(attention=attention)), batch["inputs"]
    predictions = model(x).logits
    assert predictions.shape == (3, 24)
    changed = x.clone()
    changed[:, 9] += 1  # the answer of the fifth point, whose input is token 8
    difference = (model(changed).logits - predictions).abs().amax(dim=0)
    assert difference[:9].max() < 1e-5
    assert difference[9:12].min() > 1e-4


@pytest.mark.parametrize("attention", ["standard", "btt"])
def test_flops_are_those_counted(attention, batch):
    model = woken(small(attention=attention)).train()
    with flops.counter() as count:
        loss = model(batch["inputs"]).logits.sum()
        forward = count.get_total_flops()
        loss.backward()
    assert model.flops(24, batch=3) == flops.Flops(forward, count.get_total_flops() - forward)


def test_loss_is_that_of_the_task(batch):
    model, task = woken(small()), RegressionTask(RegressionConfig(input_dim=6), total_steps=10)
    output = model(batch["inputs"], labels=batch["targets"])
    torch.testing.assert_close(output.loss, task.loss(output.logits, batch))


def test_a_fresh_model_answers_zero(batch):
    assert RegressionModel(small())(batch["inputs"]).logits.abs().max() == 0


def test_files_bring_it_back(tmp_path, batch):
    model = woken(small(attention="btt"))
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is RegressionModel
    assert torch.equal(model(batch["inputs"]).logits, loaded(batch["inputs"]).logits)


def test_shorter_prompts_are_read(batch):
    model = woken(small())
    whole = model(batch["inputs"]).logits
    torch.testing.assert_close(model(batch["inputs"][:, :10]).logits, whole[:, :10])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 24, 5), r"inputs must be \(B, 2N, d\) with d = 6, got \(3, 24, 5\)"),
        ((3, 26, 6), "learned position table has 24 rows"),
    ],
)
def test_bad_inputs(shape, message):
    with pytest.raises(ValueError, match=message):
        RegressionModel(small())(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(3, 24), (3, 1), (1, 12), (12,), ()])
def test_labels_are_not_broadcast(batch, shape):
    with pytest.raises(ValueError, match=r"labels must be \(B, N\) = \(3, 12\), an answer for each input, got"):
        RegressionModel(small())(batch["inputs"], labels=torch.zeros(shape))
