"""Run folders that earlier versions wrote still load."""

import json

import pytest

pytest.importorskip("transformers")

from structattn.comparison.compare import Comparison, compare
from structattn.comparison.results import Results
from structattn.comparison.run import ModelSizes, RunConfig, claim, execute, load_run
from structattn.layers import DegenerateNormWarning
from structattn.tasks import ForecastConfig, LanguageConfig, RegressionConfig
from structattn.training import RunFolderError, TrainConfig

_TRAIN = {
    "steps": 4,
    "tokens": None,
    "flops": None,
    "minutes": None,
    "batch_size": 4,
    "micro_batches": 1,
    "learning_rate": 0.002,
    "schedule": "cosine",
    "warmup": 0.05,
    "final_rate": 0.0,
    "weight_decay": 0.1,
    "betas": [0.9, 0.95],
    "clip": 1.0,
    "mup": True,
    "base_dim": 256,
    "precision": "auto",
    "compile": False,
    "evaluation_interval": None,
    "seed": 1,
    "cpu": False,
    "trackers": [],
}
_TASKS = {
    "language": (
        {"name": "language", "data": "stdlib", "context_length": 32, "evaluation_tokens": 16384},
        LanguageConfig("stdlib", 32, 16384),
    ),
    "regression": (
        {"name": "regression", "input_dim": 4, "curriculum": 0.06, "evaluation_prompts": 2048},
        RegressionConfig(4),
    ),
    "forecast": (
        {
            "name": "forecast",
            "data": "ETTh1",
            "context_length": 24,
            "horizon": 6,
            "target": "OT",
            "time": "date",
            "columns": ["HUFL", "OT"],
            "fill": None,
            "season": 24,
            "window_norm": "last",
            "evaluation_windows": 96,
        },
        ForecastConfig("ETTh1", 24, 6, columns=("HUFL", "OT")),
    ),
}


@pytest.mark.parametrize("name", _TASKS)
def test_run_json(name):
    """`run.json` as version 0.1.0 writes it."""
    plain, task = _TASKS[name]
    sizes = {"layers": 1, "dim": 16, "heads": 2, "positions": "rotary"}
    whole = {"attention": "mlr:4,4", "task": plain, "sizes": sizes, "train": _TRAIN, "seed": 1}
    config = RunConfig.from_dict(json.loads(json.dumps(whole)))
    assert config.task == task
    assert config.context_length == {"language": 32, "regression": 16, "forecast": 24}[name]
    assert json.loads(json.dumps(config.to_dict())) == whole


def test_results_json(tmp_path):
    """`results.json` and `metrics.jsonl` as version 0.1.0 writes them."""
    row = {"step": 4, "tokens": 512, "flops": 9, "seconds": 0.5, "tokens_per_second": 1024.0, "train_loss": 4.5}
    row |= {"nats_per_character": 4.25, "bits_per_character": 6.13}
    cost = {
        "parameters": 9000,
        "training_flops_per_token": 5e4,
        "score_flops_per_token": 5e2,
        "key_numbers_per_token": 16.0,
    }
    plain = {
        "task": "language",
        "metric": "nats_per_character",
        "unit": "nats per character",
        "budget": "4 steps",
        "equal": "steps",
        "data": "text.txt: 6,000 characters to train on, 300 to validate on",
        "sizes": {"layers": 1, "dim": 16, "heads": 2, "context_length": 32},
        "costs": {"standard": cost},
        "runs": [
            {"structure": "standard", "seed": 0, "folder": "runs/standard-seed0", "error": None, "final": row},
        ],
        "baselines": {},
        "curve": None,
        "stretches": [],
        "summary": {"standard": {"mean": 4.25, "standard_error": None, "count": 1}},
    }
    (tmp_path / "results.json").write_text(json.dumps(plain))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"structure": "standard", "seed": 0, **row}) + "\n")
    results = Results.load(tmp_path)
    assert results.ranking == ["standard"]
    assert results.best_run.final == row
    assert (results.counts_values, results.cached_per_token("standard")) == (False, 16.0)
    results.save(tmp_path)
    plain["costs"]["standard"]["value_numbers_per_token"] = None  # version 0.1.0 did not count them
    assert json.loads((tmp_path / "results.json").read_text()) == plain


def test_a_task_that_is_not_registered_is_named():
    whole = {"attention": "mlr", "task": {"name": "langage"}, "sizes": {}, "train": _TRAIN, "seed": 0}
    with pytest.raises(ValueError, match=r"task must be one of language, .*, got 'langage'; did you mean 'language'\?"):
        RunConfig.from_dict(whole)


