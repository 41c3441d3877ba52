"""Tests for every task; the tests of a task inherit them and supply its construction."""

from __future__ import annotations

import abc
from itertools import chain, pairwise

import pytest
import torch
from torch import Tensor

from structattn.tasks import Batch, Task


def assert_same(first: Batch, second: Batch) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def joined(batches: list[Batch]) -> Batch:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


class TaskBattery(abc.ABC):
    steps = (0, 1, 5, 6, 40, 99)

    @abc.abstractmethod
    def make(self, seed: int = 0) -> Task:
        """Return a small task for a run of 100 steps."""

    @abc.abstractmethod
    def outputs(self, batch: Batch) -> Tensor:
        """Return plausible model outputs for `batch`: float32, different for different rows."""

    @pytest.fixture
    def task(self) -> Task:
        return self.make()

    def test_batch_has_inputs_and_targets_on_the_cpu(self, task):
        for step in self.steps:
            batch = task.batch(step, 4)
            assert set(batch) == {"inputs", "targets"}
            assert all(len(tensor) == 4 and tensor.is_contiguous() for tensor in batch.values())
            assert batch["inputs"].shape[1] == task.sequence_length(step) <= task.context_length

    def test_batch_is_a_function_of_seed_and_step(self, task):
        expected = {step: task.batch(step, 4) for step in self.steps}
        fresh = self.make()
        for step in reversed(self.steps):
            assert_same(fresh.batch(step, 4), expected[step])

    def test_steps_and_seeds_differ(self, task):
        for one, other in pairwise(self.steps[-2:]):
            assert not torch.equal(task.batch(one, 4)["inputs"], task.batch(other, 4)["inputs"])
        assert not torch.equal(task.batch(99, 4)["inputs"], self.make(seed=1).batch(99, 4)["inputs"])

    def test_rows_of_one_batch_differ(self, task):
        rows = task.batch(99, 4)["inputs"].flatten(1)
        assert len(torch.unique(rows, dim=0)) == 4

    @pytest.mark.parametrize("world_size", [2, 3, 6])
    def test_processes_take_disjoint_parts_of_one_batch(self, task, world_size):
        for step in self.steps:
            parts = [task.batch(step, 6, rank=rank, world_size=world_size) for rank in range(world_size)]
            assert_same(joined(parts), task.batch(step, 6))

    def test_evaluation_set_is_fixed(self, task):
        whole = joined(list(task.evaluation_batches(1000)))
        assert len(whole["inputs"]) == task.evaluation_size
        for batch_size in (1, 3):
            assert_same(joined(list(task.evaluation_batches(batch_size))), whole)
        assert_same(joined(list(self.make(seed=7).evaluation_batches(5))), whole)

    @pytest.mark.parametrize("world_size", [2, 3, 4])
    def test_processes_share_the_evaluation_set(self, task, world_size):
        parts = [list(task.evaluation_batches(2, rank=r, world_size=world_size)) for r in range(world_size)]
        sizes = [sum(len(batch["inputs"]) for batch in part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert_same(joined(list(chain.from_iterable(parts))), joined(list(task.evaluation_batches(1000))))

    def test_evaluation_set_is_not_trained_on(self, task):
        held_out = joined(list(task.evaluation_batches(1000)))["inputs"].flatten(1)
        trained = torch.cat([task.batch(step, 6)["inputs"].flatten(1) for step in range(90, 100)])
        assert not (held_out[:, None] == trained[None]).all(dim=-1).any()

    def test_loss_is_a_float32_scalar_with_a_gradient(self, task):
        batch = task.batch(99, 4)
        for dtype in (torch.float32, torch.bfloat16):
            outputs = self.outputs(batch).to(dtype).requires_grad_()
            loss = task.loss(outputs, batch)
            assert loss.shape == ()
            assert loss.dtype == torch.float32
            loss.backward()
            assert outputs.grad is not None
            assert outputs.grad.isfinite().all()
            assert outputs.grad.abs().sum() > 0

    def test_totals_add_up(self, task):
        def totals(batch_size: int) -> dict[str, Tensor]:
            each = [task.totals(self.outputs(b), b) for b in task.evaluation_batches(batch_size)]
            return {name: sum(part[name] for part in each) for name in each[0]}

        whole, parts = totals(1000), totals(3)
        for name in whole:
            assert whole[name].dtype == torch.float64
            assert not whole[name].requires_grad
            torch.testing.assert_close(parts[name], whole[name])

    def test_metrics_carry_the_names_of_the_units_and_agree_with_the_loss(self, task):
        batch = next(task.evaluation_batches(1000))
        metrics = task.metrics(task.totals(self.outputs(batch), batch))
        assert list(metrics) == list(task.units)
        assert all(isinstance(value, float) or isinstance(value[0], float) for value in metrics.values())
        loss = task.loss(self.outputs(batch), batch).item()
        assert any(value == pytest.approx(loss, rel=1e-5) for value in metrics.values() if isinstance(value, float))

    def test_wrong_outputs_are_refused(self, task):
        batch = task.batch(99, 4)
        for wrong in (self.outputs(batch)[:2], self.outputs(batch)[:, 1:], self.outputs(batch)[..., None]):
            with pytest.raises(ValueError, match="outputs must"):
                task.loss(wrong, batch)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"step": -1}, "step must be at least 0, got -1"),
            ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
            ({"world_size": 0}, "world_size must be a positive integer, got 0"),
            ({"rank": 2, "world_size": 2}, "rank must be at least 0 and below world_size 2, got 2"),
            ({"rank": -1}, "rank must be at least 0 and below world_size 1, got -1"),
            ({"world_size": 3}, "batch_size must be a multiple of world_size 3, got 4"),
        ],
    )
    def test_bad_batches_are_refused(self, task, arguments, message):
        with pytest.raises(ValueError) as caught:
            task.batch(**{"step": 0, "batch_size": 4, **arguments})
        assert str(caught.value) == message

    def test_bad_evaluation_batches_are_refused_at_once(self, task):
        with pytest.raises(ValueError, match="batch_size"):
            task.evaluation_batches(0)
        with pytest.raises(ValueError, match="rank"):
            task.evaluation_batches(4, rank=1)

    @pytest.mark.parametrize(("seed", "error"), [(-1, ValueError), (2**64, ValueError), (0.5, TypeError)])
    def test_bad_seeds_are_refused(self, seed, error):
        with pytest.raises(error, match="seed must be"):
            self.make(seed=seed)

    def test_largest_seed_works(self):
        assert len(self.make(seed=2**64 - 1).batch(0, 4)["inputs"]) == 4
