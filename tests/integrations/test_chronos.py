"""Chronos with MLR attention: exactness, forecasts, files, costs, training, metrics, and what is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

chronos = pytest.importorskip("chronos", reason="Chronos is not installed")
pytest.importorskip("gluonts", reason="gluonts is not installed")

from transformers import AutoModelForSeq2SeqLM, T5ForConditionalGeneration  # noqa: E402

from structattn import Hierarchy, flops  # noqa: E402
from structattn.integrations import chronos as integration  # noqa: E402
from structattn.integrations.chronos import (  # noqa: E402
    SIZES,
    ChronosLearner,
    ChronosSize,
    forecast,
    load_chronos,
    make_chronos,
    sample_metrics,
    seasonal_naive_samples,
    set_attention,
)
from structattn.integrations.t5 import parse_t5_attention  # noqa: E402
from structattn.integrations.transformers import get_hierarchy  # noqa: E402
from structattn.layers import MLRConfig, build_attention, parse_attention  # noqa: E402
from structattn.models.parameters import ParameterRole  # noqa: E402
from structattn.models.transformers_internals import set_attention_implementation  # noqa: E402
from tests.tolerance import assert_calibrated  # noqa: E402

SMALL = ChronosSize(d_model=16, num_layers=2, num_heads=2, d_ff=32, d_kv=8)
CONTEXT, HORIZON, TOKENS = 24, 6, 40
LENGTHS = {"context_length": CONTEXT, "prediction_length": HORIZON, "n_tokens": TOKENS}
STANDARD = "standard+qk_norm=false+scale=1"
MLR = "mlr:4|2|2+gains=none+level_weight=1+qk_norm=false+paper"
IN_T5 = "+level_weight=1+qk_norm=false"
NEAR = "mlr:4|2|2+windows=9|3+value_ranks=4|0|4+level_weight=1+qk_norm=false"
EARLIER = {"encoder": "4|2|2@24", "decoder": "4|2|2@*|4|2"}
"""Hierarchies that version 0.1.0 wrote for `mlr:4|2|2`, which had neither gains nor level weights then."""
PUBLISHED = {"tiny": 8_394_496, "mini": 20_456_192, "small": 46_154_240}


def make(attention=MLR, size=SMALL, **fields):
    """Return a pipeline with weights so large that logits depend on the whole context."""
    return make_chronos(size, attention, **LENGTHS | {"initializer_factor": 1.5} | fields)


def rows(count=3, seed=0):
    """Return ids as in the task, with half of the first row's context missing."""
    ids = torch.randint(2, TOKENS, (count, CONTEXT + HORIZON + 2), generator=torch.Generator().manual_seed(seed))
    ids[:, [CONTEXT, -1]] = 1
    ids[0, : CONTEXT // 2] = 0
    return ids


def series(count=3, length=CONTEXT):
    steps = torch.arange(length)
    return torch.stack([torch.sin(steps / (2 + row)) + 0.1 * row for row in range(count)])


# --- models -----------------------------------------------------------------------------------------------------------


def test_sizes_are_the_published_ones():
    with torch.device("meta"):
        parameters = {name: make_chronos(name).inner_model.num_parameters() for name in SIZES}
    assert parameters == PUBLISHED


@pytest.mark.parametrize(
    "attention", [STANDARD, {"encoder": Hierarchy.flat(8), "decoder": [Hierarchy.parse("8@1")] * 2}]
)
def test_one_level_is_the_original(attention):
    ours = make(attention)
    original = T5ForConditionalGeneration(ours.inner_model.config).eval()
    original.load_state_dict(ours.inner_model.state_dict())
    learner = ChronosLearner(ours)
    context, future = rows().split([CONTEXT + 1, HORIZON + 1], dim=1)
    given = {"input_ids": context, "attention_mask": context != 0, "labels": future.contiguous()}
    with torch.no_grad():
        logits = learner(rows()).logits
        for implementation in ("eager", "sdpa"):
            set_attention_implementation(original, implementation)
            plain, exact = original.float()(**given).logits, original.double()(**given).logits
            assert_calibrated(logits, exact, plain)


def test_missing_values_are_read_as_the_original_reads_them():
    ours = make(STANDARD)
    original = make(STANDARD)
    set_attention_implementation(original.inner_model, "eager")
    past = series()
    past[0, [0, 4, 5]] = past[1, -1] = torch.nan
    drawn = []
    for pipeline in (ours, original):
        torch.manual_seed(0)
        drawn.append(pipeline.predict(past, HORIZON, num_samples=3))
    torch.testing.assert_close(*drawn)
    assert make().predict(past, HORIZON, num_samples=3).isfinite().all()


def test_levels_change_both_stacks_and_equal_weights_start_all():
    standard, mlr = ChronosLearner(make(STANDARD)), ChronosLearner(make())
    for one, other in zip(standard.parameters(), mlr.parameters(), strict=True):
        assert torch.equal(one, other)
    context = rows()[:, : CONTEXT + 1]
    with torch.no_grad():
        read = [learner.model.encoder(input_ids=context, attention_mask=context != 0)[0] for learner in (standard, mlr)]
        written = [
            learner.model.decoder(input_ids=rows()[:, -7:], encoder_hidden_states=read[0])[0]
            for learner in (standard, mlr)
        ]
    assert not torch.allclose(read[0], read[1], atol=1e-3)
    assert not torch.allclose(written[0], written[1], atol=1e-3)


@pytest.mark.parametrize(
    ("attention", "encoder", "decoder"),
    [
        (STANDARD, "8", "8"),
        (MLR, "4|2|2@24", "4|2|2@*|4|2"),
        ("mlr:4,4+level_weight=1+qk_norm=false+paper", "4|4@24/mean", "4|4@6/mean"),
        ("mlr+gains=none+level_weight=1+qk_norm=false+paper", "4|4@24", "8"),
        ("mlr:4,4+level_weight=1+qk_norm=false", "4|4v@w12", "4|4v@w3"),
        ("mlr+levels=1+level_weight=1+qk_norm=false", "8v", "8v"),
        ("mlr:4|4+block_sizes=*|5+level_weight=1+qk_norm=false", "4|4v@*|5", "4|4v@*|5"),
        (NEAR, "4|2|2v4|0|4@w9|3", "4|2|2v4|0|4@w9|3"),
        (NEAR.replace("windows=9|3", "windows=20|9|3"), "4|2|2v4|0|4@w20|9|3", "4|2|2v4|0|4@w20|9|3"),
        ("mlr:4|4+value_ranks=6|2+level_weight=1+qk_norm=false+paper", "4|4v6|2@24/mean", "4|4v6|2@6/mean"),
        (MLRConfig((4, 2, 2), level_weight="1", qk_norm=False, paper=True), "4|2|2@24/mean", "4|2|2@*|4|2/mean"),
        ({"encoder": MLR, "decoder": STANDARD}, "4|2|2@24", "8"),
        ({"encoder": [MLR, MLR], "decoder": STANDARD}, "4|2|2@24", "8"),
    ],
)
def test_blocks_follow_from_context_and_horizon(attention, encoder, decoder):
    levels = get_hierarchy(make(attention).inner_model)
    assert levels == {"encoder": [Hierarchy.parse(encoder)] * 2, "decoder": [Hierarchy.parse(decoder)] * 2}


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize(
    "attention",
    [
        STANDARD,
        MLR,
        NEAR,
        MLR.replace("+gains=none", ""),
        "mlr:2|6+level_weight=1+qk_norm=false",
        "mlr+levels=2+level_weight=1+qk_norm=false",
    ],
)
def test_a_spelling_means_what_it_means_in_a_layer(attention, stack):
    """The T5's self-attention, its position bias at zero, against the layer that the spelling builds."""
    model = make(attention).inner_model.double()
    theirs = getattr(model, stack).block[0].layer[0].SelfAttention
    theirs.relative_attention_bias.weight.data.zero_()
    length = {"encoder": CONTEXT, "decoder": HORIZON}[stack]
    layer = build_attention(attention, 16, 2, length, head_dim=8, is_causal=stack == "decoder", dtype=torch.float64)
    names = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o"}
    layer.load_state_dict({f"{ours}.weight": getattr(theirs, name).weight for ours, name in names.items()})
    x = torch.randn(3, length, 16, dtype=torch.float64)
    with torch.no_grad():
        assert_calibrated(theirs(x)[0], layer(x), layer(x))


# --- forecasts and files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [STANDARD, MLR])
def test_pipeline_predicts(attention):
    pipeline = make(attention)
    assert isinstance(pipeline, chronos.ChronosPipeline)
    samples = pipeline.predict([*series()[:, -17:], series()[0]], num_samples=5)
    assert samples.shape == (4, 5, HORIZON)
    assert samples.isfinite().all()
    quantiles, mean = pipeline.predict_quantiles(series(), quantile_levels=[0.1, 0.5], num_samples=5)
    assert quantiles.shape == (3, HORIZON, 2)
    assert mean.shape == (3, HORIZON)


@pytest.mark.parametrize("attention", [MLR, NEAR])
def test_generation_reads_the_logits_that_training_sees(attention):
    """The likeliest ids, token by token from the cache, are those of one forward pass."""
    pipeline = make(attention)
    learner, context = ChronosLearner(pipeline), rows()[:, : CONTEXT + 1]
    ids = pipeline.inner_model.generate(
        context, attention_mask=context != 0, do_sample=False, min_new_tokens=HORIZON + 1, max_new_tokens=HORIZON + 1
    )[:, 1:]
    with torch.no_grad():
        logits = learner(torch.cat([context, ids], dim=1)).logits
    logits[..., 1] = -torch.inf  # The end, which generation forbids before the last token.
    assert torch.equal(logits[:, :-1].argmax(-1), ids[:, :-1])


@pytest.mark.parametrize("attention", [MLR, NEAR])
def test_files_bring_attention_and_forecasts_back(attention, tmp_path):
    pipeline = make(attention)
    pipeline.inner_model.save_pretrained(tmp_path)
    for again in (
        load_chronos(tmp_path),
        chronos.ChronosPipeline.from_pretrained(tmp_path, attn_implementation="structattn_mlr"),
    ):
        assert get_hierarchy(again.inner_model) == get_hierarchy(pipeline.inner_model)
        np.testing.assert_array_equal(forecast(again, series(), 4), forecast(pipeline, series(), 4))


def test_an_existing_checkpoint_gets_levels(tmp_path):
    """Chronos's own training saves a config without hierarchies."""
    original = T5ForConditionalGeneration(make(STANDARD).inner_model.config)
    del original.config.structattn_mlr, original.encoder.config.structattn_mlr, original.decoder.config.structattn_mlr
    original.save_pretrained(tmp_path)
    assert "structattn" not in (tmp_path / "config.json").read_text()
    assert load_chronos(tmp_path).inner_model.config._attn_implementation != "structattn_mlr"
    loaded = load_chronos(tmp_path, MLR)
    assert str(get_hierarchy(loaded.inner_model)["encoder"][0]) == "4|2|2@24"
    expected = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in loaded.inner_model.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_a_folder_of_an_earlier_version_keeps_its_levels(tmp_path):
    """Its config names hierarchies, which do not depend on how an attention is spelt."""
    make(STANDARD).inner_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    layers = {stack: [{"hierarchy": text, "order": None}] * 2 for stack, text in EARLIER.items()}
    (tmp_path / "config.json").write_text(json.dumps(config | {"structattn_mlr": {"pairing": None, **layers}}))
    loaded = load_chronos(tmp_path)
    assert get_hierarchy(loaded.inner_model) == get_hierarchy(make().inner_model)
    np.testing.assert_array_equal(forecast(loaded, series(), 4), forecast(make(), series(), 4))


def test_forecasts_are_named_by_their_seed():
    pipeline = make()
    first = forecast(pipeline, series(), 4, samples=3, seed=1)
    state = torch.get_rng_state()
    assert first.shape == (3, 3, 4)
    np.testing.assert_array_equal(forecast(pipeline, series(), 4, samples=3, seed=1), first)
    assert not np.array_equal(forecast(pipeline, series(), 4, samples=3, seed=2), first)
    assert torch.equal(torch.get_rng_state(), state)


# --- cost and training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [STANDARD, MLR, NEAR])
@pytest.mark.parametrize("size", [SMALL, ChronosSize(24, 1, 3, 40, 8)])
def test_flops_by_formula_are_those_counted(attention, size):
    learner = ChronosLearner(make(attention, size))
    ids = rows()
    ids[0] = ids[1]  # Formulas know no padding.
    with flops.counter() as forward:
        loss = learner(ids).logits.logsumexp(-1).sum()
    with flops.counter() as backward:
        loss.backward()
    formula = learner.flops(ids.shape[1], len(ids))
    assert formula.forward == forward.get_total_flops()
    assert formula.backward == backward.get_total_flops()


def test_flops_of_a_model_with_its_own_attention_are_those_of_one_level():
    ours, original = make(STANDARD), make(STANDARD)
    set_attention_implementation(original.inner_model, "eager")
    assert ChronosLearner(original).flops(32) == ChronosLearner(ours).flops(32)


def test_levels_cost_less():
    standard, mlr = (ChronosLearner(make(attention)).flops(32) for attention in (STANDARD, MLR))
    assert mlr.forward - mlr.scores == standard.forward - standard.scores
    assert mlr.scores < standard.scores


def test_every_parameter_is_described():
    learner = ChronosLearner(make())
    described = learner.describe()
    assert list(described) == [name for name, _ in learner.named_parameters()]
    parts = {name.removeprefix("model."): described[name] for name in described}
    assert parts["shared.weight"].role is ParameterRole.EMBEDDING
    assert parts["encoder.final_layer_norm.weight"].role is ParameterRole.GAIN
    wo = parts["encoder.block.0.layer.1.DenseReluDense.wo.weight"]
    assert (wo.role, wo.fan_in, wo.fan_out) == (ParameterRole.RESIDUAL, 32, 16)


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_against_values_by_hand():
    """Two series, one forecast each of a single path, whose quantiles are all the path."""
    past = np.array([[0.0, 1.0, 3.0], [5.0, 4.0, 5.0]])  # mean steps of 1.5 and 1
    future, path = np.array([[4.0, 6.0], [5.0, -1.0]]), np.array([[[3.0, 6.0]], [[5.0, 1.0]]])
    metrics = sample_metrics(path, past, future, season=1)
    assert metrics["mase"] == pytest.approx((1 / 1.5 + 0 + 0 + 2 / 1) / 4)
    assert metrics["mase_median"] == pytest.approx(((1 / 1.5) / 2 + 1.0) / 2)
    # 2 Σ max(α e, (α - 1) e) with e = 1 and e = -2, over Σ|y| = 16; the mean of α over the levels is a half.
    assert metrics["wql"] == pytest.approx((2 * 0.5 * 1 + 2 * 0.5 * 2) / 16)


def test_metrics_against_their_formulas():
    draws = np.random.default_rng(0)
    paths, past, future = draws.normal(size=(5, 11, 4)), draws.normal(size=(5, 20)), draws.normal(size=(5, 4))
    levels = np.arange(1, 10)[:, None, None] / 10
    error = future - np.quantile(paths, levels[:, 0, 0], axis=1)
    loss = 2 * np.maximum(levels * error, (levels - 1) * error).sum(axis=(1, 2)) / np.abs(future).sum()
    scale = np.abs(past[:, 3:] - past[:, :-3]).mean(axis=1, keepdims=True)
    scaled = np.abs(future - np.median(paths, axis=1)) / scale
    metrics = sample_metrics(paths, past, future, season=3)
    assert metrics["wql"] == pytest.approx(loss.mean())
    assert metrics["mase"] == pytest.approx(scaled.mean())
    assert metrics["mase_median"] == pytest.approx(np.median(scaled.mean(axis=1)))


@pytest.mark.parametrize("samples", [2, 11, 20])
def test_metrics_are_those_that_gluonts_gives_its_own_forecasts(samples):
    pandas = pytest.importorskip("pandas")
    evaluation = pytest.importorskip("gluonts.model.evaluation")
    from gluonts.dataset.split import split
    from gluonts.ev.metrics import MASE, MeanWeightedSumQuantileLoss
    from gluonts.model.forecast import SampleForecast

    draws = np.random.default_rng(1)
    paths, values = draws.normal(size=(4, samples, 3)), draws.normal(size=(4, 30))
    start = pandas.Period("2020-01-01", freq="D")
    _, template = split([{"start": start, "target": row} for row in values], offset=-3)
    data = template.generate_instances(3, windows=1)
    forecasts = [SampleForecast(samples=one, start_date=start + 27) for one in paths]
    levels = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    expected = evaluation.evaluate_forecasts(
        forecasts, test_data=data, metrics=[MASE(), MeanWeightedSumQuantileLoss(levels)], seasonality=7
    )
    metrics = sample_metrics(paths, values[:, :27], values[:, 27:], season=7)
    assert metrics["mase"] == pytest.approx(expected["MASE[0.5]"].item())
    assert metrics["wql"] == pytest.approx(expected["mean_weighted_sum_quantile_loss"].item())


def test_seasonal_naive_repeats_the_last_season():
    past = np.array([[9.0, 1.0, 2.0, 3.0]])
    assert seasonal_naive_samples(past, 5, 3).tolist() == [[[1.0, 2.0, 3.0, 1.0, 2.0]]]
    assert seasonal_naive_samples(past, 2, 1).tolist() == [[[3.0, 3.0]]]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": "tiney"}, ValueError, "size must be one of tiny, mini, small, got 'tiney'; did you mean 'tiny'"),
        ({"size": 3}, TypeError, "size must be"),
        ({"attention": MLR.replace("4|2|2", "4|2")}, ValueError, "must sum to the head width 8"),
        (
            {"attention": NEAR.replace("4|0|4", "4|0|2")},
            ValueError,
            r"values' width 8, got 4\|0\|2 = 6",
        ),
        ({"attention": NEAR.replace("mlr:4|2|2", "mlr:2|2|2")}, ValueError, "ranks must sum to the head width 8"),
        ({"attention": MLR + "+frequencies=per_level"}, ValueError, "frequencies must be left out in a T5"),
        ({"attention": STANDARD + "+kv_heads=1"}, ValueError, "kv_heads must be left out in a T5, got 1"),
        ({"attention": "swa:8"}, ValueError, "attention in a T5 must be standard or mlr, got 'swa:8'"),
        ({"attention": "mlr:4|4@sixty"}, ValueError, "expected a positive integer, got 'sixty'"),
        ({"attention": "8@1"}, ValueError, "attention must be one of standard"),
        ({"attention": {"encoder": "8@1", "decoder": MLR}}, ValueError, "attention must be one of standard"),
        ({"attention": {"encode": MLR}}, ValueError, "must be one of encoder, decoder, got 'encode'; did you mean"),
        ({"attention": {"encoder": MLR}}, ValueError, "must have the keys encoder, decoder, got encoder"),
        ({"attention": [MLR, MLR]}, TypeError, "an attention kind must be spelt as a string"),
        ({"context_length": 0}, ValueError, "context_length must be a positive integer"),
        ({"n_tokens": 4}, ValueError, "n_tokens must be at least 5"),
        ({"dropout": 1.0}, ValueError, "dropout must be"),
    ],
)
def test_bad_models_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        make(**arguments)


