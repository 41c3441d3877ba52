from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from structattn.tasks import LanguageConfig, LanguageTask, build_task
from structattn.tasks.characters import decode
from structattn.tasks.corpus import Corpus
from tests.tasks.battery import TaskBattery, joined

NOVELS = Path(__file__).parents[3] / "shared" / "data" / "gutenberg"


def counting(tokens: int) -> np.ndarray:
    """Return tokens in which no short window occurs twice, so that windows reveal their starts."""
    return np.random.default_rng(0).integers(96, size=tokens, dtype=np.uint8)


def make(train=1000, validation=200, length=8, evaluation=64, seed=0) -> LanguageTask:
    corpus = Corpus("numbers", "0", counting(train), counting(train + validation)[train:])
    return LanguageTask(LanguageConfig(context_length=length, evaluation_tokens=evaluation), seed=seed, corpus=corpus)


def places(tokens: np.ndarray, batch) -> list[int]:
    """Return the start in `tokens` of each row's window."""
    rows = torch.cat([batch["inputs"], batch["targets"][:, -1:]], dim=1).numpy()
    windows = np.lib.stride_tricks.sliding_window_view(tokens, rows.shape[1])
    found = [np.flatnonzero((windows == row).all(axis=1)) for row in rows]
    assert all(len(place) == 1 for place in found)
    return [int(place[0]) for place in found]


class TestLanguageTask(TaskBattery):
    def make(self, seed=0):
        return make(seed=seed)

    def outputs(self, batch):
        return F.one_hot(batch["inputs"], 96).float() * 3 + torch.arange(96) / 50


def test_targets_are_the_next_characters():
    task = make()
    for batch in (task.batch(7, 5), next(task.evaluation_batches(8))):
        assert batch["inputs"].dtype == batch["targets"].dtype == torch.int64
        assert torch.equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
    assert len(places(task.corpus.train, task.batch(7, 5))) == 5


@pytest.mark.parametrize("train", [9, 15, 16, 17, 24, 25, 1000, 1001, 1007])
def test_an_epoch_reads_every_window_once(train):
    task = make(train=train)
    size = task.windows_per_epoch
    epochs = [places(task.corpus.train, task.batch(step, size)) for step in range(6)]
    for starts in epochs:
        assert np.array_equal(np.diff(sorted(starts)), np.full(size - 1, 8))
        assert 0 <= min(starts) <= 8
        assert max(starts) + 9 <= train
        assert train - size * 8 < 8 * 2 + 1
    if train >= 1000:
        assert len({tuple(starts) for starts in epochs}) == 6
        assert len({min(starts) for starts in epochs}) > 1


def test_order_is_one_sequence_whatever_the_batch_size():
    task = make(train=100)  # 11 windows an epoch, so that batches straddle epochs, several at once too.
    whole = task.batch(0, 60)
    for batch_size in (1, 4, 30):
        parts = [task.batch(step, batch_size) for step in range(60 // batch_size)]
        assert torch.equal(joined(parts)["inputs"], whole["inputs"])


def test_steps_far_into_a_run_cost_no_more():
    assert len(make().batch(10**12, 4)["inputs"]) == 4


@pytest.mark.parametrize(
    ("validation", "evaluation", "windows"), [(200, 64, 8), (200, 10**6, 24), (9, 64, 1), (17, 16, 2)]
)
def test_evaluation_windows_are_apart_and_span_the_validation_part(validation, evaluation, windows):
    task = make(validation=validation, evaluation=evaluation)
    assert task.evaluation_size == windows
    starts = places(task.corpus.validation, joined(list(task.evaluation_batches(5))))
    assert starts[0] == 0
    gaps = np.diff(starts)
    if windows > 1:
        assert starts[-1] + 9 == validation
        assert gaps.min() >= 8
        assert gaps.max() - gaps.min() <= 1


def test_uniform_predictions_cost_log_96():
    task = make()
    batch = next(task.evaluation_batches(100))
    totals = task.totals(torch.zeros(*batch["inputs"].shape, 96), batch)
    metrics = task.metrics(totals)
    assert totals["characters"].item() == 64
    assert metrics["nats_per_character"] == pytest.approx(math.log(96))
    assert metrics["bits_per_character"] == pytest.approx(math.log2(96))


def test_loss_by_hand():
    task = make()
    batch = {"inputs": torch.zeros(1, 2, dtype=torch.int64), "targets": torch.tensor([[3, 5]])}
    outputs = torch.zeros(1, 2, 96)
    outputs[0, 0, 3] = math.log(5)  # Probabilities 5/100 for the right character, and 1/96.
    assert task.loss(outputs, batch).item() == pytest.approx((math.log(20) + math.log(96)) / 2)


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (8, 200, "data: the training part of numbers has 8 characters; context_length 8 needs at least 9"),
        (1000, 8, "data: the validation part of numbers has 8 characters; context_length 8 needs at least 9"),
        (1000, 0, "data: the validation part of numbers has 0 characters; context_length 8 needs at least 9"),
    ],
)
def test_too_short_a_corpus(train, validation, message):
    with pytest.raises(ValueError) as caught:
        make(train=train, validation=validation)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"context_length": 0}, ValueError, "context_length must be a positive integer, got 0"),
        ({"context_length": -5}, ValueError, "context_length must be a positive integer, got -5"),
        ({"context_length": 8.0}, TypeError, "context_length must be a positive integer, got 8.0"),
        ({"evaluation_tokens": 0}, ValueError, "evaluation_tokens must be a positive integer, got 0"),
        ({"evaluation_tokens": 255}, ValueError, "evaluation_tokens must be at least context_length 256, got 255"),
        ({"data": ""}, ValueError, "data must not be empty"),
        ({"data": 3}, TypeError, "data must be a string, got 3"),
    ],
)
def test_bad_configs_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        LanguageConfig(**fields)


def test_build_task_reads_the_text(tmp_path, monkeypatch):
    monkeypatch.setenv("STRUCTATTN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("To be, or not to be. " * 100)
    task = build_task(LanguageConfig(str(tmp_path / "a.txt"), context_length=21), seed=2, total_steps=10)
    assert isinstance(task, LanguageTask)
    assert (task.seed, task.name, task.context_length) == (2, "language", 21)
    assert sorted(decode(task.batch(0, 4)["inputs"][0])) == sorted("To be, or not to be. ")


@pytest.mark.skipif(not NOVELS.is_dir(), reason=f"needs the novels in {NOVELS}")
def test_novels(tmp_path):
    task = LanguageTask(LanguageConfig(str(NOVELS), context_length=512), cache=tmp_path)
    books = [path.read_text(encoding="utf-8") for path in sorted(NOVELS.glob("*.txt"))]
    train, validation = decode(task.corpus.train), decode(task.corpus.validation)
    assert train.startswith("Anna Karenina\n\n")
    assert 'which I have the power to put into\nit."\n\n' in validation
    # All but the newlines trimmed at the ends, plus a blank line between successive books; two pounds are dropped.
    joints = 2 * (len(books) - 1)
    assert len(train) + len(validation) == sum(len(book.strip("\n")) for book in books) + 2 * joints - 2
    assert len(validation) - joints == sum((len(book.strip("\n").replace("£", "")) // 20) for book in books)
    assert task.evaluation_size == 256
    text = decode(next(task.evaluation_batches(4))["inputs"][2])
    assert sum(character in " etaoin" for character in text) > len(text) / 3
