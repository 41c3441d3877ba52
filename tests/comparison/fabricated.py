"""Made-up results, for tests of reporting without training."""

import math

from structattn.comparison.results import Cost, Results, Run

SIZES = {"layers": 4, "dim": 128, "heads": 4, "context_length": 256}
COSTS = {
    "standard": Cost(829_696, 5_210_112.0, 131_584.0, 512.0, 512.0),
    "mlr": Cost(829_696, 4_988_416.0, 78_592.0, 271.5, 136.5),
    "swa:64": Cost(829_696, 5_020_000.0, 57_344.0, 128.0, 128.0),
    "btt": Cost(902_112, 5_620_000.0, 212_000.0, 900.0, 512.0),
}
LIMITS = {"standard": 1.52, "mlr": 1.49, "swa:64": 1.505, "btt": 1.6}


def _run(name, seed, rows, error=None):
    return Run(name, seed, f"runs/{name.replace(':', '-')}-seed{seed}", tuple(rows), error)


def _row(step, tokens_per_step, flops_per_token, tokens_per_second, train_loss, metrics):
    """Return one evaluation, at a steady speed."""
    tokens = step * tokens_per_step
    return {
        "step": step,
        "tokens": tokens,
        "flops": int(tokens * flops_per_token),
        "seconds": tokens / tokens_per_second,
        "tokens_per_second": tokens_per_second,
        "train_loss": train_loss,
        **metrics,
    }


def language_results(structures=("standard", "mlr", "swa:64"), seeds=2, failed=(), steps=1000):
    runs = [_language_run(name, seed, steps, name in failed) for name in structures for seed in range(seeds)]
    return Results(
        task="language",
        metric="nats_per_character",
        unit="nats per character",
        budget="2.1e+13 training FLOPs",
        equal="flops",
        data="stdlib: 11,234,567 characters to train on, 591,293 to validate on",
        sizes=SIZES,
        costs={name: COSTS[name] for name in structures},
        runs=tuple(runs),
    )


def _language_run(name, seed, steps, failed):
    rows = [_language_row(name, seed, step) for step in range(steps // 20, steps + 1, steps // 20)]
    if failed:
        return _run(name, seed, rows[:5], f"the training loss of {name} is nan at step 262")
    return _run(name, seed, rows)


def _language_row(name, seed, step):
    nats = LIMITS[name] + 2.4 / math.sqrt(step / 5) + 0.004 * math.sin(17 * seed + 3 * len(name)) + 0.002 * seed
    metrics = {"nats_per_character": nats, "bits_per_character": nats / math.log(2)}
    flops = COSTS[name].training_flops_per_token
    return _row(step, 16 * 256, flops, 41_000.0 + 900 * len(name), nats + 0.02, metrics)


def regression_results(input_dim=8, seeds=1):
    structures = {"standard": 0.55, "standard:1": 0.02, "btt": 0.004}
    points = 2 * input_dim
    least = [max(0.0, 1 - i / input_dim) for i in range(points)]
    runs = []
    for name, floor in structures.items():
        for seed in range(seeds):
            rows = [_regression_row(floor, step, least) for step in range(1000, 20_001, 1000)]
            runs.append(_run(name, seed, rows))
    return Results(
        task="regression",
        metric="last_error",
        unit="squared error / d at the last position",
        budget="20,000 steps",
        equal="steps",
        data=f"x, w ~ N(0, I) in {input_dim} dimensions, {points} points in a prompt",
        sizes={"layers": 4, "dim": 32, "heads": 8, "context_length": 2 * points},
        costs=dict.fromkeys(structures, COSTS["standard"]),
        runs=tuple(runs),
        baselines={
            "least squares": _regression_metrics(least),
            "ridge": _regression_metrics([value + 0.03 for value in least]),
            "zero": _regression_metrics([1.0] * points),
        },
    )


def _regression_row(floor, step, least):
    errors = [max(value, floor + 0.9 * math.exp(-step / 3000)) for value in least]
    return _row(step, 64 * 32, 5_000_000, 61_440.0, 0.5, _regression_metrics(errors))


def _regression_metrics(errors):
    return {"last_error": errors[-1], "mean_error": sum(errors) / len(errors), "error_by_position": errors}


def forecast_results(seeds=3, linear=0.38):
    """Return results in which standard attention ends at a test error of 0.44, the others lower."""
    structures = {"standard": 0.44, "mlr+levels=2": 0.43, "mlr+levels=4": 0.425}
    begins = ["2018-02-20 00:00", "2018-04-01 12:00", "2018-05-20 06:00"]
    truth = [[10 + place + math.sin(step / 4) for step in range(-24, 24)] for place in range(3)]
    runs = []
    for name, floor in structures.items():
        for seed in range(seeds):
            rows = [_forecast_row(floor + 0.002 * seed, step) for step in range(50, 501, 50)]
            shown = [[value + 0.3 for value in stretch[24:]] for stretch in truth]
            rows[-1] |= _tested(_forecast_metrics(floor + 0.002 * seed), shown)
            runs.append(_run(name, seed, rows))
    return Results(
        task="forecast",
        metric="test_mse",
        curve="mse",
        unit="MSE of standardised values",
        budget="500 steps",
        equal="steps",
        data="ETTh1: 7 channels",
        sizes={"layers": 2, "dim": 64, "heads": 4, "context_length": 96},
        costs=dict.fromkeys(structures, COSTS["standard"]),
        runs=tuple(runs),
        baselines={
            name: _forecast_metrics(error) | _tested(_forecast_metrics(error), [[10.0] * 24] * 3)
            for name, error in {"linear": linear, "seasonal (24)": 0.51, "last value": 1.29}.items()
        },
        examples=tuple(
            {"begins": begin, "history": values[:24], "truth": values[24:]}
            for begin, values in zip(begins, truth, strict=True)
        ),
    )


def _forecast_metrics(mse):
    return {"mse": mse, "mae": mse**0.5, "target_mae": 0.4 * mse, "target_mae_unit": 3.6 * mse}


def _tested(metrics, shown):
    return {f"test_{name}": value for name, value in metrics.items()} | {"test_forecasts": shown}


def _forecast_row(floor, step):
    return _row(step, 32 * 96, 1_000_000, 24_576.0, floor, _forecast_metrics(floor + 0.5 * math.exp(-step / 80)))
