"""Synthetic series, and the task that Chronos makes of them."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("sklearn", reason="synthetic series need scikit-learn")

from paper.chronos.kernelsynth import PERIODS, Part, _bank, synthetic_series
from paper.chronos.task import ChronosDataConfig, ChronosTask
from tests.tasks.battery import TaskBattery

DATA = ChronosDataConfig(compositions=6, paths=3, length=48, min_past=8, evaluation_series=7)


def make_config(**fields):
    chronos = pytest.importorskip("chronos", reason="the task needs Chronos's tokenizer")
    return chronos.ChronosConfig(
        **{
            "tokenizer_class": "MeanScaleUniformBins",
            "tokenizer_kwargs": {"low_limit": -15.0, "high_limit": 15.0},
            "context_length": 24,
            "prediction_length": 6,
            "n_tokens": 64,
            "n_special_tokens": 2,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "use_eos_token": True,
            "model_type": "seq2seq",
            "num_samples": 4,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        }
        | fields
    )


# --- series -----------------------------------------------------------------------------------------------------------


def test_series_are_a_function_of_seed_index_and_part():
    first = synthetic_series(3, 5, 64, paths=2)
    assert first.shape == (2, 64)
    assert first.dtype == np.float64
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(synthetic_series(3, 5, 64, paths=2), first)
    for other in (
        synthetic_series(4, 5, 64, paths=2),
        synthetic_series(3, 6, 64, paths=2),
        synthetic_series(3, 5, 64, paths=2, part=Part.HELD_OUT),
    ):
        assert not np.allclose(other, first)
    assert not np.allclose(first[0], first[1])


@pytest.mark.parametrize("index", range(60))
def test_every_composition_can_be_drawn(index):
    """Covariances are singular to rounding, or zero somewhere: factors must exist all the same."""
    assert np.isfinite(synthetic_series(0, index, 96)).all()


def test_periods_are_counted_in_steps():
    """A path of a periodic kernel alone repeats itself after its period, however long it is."""
    kernel = _bank()[PERIODS.index(24)]
    covariance = kernel(np.arange(60)[:, None] / 1024)
    np.testing.assert_allclose(covariance[0, [24, 48]], 1.0)
    assert covariance[0, 12] < 0.2


def test_paths_have_the_covariance_of_their_composition(monkeypatch):
    """Of many paths of one kernel, the second moments are the kernel's."""
    kernels = pytest.importorskip("sklearn.gaussian_process.kernels")
    bank = (kernels.RBF(length_scale=0.005) + kernels.WhiteKernel(0.5),)
    monkeypatch.setattr("paper.chronos.kernelsynth._bank", lambda: bank)
    monkeypatch.setattr("paper.chronos.kernelsynth.MOST_KERNELS", 1)
    paths = synthetic_series(0, 0, 8, paths=40_000)
    expected = bank[0](np.arange(8)[:, None] / 1024)
    np.testing.assert_allclose(np.cov(paths.T), expected, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed must be"),
        ({"index": -1}, ValueError, "index must be at least 0, got -1"),
        ({"index": 0.5}, TypeError, "index must be an integer"),
        ({"length": 0}, ValueError, "length must be a positive integer, got 0"),
        ({"paths": 0}, ValueError, "paths must be a positive integer, got 0"),
    ],
)
def test_bad_series_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        synthetic_series(**{"seed": 0, "index": 0, "length": 8} | arguments)


# --- the task ---------------------------------------------------------------------------------------------------------


class TestChronosTask(TaskBattery):
    def make(self, seed=0):
        return ChronosTask(make_config(), DATA, seed=seed)

    def outputs(self, batch):
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        return weight[batch["inputs"][:, -7:]]


def test_rows_are_what_the_tokenizer_makes_of_context_and_future():
    config = make_config()
    task = ChronosTask(config, DATA)
    (batch,) = task.evaluation_batches(10)
    values = torch.from_numpy(task.held_out()).float()
    scale = values[:, :24].abs().mean(dim=1, keepdim=True)
    centers = torch.linspace(-15, 15, 61)
    ids = (values / scale).clamp(-15, 15)
    nearest = (ids[..., None] - centers).abs().argmin(dim=-1) + 3
    read, written = batch["inputs"][:, :24], batch["inputs"][:, 25:31]
    assert torch.equal(read, nearest[:, :24])
    assert torch.equal(written, nearest[:, 24:])
    assert batch["inputs"][:, 24].tolist() == batch["inputs"][:, 31].tolist() == [1] * 7
    assert torch.equal(batch["targets"], batch["inputs"][:, 25:])


def test_training_windows_are_padded_on_the_left_alone_and_lie_in_the_series():
    task = ChronosTask(make_config(), DATA)
    ids = torch.cat([task.batch(step, 18)["inputs"] for step in range(8)])
    missing = (ids == 0).sum(dim=1)
    assert missing.max() == 24 - DATA.min_past
    assert missing.min() == 0
    assert all((row[:count] == 0).all() and (row[count:] != 0).all() for row, count in zip(ids, missing, strict=True))


def test_an_epoch_reads_every_series_once():
    task = ChronosTask(make_config(context_length=44, prediction_length=4), DATA)
    # With one possible window per series, rows are told apart by their series.
    task = ChronosTask(task.config, ChronosDataConfig(6, 3, length=48, min_past=44, evaluation_series=1))
    epochs = [task.batch(epoch, 18)["inputs"].tolist() for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert len(set(map(tuple, epochs[0]))) > 12  # Series that do not change are alike in tokens.


def test_loss_leaves_out_what_is_missing():
    task = ChronosTask(make_config(), DATA)
    targets = torch.tensor([[5, 0, 1], [7, 8, 1]])
    outputs = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
    batch = {"inputs": targets, "targets": targets}
    real = targets != 0
    expected = F.cross_entropy(outputs[real], targets[real])
    torch.testing.assert_close(task.loss(outputs, batch), expected)
    totals = task.totals(outputs, batch)
    assert totals["tokens"] == 5
    assert task.metrics(totals)["nats_per_token"] == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("config", "data", "message"),
    [
        ({}, {"length": 13}, "length must be at least min_past"),
        ({"context_length": 7}, {}, "min_past must be at most the context of 7, got 8"),
        ({"model_type": "causal"}, {}, "config must be of an encoder and decoder"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(config, data, message):
    fields = {"compositions": 6, "length": 48, "min_past": 8, "evaluation_series": 7} | data
    with pytest.raises(ValueError, match=message):
        ChronosTask(make_config(**config), ChronosDataConfig(**fields))


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="compositions must be a positive integer, got 0"):
        ChronosDataConfig(compositions=0)
