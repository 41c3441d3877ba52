import pytest
import torch

from structattn.models import LanguageModel, LanguageModelConfig, RegressionModel, RegressionModelConfig
from structattn.training import TrainConfig
from structattn.training.mup import parameter_groups


def rates(model, **fields):
    """Return peak rate and decay of every tensor by name."""
    config = TrainConfig(**{"steps": 1, "learning_rate": 1e-3, "base_dim": 64} | fields)
    groups = parameter_groups(model, config)
    return {name: (group["peak"], group["weight_decay"]) for group in groups for name in group["names"]}


def language(dim, attention="standard"):
    return LanguageModel(LanguageModelConfig(layers=1, dim=dim, heads=dim // 32, attention=attention))


def test_rates_of_dense_matrices():
    found = rates(language(256), weight_decay=0.1)
    block = "backbone.blocks.0"
    assert found[f"{block}.attention.q_proj.weight"] == pytest.approx((1e-3 / 4, 0.4))
    assert found[f"{block}.attention.out_proj.weight"] == pytest.approx((1e-3 / 4, 0.4))
    assert found[f"{block}.mlp.expand.weight"] == pytest.approx((1e-3 / 4, 0.4))
    assert found[f"{block}.mlp.contract.weight"] == pytest.approx((1e-3 / 16, 1.6))
    assert found["head.weight"] == pytest.approx((1e-3 / 4, 0.4))
    assert found["embedding.weight"] == found["backbone.positions.weight"] == (1e-3, 0.0)
    assert found[f"{block}.attention_norm.weight"] == found["backbone.norm.weight"] == (1e-3, 0.0)
    assert found[f"{block}.attention.q_norm.weight"] == (1e-3, 0.0)


def test_gains_of_norms_have_a_rate_of_their_own():
    found = rates(language(256), norm_rate=3.7)
    block = "backbone.blocks.0"
    for name in (f"{block}.attention_norm.weight", f"{block}.attention.q_norm.weight", "backbone.norm.weight"):
        assert found[name] == pytest.approx((3.7e-3, 0.0))
    assert found["embedding.weight"] == (1e-3, 0.0)
    assert found[f"{block}.attention.q_proj.weight"][0] == pytest.approx(1e-3 / 4)


def test_rates_of_structured_factors_are_those_of_a_block():
    btt = rates(language(256, "btt"))
    factors = [name for name in btt if ".matrix." in name or ".structure." in name]
    assert len(factors) == 2, sorted(btt)
    assert all(btt[name][0] == pytest.approx(1e-3 * 64 / 16) for name in factors)  # D = 256: blocks of 16
    bmlr = rates(language(256, "bmlr:16,8,8"))
    blocks = sorted(bmlr[name][0] for name in bmlr if ".matrix." in name or ".structure." in name)
    assert blocks == pytest.approx(sorted(1e-3 * 64 * pieces / 256 for pieces in (1, 2, 4) for _ in "LR"))


def test_rates_of_the_papers_code_for_regression():
    """Width 256, base width 768, rate 1e-4: factors of 8 x 32 blocks at 2.4e-3 and 9.6e-3, dense matrices at 3e-4."""
    model = RegressionModel(RegressionModelConfig(layers=1, dim=256, heads=8, input_dim=64, attention="btt+paper"))
    found = rates(model, learning_rate=1e-4, base_dim=768)
    block = "backbone.blocks.0.attention"
    assert found[f"{block}.structure.right_1"][0] == pytest.approx(2.4e-3)
    assert found[f"{block}.structure.left_1"][0] == pytest.approx(9.6e-3)
    assert found[f"{block}.v_proj.weight"][0] == pytest.approx(3e-4)
    assert found[f"{block}.k_norm.weight"][0] == found["read_in.weight"][0] == 1e-4
    bmlr = RegressionModel(RegressionModelConfig(layers=1, dim=256, heads=8, input_dim=64, attention="bmlr:16,8,4,4"))
    found = rates(bmlr, learning_rate=1e-4, base_dim=768)
    for level, pieces in enumerate((1, 2, 4, 8), start=1):
        assert found[f"{block}.structure.left_{level}"][0] == pytest.approx(1e-4 * 768 * pieces / 256)


def test_an_input_of_fixed_size_keeps_the_base_rate():
    model = RegressionModel(RegressionModelConfig(layers=1, dim=128, heads=4, input_dim=8))
    found = rates(model)
    assert found["read_in.weight"][0] == 1e-3
    assert found["head.weight"][0] == pytest.approx(1e-3 / 2)


def test_without_mup_there_is_one_rate():
    found = rates(language(256, "btt"), mup=False, weight_decay=0.1)
    assert {peak for peak, _ in found.values()} == {1e-3}
    assert found["embedding.weight"][1] == 0.0
    assert found["head.weight"][1] == 0.1


def test_every_parameter_is_in_one_group():
    model = language(64)
    groups = parameter_groups(model, TrainConfig(steps=1))
    listed = [parameter for group in groups for parameter in group["params"]]
    assert len(listed) == len({id(parameter) for parameter in listed}) == len(list(model.parameters()))
    torch.optim.AdamW(groups, fused=True)
