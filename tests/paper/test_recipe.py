"""The authors' language recipe: initial deviations, rates, schedule, and the loss at equal compute."""

import dataclasses

import pytest

from paper.recipe import PAPER_RATES, Recipe, recipe_sizes, recipe_training
from paper.study import UNFINISHED, Outcome
from structattn.comparison.run import RunConfig, stored_fields
from structattn.tasks import LanguageConfig
from structattn.training.mup import parameter_groups
from structattn.training.schedule import rate_factor


def config(**sizes):
    made = dataclasses.replace(recipe_sizes(1, 64, 2), **sizes)
    return RunConfig("mlr+paper", LanguageConfig("stdlib"), made, recipe_training(8_000, 8, 3e-3))


def test_tables_of_tokens_and_positions_start_alike():
    backbone = config().build_model().backbone
    assert backbone.positions.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert config().build_model().embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    larger = config(position_deviation=0.5, token_deviation=2.0).build_model()
    assert larger.backbone.positions.weight.std().item() == pytest.approx(0.5, rel=0.02)
    assert larger.embedding.weight.std().item() == pytest.approx(2.0, rel=0.05)


def test_rates_have_768_for_their_base():
    groups = parameter_groups(config().build_model(), config().train)
    rates = {name: group["peak"] for group in groups for name in group["names"]}
    assert rates["backbone.blocks.0.attention.q_proj.weight"] == pytest.approx(3e-3 * 768 / 64)
    assert rates["backbone.blocks.0.mlp.contract.weight"] == pytest.approx(3e-3 * 768 / 256)
    assert rates["embedding.weight"] == rates["backbone.positions.weight"] == pytest.approx(3e-3)
    assert {group["weight_decay"] for group in groups} == {0.0}


def test_the_rate_is_constant_after_2000_steps():
    train = recipe_training(8_000, 8, 3e-3)
    factors = [
        rate_factor(step / 8_000, warmup=train.warmup, schedule=train.schedule) for step in (1_000, 2_000, 8_000)
    ]
    assert factors == pytest.approx([0.5, 1.0, 1.0])
    with pytest.raises(ValueError, match="above the 2000 of the warm-up, got 2000"):
        recipe_training(2_000, 8, 3e-3)


def test_paper_scale_has_the_rates_of_the_figure():
    trials = Recipe().trials("paper", "stdlib", 1)
    rates = {(trial.config.attention, trial.config.sizes.dim): trial.config.train.learning_rate for trial in trials}
    assert rates["mlr+paper", 768] == PAPER_RATES["mlr"][768] == 1.65e-2
    assert rates["standard+scale=8/r", 768] == 1.65e-3
    assert {trial.config.train.batch_size * trial.config.context_length for trial in trials} == {32_768}


def test_later_fields_are_stored_where_they_are_set():
    assert stored_fields(recipe_sizes(4, 64, 2))["token_deviation"] == 0.02
    assert stored_fields(recipe_training(8_000, 8, 3e-3))["epsilon"] == 1e-20
    assert "norm_rate" not in stored_fields(recipe_training(8_000, 8, 3e-3))
    assert RunConfig.from_dict(config().to_dict()) == config()


def test_a_run_that_was_cut_short_is_shown_and_not_judged():
    def outcome(structure, steps):
        rows = tuple(
            {
                "step": step,
                "tokens": 2_048 * step,
                "flops": step,
                "seconds": 1.0,
                "nats_per_character": 2.0 - step / 8_000,
            }
            for step in range(400, steps + 1, 400)
        )
        cut = UNFINISHED if steps < 8_000 else {}
        return Outcome({"structure": structure, "width": 64, "learning_rate": 3e-3, "seed": 0} | cut, 1, rows)

    outcomes = [outcome("standard", 8_000), outcome("mlr+paper", 4_000)]
    finding = Recipe().finding(outcomes)
    assert "mlr" not in finding.statement
    assert finding.agrees is None
    assert Recipe().table(outcomes).splitlines()[-1] == (
        "| `mlr+paper`, rate 0.003, seed 0 | 4,000 | 1.600 | `standard` 1.600 |"
    )


def test_structures_are_compared_where_the_cheapest_ends():
    def outcome(structure, losses):
        rows = tuple(
            {"step": step, "tokens": 1_000 * step, "flops": step, "seconds": 1.0, "nats_per_character": loss}
            for step, loss in enumerate(losses, start=1)
        )
        return Outcome({"structure": structure, "width": 64, "learning_rate": 3e-3, "seed": 0}, 1, rows)

    falling = [2.0 - 0.1 * step for step in range(1, 11)]
    statement = Recipe().finding([outcome("standard", falling), outcome("mlr+paper", falling)]).statement
    # Five evaluations are averaged: 1.2 at the end. Standard attention is cut off before its own, at 92% of its tokens.
    assert "mlr+paper 1.200" in statement
    assert "standard 1.277" in statement
