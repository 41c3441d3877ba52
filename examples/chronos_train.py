"""Train a small Chronos with MLR attention on synthetic series.

Compare its forecasts with the last value.

Run it in a checkout, because the synthetic series are in `paper`:

python -m examples.chronos_train                         a model of width 64, a few minutes on a CPU
python -m examples.chronos_train --attention standard   the same with T5's own attention
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from paper.chronos.task import ChronosDataConfig, ChronosTask
from structattn.integrations.chronos import (
    ChronosLearner,
    ChronosSize,
    forecast,
    load_chronos,
    make_chronos,
    sample_metrics,
    seasonal_naive_samples,
)
from structattn.training import TrainConfig, train

CONTEXT, HORIZON = 128, 16
ATTENTION = "mlr:16|8|8+paper+gains=none+level_weight=1+qk_norm=false"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attention", default=ATTENTION, help="for a T5 with heads of 32")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--compositions", type=int, default=64, help="of kernels, 8 series of each")
    parser.add_argument("--out", type=Path, help="folder of the run; a temporary one by default")
    options = parser.parse_args()
    folder = options.out or Path(tempfile.mkdtemp(prefix="chronos-"))

    size = ChronosSize(d_model=64, num_layers=2, num_heads=2, d_ff=256, d_kv=32)
    lengths = {"context_length": CONTEXT, "prediction_length": HORIZON, "n_tokens": 512}
    pipeline = make_chronos(size, options.attention, **lengths, dropout=0.0, initializer_factor=1.0)
    data = ChronosDataConfig(options.compositions, length=512, evaluation_series=64)
    task = ChronosTask(pipeline.model.config, data)
    config = TrainConfig(
        steps=options.steps, batch_size=16, learning_rate=3e-3, weight_decay=0.0, mup=False, precision="float32"
    )
    result = train(ChronosLearner(pipeline), lambda steps: task, config, folder, structure=options.attention)
    print(f"validation loss {result.metrics[-1]['nats_per_token']:.3f} nats per token after {result.flops:.3g} FLOPs")

    pipeline.inner_model.eval().save_pretrained(folder / "model")
    pipeline = load_chronos(folder / "model")
    past, future = task.held_out()[:, :CONTEXT], task.held_out()[:, CONTEXT:]
    samples = {"model": forecast(pipeline, past, HORIZON), "last value": seasonal_naive_samples(past, HORIZON, 1)}
    for name, paths in samples.items():
        metrics = sample_metrics(paths, past, future, season=1)
        print(f"{name}: WQL {metrics['wql']:.3f}, median MASE {metrics['mase_median']:.3f}")


if __name__ == "__main__":
    main()
