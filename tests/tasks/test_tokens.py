"""Language in tokens: split, windows, unit, and tokens outside the vocabulary."""

import numpy as np
import pytest
import torch

from structattn.tasks import LanguageConfig
from structattn.tasks.tokens import TokenTask

CONFIG = {"context_length": 4, "evaluation_tokens": 16}


def numbers(text):
    """Return the numbers that the words are."""
    return [int(word) for word in text.split()]


@pytest.fixture
def folder(tmp_path):
    """A text of two documents: 0 … 99, and 100 … 299."""
    (tmp_path / "a.txt").write_text(" ".join(map(str, range(100))) + "\n\n\n")
    (tmp_path / "b.txt").write_text(" ".join(map(str, range(100, 300))))
    return str(tmp_path)


def test_the_end_of_each_document_is_held_out(folder):
    task = TokenTask(LanguageConfig(folder, **CONFIG), numbers, 300)
    assert task.corpus.train.tolist() == [*range(95), *range(100, 290)]
    assert task.corpus.validation.tolist() == [*range(95, 100), *range(290, 300)]
    batch = task.batch(0, 8)
    known = {tuple(row) for row in np.lib.stride_tricks.sliding_window_view(task.corpus.train, 5).tolist()}
    assert all(tuple(row) in known for row in torch.cat([batch["inputs"], batch["targets"][:, -1:]], 1).tolist())


def test_documents_reach_the_tokenizer_whole(folder):
    seen = []
    TokenTask(LanguageConfig(folder, **CONFIG), lambda text: seen.append(text) or numbers(text), 300)
    assert [text[:4] for text in seen] == ["0 1 ", "100 "]
    assert all(text.endswith("9\n\n") for text in seen)


def test_loss_is_in_nats_per_token(folder):
    task = TokenTask(LanguageConfig(folder, **CONFIG), numbers, 300)
    (batch,) = task.evaluation_batches(8)
    totals = task.totals(torch.zeros(*batch["inputs"].shape, 300), batch)
    assert totals["tokens"] == batch["targets"].numel() == 12
    assert task.metrics(totals) == {"nats_per_token": pytest.approx(np.log(300), rel=1e-6)}
    assert list(task.units) == ["nats_per_token"]
    with pytest.raises(ValueError, match=r"outputs must be logits of shape \(3, 4, 300\)"):
        task.loss(torch.zeros(3, 4, 96), batch)


def test_bad_input(folder):
    with pytest.raises(ValueError, match="the tokenizer gives token 299, and the model's vocabulary has 299"):
        TokenTask(LanguageConfig(folder, **CONFIG), numbers, 299)
    with pytest.raises(ValueError, match=r"validation part of .* has 15 tokens; context_length 15 needs at least 16"):
        TokenTask(LanguageConfig(folder, 15), numbers, 300)
    with pytest.raises(ValueError, match=r"training part of .* has 0 tokens"):
        TokenTask(LanguageConfig(folder, **CONFIG), lambda text: [], 300)