@pytest.mark.parametrize(
    ("attention", "field", "works"),
    [
        ("standard+scale=1", "qk_norm must be false in a T5, got true", [STANDARD]),
        ("standard:1", "heads must be left out in a T5, got 1", [STANDARD]),
        ("standard+qk_norm=false", "scale must be 1 in a T5, got 1/sqrt(r)", [STANDARD]),
        ("mlr:4|2|2+paper", "level_weight must be 1 in a T5, got 1/r_l", [MLR.replace("+gains=none", ""), MLR]),
        ("mlr:4|2|2+level_weight=1/r", "level_weight must be 1 in a T5, got 1/r", ["mlr:4|2|2" + IN_T5]),
        ("mlr:4|2|2+gains=none+level_weight=1+paper", "qk_norm must be false in a T5, got true", [MLR]),
        (f"{MLR}+basis=true", "basis must be false in a T5, got true", [MLR]),
    ],
)
def test_what_a_t5_cannot_express_is_refused_with_a_spelling_that_works(attention, field, works):
    with pytest.raises(ValueError, match=re.escape(field)) as refused:
        make(attention)
    assert repr(str(parse_attention(attention))) in str(refused.value)
    message = str(refused.value).partition("works is ")[2]
    assert re.findall("'(.*?)'", message) == works
    for spelling in works:
        make(spelling)