class TestClaim:
    CONFIG = RunConfig("mlr", RegressionConfig(4), ModelSizes(1, 16, 2), TrainConfig(steps=4)).to_dict()

    def change(self, part, **fields):
        return self.CONFIG | {part: {**self.CONFIG[part], **fields}}

    def without(self, part, name):
        return self.CONFIG | {part: {key: value for key, value in self.CONFIG[part].items() if key != name}}

    @pytest.mark.parametrize(
        ("part", "name"),
        [("train", "minutes"), ("train", "betas"), ("train", "micro_batches"), ("sizes", "positions"),
         ("task", "curriculum")],
    )  # fmt: skip
    def test_a_field_that_the_file_lacks_has_its_default(self, tmp_path, part, name):
        """Also inside the `run` of a study; and a field that only the file has."""
        old = self.without(part, name)
        for place, (there, ours) in enumerate([(old, self.CONFIG), (self.CONFIG, old)]):
            for inner in (False, part == "train"):
                folder = tmp_path / f"{place}{inner}"
                claim(folder, "run.json", {"run": there} if inner else there)
                claim(folder, "run.json", {"run": ours} if inner else ours)

    def test_a_field_that_the_file_lacks_and_that_is_set_is_another_config(self, tmp_path):
        claim(tmp_path, "run.json", self.without("train", "micro_batches"))
        with pytest.raises(RunFolderError, match=r"another config \(train.micro_batches was 1, is 2\)"):
            claim(tmp_path, "run.json", self.change("train", micro_batches=2))

    def test_an_unset_field_of_no_part_is_none(self, tmp_path):
        claim(tmp_path, "config.json", {"ranks": [4, 4]})
        claim(tmp_path, "config.json", {"ranks": [4, 4], "context_length": None})
        with pytest.raises(RunFolderError, match="context_length was None, is 64"):
            claim(tmp_path, "config.json", {"ranks": [4, 4], "context_length": 64})

    def test_a_config_without_a_kernel_has_pytorch_s(self, tmp_path):
        claim(tmp_path, "run.json", self.CONFIG)
        claim(tmp_path, "run.json", self.CONFIG | {"standard_kernel": "torch"})
        with pytest.raises(RunFolderError, match=r"another config \(standard_kernel was 'torch', is 'auto'\)"):
            claim(tmp_path, "run.json", self.CONFIG | {"standard_kernel": "auto"})


class TestKernel:
    """Comparisons hold standard attention to PyTorch's kernel unless they are told otherwise."""

    def config(self, **options):
        return RunConfig("standard", RegressionConfig(4), ModelSizes(1, 16, 2), TrainConfig(steps=1), **options)

    def test_it_is_pytorch_s_by_default(self):
        config = self.config()
        assert config.build_model().config.standard_kernel == "torch"
        assert "standard_kernel" not in config.to_dict()  # folders are named after a digest of it

    @pytest.mark.parametrize("kernel", ["torch", "auto", "compiled"])
    def test_the_choice_reaches_the_model_and_its_record(self, tmp_path, kernel):
        config = self.config(standard_kernel=kernel)
        assert RunConfig.from_dict(config.to_dict()) == config
        assert config.build_model().config.standard_kernel == kernel
        execute(config, tmp_path)
        recorded = json.loads((tmp_path / "run.json").read_text())
        assert recorded["standard_kernel"] == kernel
        assert RunConfig.from_dict(recorded) == config
        assert load_run(tmp_path)[1].config.standard_kernel == kernel

    def test_a_comparison_gives_it_to_every_run(self):
        settings = (("standard", "mlr"), RegressionConfig(4), ModelSizes(1, 16, 2), TrainConfig(steps=1))
        assert {run.standard_kernel for run in Comparison(*settings).runs} == {"torch"}
        assert {run.standard_kernel for run in Comparison(*settings, standard_kernel="auto").runs} == {"auto"}


class TestNormsThatCannotLearn:
    """A LayerNorm over two numbers: new runs refuse it, saved ones load and go on."""

    CONFIG = RunConfig(
        "bmlr:2|1|1",
        RegressionConfig(2, evaluation_prompts=4),
        ModelSizes(1, 16, 4),
        TrainConfig(steps=2, batch_size=2, precision="float32"),
    )

    def test_a_new_run_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"LayerNorm needs at least 3 numbers.*norm=none"):
            execute(self.CONFIG, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_a_new_comparison_is_refused_before_any_training(self, tmp_path):
        config = self.CONFIG
        comparison = Comparison(("btt", config.attention), config.task, config.sizes, config.train)
        with pytest.raises(ValueError, match=r"LayerNorm needs at least 3 numbers.*norm=none"):
            compare(comparison, tmp_path / "comparison")
        assert not (tmp_path / "comparison").exists()

    def test_a_run_that_has_started_goes_on_and_its_model_loads(self, tmp_path):
        claim(tmp_path, "run.json", self.CONFIG.to_dict() | {"standard_kernel": "torch"})
        with pytest.warns(DegenerateNormWarning):
            result = execute(self.CONFIG, tmp_path)
        assert result.metrics[-1]["step"] == 2
        with pytest.warns(DegenerateNormWarning):
            again = execute(self.CONFIG, tmp_path)
        assert again.metrics == result.metrics
        with pytest.warns(DegenerateNormWarning):
            _, model = load_run(tmp_path)
        assert model.config.attention == "bmlr:2|1|1"
        inputs = self.CONFIG.build_task(1).batch(0, 2)["inputs"]
        assert model(inputs).logits.isfinite().all()

    def test_a_comparison_that_has_started_goes_on(self, tmp_path):
        config = self.CONFIG
        comparison = Comparison((config.attention,), config.task, config.sizes, config.train)
        claim(tmp_path, "config.json", comparison.to_dict() | {"standard_kernel": "torch"})
        claim(tmp_path / "runs" / "bmlr-2-1-1-seed0", "run.json", config.to_dict() | {"standard_kernel": "torch"})
        with pytest.warns(DegenerateNormWarning):
            results = compare(comparison, tmp_path)
        assert results.runs[0].error is None
