"""The training loop on Chronos with MLR attention and synthetic series."""

import pytest
import torch

for module in ("chronos", "sklearn"):
    pytest.importorskip(module, reason=f"{module} is not installed")

from paper.chronos.task import ChronosDataConfig, ChronosTask  # noqa: E402
from structattn.integrations.chronos import ChronosLearner, ChronosSize, make_chronos  # noqa: E402
from structattn.training import TrainConfig, train  # noqa: E402

SIZE = ChronosSize(d_model=16, num_layers=2, num_heads=2, d_ff=32, d_kv=8)
CONTEXT, HORIZON = 24, 6


def run(folder, attention="mlr:4|2|2+gains=none+level_weight=1+qk_norm=false", steps=40, **fields):
    lengths = {"context_length": CONTEXT, "prediction_length": HORIZON, "n_tokens": 40}
    pipeline = make_chronos(SIZE, attention, **lengths, initializer_factor=1.0, dropout=0.1)
    data = ChronosDataConfig(compositions=8, length=48, min_past=8, evaluation_series=8)
    task = ChronosTask(pipeline.model.config, data)
    config = TrainConfig(
        steps=steps, batch_size=8, learning_rate=1e-2, mup=False, precision="float32", evaluation_interval=10, **fields
    )
    result = train(ChronosLearner(pipeline), lambda total: task, config, folder, structure=attention)
    return result, pipeline


def test_the_loop_trains_it_and_goes_on_where_it_stopped(tmp_path):
    result, pipeline = run(tmp_path / "whole")
    losses = [row["nats_per_token"] for row in result.metrics]
    assert losses[-1] < losses[0] - 0.2
    assert result.tokens == 40 * 8 * (CONTEXT + HORIZON + 2)
    assert result.flops == 40 * 8 * ChronosLearner(pipeline).flops(CONTEXT + HORIZON + 2).training
    checkpoint = sorted((tmp_path / "whole" / "checkpoints").glob("step-*.ckpt"))[-2]
    assert checkpoint.stem.endswith("30")
    again = tmp_path / "again"
    (again / "checkpoints").mkdir(parents=True)
    (again / "checkpoints" / checkpoint.name).write_bytes(checkpoint.read_bytes())
    lines = (tmp_path / "whole" / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (again / "metrics.jsonl").write_bytes(b"".join(lines[:3]))
    resumed, continued = run(again)
    assert [row["nats_per_token"] for row in resumed.metrics] == losses
    for one, other in zip(pipeline.inner_model.parameters(), continued.inner_model.parameters(), strict=True):
        assert torch.equal(one, other)
