"""The forecasting model."""

import copy

import pytest
import torch
from transformers import AutoModel

from structattn import flops
from structattn.models import ForecastModel, ForecastModelConfig
from structattn.models.parameters import ParameterRole
from structattn.training import TrainConfig
from structattn.training.mup import parameter_groups
from tests.tolerance import assert_calibrated

STRUCTURES = ["standard", "mlr:4,4", "mlr:4x2", "swa:4", "gswa:4,4", "btt", "bmlr:4,2,2"]


def small(**fields):
    torch.manual_seed(1)
    sizes = {"layers": 2, "dim": 32, "heads": 4, "context_length": 24, "channels": 3, "horizon": 10}
    return ForecastModelConfig(**sizes | fields)


def woken(config):
    model = ForecastModel(config).eval()
    for name, description in model.describe().items():
        if description.role in (ParameterRole.RESIDUAL, ParameterRole.READ_OUT):
            torch.nn.init.normal_(model.get_parameter(name), std=0.3)
    return model


@pytest.fixture
def inputs():
    return torch.randn(2, 24, 3)


@pytest.mark.parametrize("attention", STRUCTURES)
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_every_token_sees_the_ones_after_it(attention, positions, inputs):
    if attention in ("btt", "bmlr:4,2,2") and positions == "rotary":
        pytest.skip("bilinear attention has no rotary embedding")
    model = woken(small(attention=attention, positions=positions, layers=1))
    hidden = model.backbone(model.read_in(inputs))
    changed = inputs.clone()
    changed[:, 23] += 1
    difference = (model.backbone(model.read_in(changed)) - hidden).abs().amax(dim=(0, 2))
    assert difference[22] > 1e-4
    if attention != "swa:4":
        assert difference[0] > 1e-4


@pytest.mark.parametrize("attention", STRUCTURES)
def test_flops_are_those_counted(attention, inputs):
    model = woken(small(attention=attention)).train()
    with flops.counter() as count:
        loss = model(inputs).logits.sum()
        forward = count.get_total_flops()
        loss.backward()
    assert model.flops(24, batch=2) == flops.Flops(forward, count.get_total_flops() - forward)


@pytest.mark.parametrize("mup", [True, False])
def test_every_parameter_is_described_and_trains(mup, inputs):
    model = ForecastModel(small(attention="mlr:4,4"))
    assert model.describe().keys() == dict(model.named_parameters()).keys()
    groups = parameter_groups(model, TrainConfig(steps=1, mup=mup, base_dim=64))
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for _ in range(4):  # what starts at zero holds back the gradients of what lies below it for a step or two
        optimizer.zero_grad()
        model(inputs, labels=torch.randn(2, 10, 3)).loss.backward()
        optimizer.step()
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []


def test_parts():
    parts = {name: each.role for name, each in ForecastModel(small()).describe().items()}
    assert parts["read_in.weight"] is ParameterRole.READ_IN
    assert parts["to_channels.weight"] is ParameterRole.READ_OUT
    assert parts["to_horizon.weight"] is ParameterRole.READ_IN


@pytest.mark.parametrize(("norm", "expected"), [("last", "last"), ("standard", "mean"), ("none", "zero")])
def test_a_fresh_model_answers_what_was_taken_off(norm, expected, inputs):
    answer = ForecastModel(small(window_norm=norm))(inputs).logits
    centres = {"last": inputs[:, -1:], "mean": inputs.mean(dim=1, keepdim=True), "zero": torch.zeros(2, 1, 3)}
    torch.testing.assert_close(answer, centres[expected].expand(2, 10, 3))


@pytest.mark.parametrize("norm", ["last", "standard"])
def test_predictions_follow_a_shift_of_a_channel(norm, inputs):
    model = woken(small(window_norm=norm))
    shift = torch.tensor([5.0, 0.0, -3.0])
    with torch.no_grad():
        shifted, plain = model(inputs + shift).logits, model(inputs).logits + shift
        exact = copy.deepcopy(model).double()(inputs.double()).logits.double() + shift
    # The shift is rounded into the inputs, and the prediction is scaled back by their deviation.
    assert_calibrated(shifted, exact, plain, largest_term=float((inputs + shift).abs().max()))
    if norm == "standard":
        torch.testing.assert_close(model(4 * inputs).logits, 4 * model(inputs).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm", ["last", "standard", "none"])
def test_a_constant_context_is_no_division_by_zero(norm):
    model = woken(small(window_norm=norm))
    output = model(torch.full((2, 24, 3), 2.5), labels=torch.zeros(2, 10, 3))
    output.loss.backward()
    assert output.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_loss_is_the_mean_squared_error(inputs):
    model, labels = woken(small()), torch.randn(2, 10, 3)
    output = model(inputs, labels=labels)
    torch.testing.assert_close(output.loss, (output.logits - labels).square().mean())


def test_files_bring_it_back(tmp_path, inputs):
    model = woken(small(attention="mlr:4,4", window_norm="standard"))
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is ForecastModel
    assert not loaded.config.is_causal
    assert torch.equal(model(inputs).logits, loaded(inputs).logits)


@pytest.mark.parametrize("shape", [(2, 23, 3), (2, 25, 3), (2, 24, 4), (24, 3)])
def test_bad_inputs(shape):
    with pytest.raises(ValueError, match=r"inputs must be \(B, T, C\) with context_length T = 24 and channels C = 3"):
        ForecastModel(small())(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 1, 3), (10, 3), (2, 10, 1), (1, 10, 3)])
def test_labels_are_not_broadcast(inputs, shape):
    with pytest.raises(ValueError, match=r"labels must be \(B, H, C\) = \(2, 10, 3\), got"):
        ForecastModel(small())(inputs, labels=torch.zeros(shape))


@pytest.mark.parametrize("field", ["channels", "horizon"])
def test_bad_configs(field):
    with pytest.raises(ValueError, match=f"{field} must be a positive integer, got 0"):
        small(**{field: 0})
