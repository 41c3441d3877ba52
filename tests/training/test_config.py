import pytest

from structattn.training import PRESETS, TrainConfig, preset


@pytest.mark.parametrize("budget", [{"steps": 3}, {"tokens": 1000}, {"flops": 1e12}, {"minutes": 0.5}])
def test_one_budget(budget):
    assert TrainConfig(**budget).budget == next(iter(budget))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({}, ValueError, "exactly one of steps, tokens, flops, minutes must be set, got none"),
        ({"steps": 3, "tokens": 4}, ValueError, "exactly one .* got steps and tokens"),
        ({"steps": 0}, ValueError, "steps must be a positive integer, got 0"),
        ({"tokens": 1.5}, TypeError, "tokens must be a positive integer, got 1.5"),
        ({"flops": -1.0}, ValueError, "flops must be above 0, got -1.0"),
        ({"minutes": float("nan")}, ValueError, "minutes must be finite, got nan"),
        (
            {"steps": 1, "batch_size": 6, "micro_batches": 4},
            ValueError,
            "batch_size must be a multiple of micro_batches 4",
        ),
        ({"steps": 1, "learning_rate": 0.0}, ValueError, "learning_rate must be above 0"),
        ({"steps": 1, "warmup": 1.0}, ValueError, "warmup must be at least 0 and below 1"),
        ({"steps": 1, "betas": (0.9,)}, ValueError, "betas must be two numbers"),
        ({"steps": 1, "betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be at least 0 and below 1, got 1.0"),
        ({"steps": 1, "weight_decay": -0.1}, ValueError, "weight_decay must be at least 0, got -0.1"),
        ({"steps": 1, "final_rate": 2.0}, ValueError, "final_rate must be between 0 and 1, got 2.0"),
        ({"steps": 1, "schedule": "cosin"}, ValueError, "schedule must be one of constant, cosine.* mean 'cosine'"),
        ({"steps": 1, "precision": "float16"}, ValueError, "precision must be one of auto, float32, bfloat16"),
        ({"steps": 1, "trackers": ("wandd",)}, ValueError, "trackers must be one of .* mean 'wandb'"),
    ],
)
def test_bad_fields(fields, error, message):
    with pytest.raises(error, match=message):
        TrainConfig(**fields)


def test_presets():
    assert PRESETS["paper-512"].sizes() == {"layers": 6, "dim": 512, "heads": 8, "context_length": 1024}
    assert all(row.dim // row.heads == 64 for name, row in PRESETS.items() if name.startswith("paper"))
    with pytest.raises(ValueError, match=r"preset must be one of .* did you mean 'paper-512'"):
        preset("paper-511")
