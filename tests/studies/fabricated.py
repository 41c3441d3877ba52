"""Results that no training made: for tests of what is written about results."""

import math

from structattn.studies.results import Cost, Results, Run

SIZES = {"layers": 4, "dim": 128, "heads": 4, "context_length": 256}
COSTS = {
    "standard": Cost(829_696, 5_210_112.0, 131_584.0, 512.0),
    "mlr": Cost(829_696, 4_988_416.0, 78_592.0, 271.5),
    "swa:64": Cost(829_696, 5_020_000.0, 57_344.0, 128.0),
    "btt": Cost(902_112, 5_620_000.0, 212_000.0, 900.0),
}
LIMITS = {"standard": 1.52, "mlr": 1.49, "swa:64": 1.505, "btt": 1.6}


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
    folder = f"runs/{name.replace(':', '-')}-seed{seed}"
    if failed:
        return Run(name, seed, folder, tuple(rows[:5]), f"the training loss of {name} is nan at step 262")
    return Run(name, seed, folder, tuple(rows))


def _language_row(name, seed, step):
    nats = LIMITS[name] + 2.4 / math.sqrt(step / 5) + 0.004 * math.sin(17 * seed + 3 * len(name)) + 0.002 * seed
    tokens = step * 16 * 256
    return {
        "step": step,
        "tokens": tokens,
        "flops": int(tokens * COSTS[name].training_flops_per_token),
        "seconds": tokens / 41_000,
        "tokens_per_second": 41_000.0 + 900 * len(name),
        "train_loss": nats + 0.02,
        "nats_per_character": nats,
        "bits_per_character": nats / math.log(2),
    }


def regression_results(input_dim=8, seeds=1):
    structures = {"standard": 0.55, "standard:1": 0.02, "btt": 0.004}
    points = 2 * input_dim
    least = [max(0.0, 1 - i / input_dim) for i in range(points)]
    runs = []
    for name, floor in structures.items():
        for seed in range(seeds):
            rows = [_regression_row(floor, step, least) for step in range(1000, 20_001, 1000)]
            runs.append(Run(name, seed, f"runs/{name.replace(':', '-')}-seed{seed}", tuple(rows)))
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
            "least squares": least,
            "ridge": [value + 0.03 for value in least],
            "zero": [1.0] * points,
        },
    )


def _regression_row(floor, step, least):
    errors = [max(value, floor + 0.9 * math.exp(-step / 3000)) for value in least]
    return {
        "step": step,
        "tokens": step * 64 * 32,
        "flops": step * 64 * 32 * 5_000_000,
        "seconds": step / 30,
        "tokens_per_second": 61_440.0,
        "train_loss": 0.5,
        "last_error": errors[-1],
        "mean_error": sum(errors) / len(errors),
        "error_by_position": errors,
    }