def test_standard_alone_is_the_attention_of_the_model():
    assert parse_t5_attention("standard") == parse_attention(STANDARD)
    assert get_hierarchy(make("standard").inner_model) == get_hierarchy(make(STANDARD).inner_model)


def test_a_model_refused_is_as_it_was():
    pipeline = make()
    with pytest.raises(ValueError, match="head width"):
        set_attention(pipeline, MLR.replace("4|2|2", "4|8"))
    assert str(get_hierarchy(pipeline.inner_model)["encoder"][0]) == "4|2|2@24"
    with pytest.raises(ValueError, match="model must be a Chronos-T5"):
        set_attention(torch.nn.Module(), MLR)


def test_a_wrong_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="which has no config"):
        load_chronos(tmp_path / "nothing")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="with model_type 'gpt2' and no chronos_config"):
        load_chronos(tmp_path)


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"inputs must be \(B, C \+ P \+ 2\) = \(B, 25 \+ 7\)"):
        ChronosLearner(make())(rows()[:, 1:])


@pytest.mark.parametrize(
    ("past", "horizon", "message"),
    [
        (series(length=CONTEXT + 1), 4, "past must be at most the 24 values that the model was made for, got 25"),
        (series(), HORIZON + 1, "horizon must be at most the 6 values"),
        (series()[0], 4, "past must be a matrix"),
        (torch.full((1, 8), torch.nan), 4, "past must be finite, got nan in series 0 at step 0"),
    ],
)
def test_bad_forecasts_are_refused(past, horizon, message):
    with pytest.raises(ValueError, match=message):
        forecast(make(), past, horizon)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"samples": np.ones((2, 3))}, r"samples, past and future must be \(N, S, P\)"),
        ({"samples": np.ones((2, 3, 5))}, "samples, past and future must be"),
        ({"samples": np.full((2, 3, 4), np.inf)}, "samples must be finite"),
        ({"past": np.ones((2, 9))}, "past of series 0 repeats itself after 1 steps"),
        ({"future": np.zeros((2, 4))}, "future must not be zero everywhere"),
        ({"season": 9}, "season must be below the 9 values"),
    ],
)
def test_bad_metrics_are_refused(changed, message):
    arguments = {"samples": np.ones((2, 3, 4)), "past": np.arange(18.0).reshape(2, 9), "future": np.ones((2, 4))}
    with pytest.raises(ValueError, match=message):
        sample_metrics(**{"season": 1} | arguments | changed)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_sizes_of_the_page_are_the_published_ones():
    page = (Path(__file__).parents[2] / "docs" / "chronos.md").read_text(encoding="utf-8")
    for name, parameters in PUBLISHED.items():
        assert re.search(rf"`{name}` \|.* \| {parameters:,} \|", page)


@pytest.mark.parametrize(
    ("old", "new"), [("forecast_metrics", "sample_metrics"), ("seasonal_naive", "seasonal_naive_samples")]
)
def test_old_names_warn(old, new):
    with pytest.warns(DeprecationWarning, match=rf"chronos\.{old} is now .*\.{new}"):
        assert getattr(integration, old) is getattr(integration, new)
    assert old not in integration.__all__
