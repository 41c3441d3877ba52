"""Folders and results that earlier versions wrote are recognised."""

import contextlib
import csv
import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from paper.catalogue import STUDIES
from paper.chronos.attention import label, spelling
from paper.chronos.data import RealSeries
from paper.chronos.run import ChronosRunConfig
from paper.chronos.study import ChronosResults, ChronosStudy
from paper.report import collect
from paper.study import Outcome
from structattn import Hierarchy
from structattn.integrations.t5 import t5_hierarchy
from structattn.layers import parse_attention

RESULTS = Path(__file__).parents[2] / "docs" / "results"

# For each study and scale: the digest of the first run's config, and a digest of the names of all runs' folders.
# They were computed before the studies left the package, with `structattn study`; those of scaling, ranks and forecast
# when the paper's form of MLR attention got its spelling, those of later studies with the study.
# Those of bottleneck, width and compute: when heads of rank 2 lost their norm and scale paper got muP.
FOLDERS = {
    ("bottleneck", "small"): ("ef9845d7", "cbf755ccd0025003"),
    ("bottleneck", "paper"): ("52527362", "5e95d36bd5a6896b"),
    ("width", "small"): ("ef9845d7", "d17b3d78f6f887dc"),
    ("width", "paper"): ("987e4603", "9d3b48868b86f07e"),
    ("compute", "small"): ("99dc4909", "ef3a1381a1b24b3c"),
    ("compute", "paper"): ("9076b3e5", "faff2dfc8c66d2d4"),
    ("scaling", "small"): ("6f0fa57f", "0801a16a2025aae5"),
    ("scaling", "paper"): ("837bb883", "a7afff61dbd7623b"),
    ("mup", "small"): ("084e0a21", "da6e7ca71bd0dfca"),
    ("mup", "paper"): ("7e9f621c", "836bdaac8f21d228"),
    ("ranks", "small"): ("d12bdee2", "1bfd258e1fde61dd"),
    ("ranks", "paper"): ("d2cfe6d4", "9cd579bc170fb95a"),
    ("levels", "small"): ("9215bc92", "df42869b66bf74a9"),
    ("levels", "paper"): ("a08f8fc8", "283b8b8c4eeef6e0"),
    ("recipe", "small"): ("3035ac4c", "03c1905c84db4206"),
    ("recipe", "paper"): ("e36e01cd", "5fd236f7a60850e2"),
    ("reasons", "small"): ("6f0fa57f", "ef82df86ac4a1346"),
    ("reasons", "paper"): ("837bb883", "a5d855fc97986e02"),
    ("contexts", "small"): ("9d05d308", "343f6a819a7688e6"),
    ("contexts", "paper"): ("952fdd0b", "61fcf891ec42d60a"),
    ("forecast", "small"): ("118cb9b1", "df3b54b343028662"),
    ("forecast", "paper"): ("5023b75f", "c0648e7c80e1ff31"),
}


@pytest.mark.parametrize(("name", "scale"), FOLDERS)
def test_folders_of_runs_keep_their_names(name, scale):
    """A name holds a digest of the run's config."""
    folders = [trial.folder for trial in STUDIES[name].trials(scale, STUDIES[name].data or "", 2)]
    first, digest = FOLDERS[name, scale]
    assert folders[0].endswith(f"-{first}")
    assert hashlib.sha256("\n".join(folders).encode()).hexdigest()[:16] == digest


def test_the_folder_of_a_run_keeps_its_name():
    trial = STUDIES["width"].trials("small", "", 1)[3]
    assert trial.folder == "structure=standard,width=32,head-rank=4,input-dim=6,seed=0-38e8ee64"


def test_every_study_is_held_to_its_names():
    assert {name for name, _ in FOLDERS} == set(STUDIES)


def test_a_study_of_chronos_keeps_its_config():
    config = ChronosStudy(series=RealSeries("ETTh1")).to_dict()
    assert hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8] == "6726a091"


# For each attention as version 0.1.0 recorded it: the run's folder, the digest of its config, and the levels it had.
CHRONOS_RUNS = {
    "standard": ("standard-seed0", "8804b3f9", "32", "32"),
    "mlr:16|16": ("mlr-16-16-seed0", "77429b6a", "16|16@256", "16|16@32"),
    "mlr:16,16": ("mlr-16-16-seed0", "bc3d5dad", "16|16@256", "16|16@32"),
    "mlr:8x4/mean": ("mlr-8x4-mean-seed0", "c98d25c1", "8|8|8|8@256/mean", "8|8|8|8@32/mean"),
    "mlr": ("mlr-seed0", "d5648476", "16|4|4|2|2|4@256", "16|4|12@32"),
}


@pytest.mark.parametrize("recorded", CHRONOS_RUNS)
def test_a_run_of_chronos_keeps_its_folder_its_config_and_its_levels(recorded):
    folder, digest, encoder, decoder = CHRONOS_RUNS[recorded]
    config = ChronosRunConfig(attention=spelling(recorded))
    assert config.label == recorded
    assert config.folder == folder
    assert hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()[:8] == digest
    levels = {"encoder": encoder, "decoder": decoder}
    lengths = {"encoder": config.context_length, "decoder": config.prediction_length}
    for stack, length in lengths.items():
        assert t5_hierarchy(config.attention, 32, length) == Hierarchy.parse(levels[stack])


@pytest.mark.parametrize("size", ["reduced", "tiny"])
def test_attentions_recorded_by_studies_of_chronos_have_a_spelling(size):
    folder = RESULTS / "chronos" / size
    recorded = json.loads((folder / "config.json").read_text())["attentions"]
    study = ChronosStudy(tuple(map(spelling, recorded)), seeds=3)
    assert study.to_dict()["attentions"] == recorded
    names = [(run.label, run.seed) for run in study.runs]
    assert names == [(run.attention, run.seed) for run in ChronosResults.load(folder).runs]


def test_attentions_recorded_by_the_study_of_forecasts_have_a_spelling():
    trials = [each for each in STUDIES["forecast"].trials("small", "ETTh1", 1) if each.labels["part"] == "Chronos"]
    assert [each.config.label for each in trials] == [each.labels["structure"] for each in trials]


@pytest.mark.parametrize(
    ("attention", "expected"),
    [
        ("mlr+levels=2+qk_norm=false+level_weight=1+paper", "mlr/mean+levels=2"),
        ("mlr:16|16+gains=mean+level_weight=1+qk_norm=false+paper=true", "mlr:16|16/mean"),
        ("mlr:16|16+block_sizes=*|8+paper+level_weight=1+qk_norm=false+gains=none", "mlr:16|16+block_sizes=*|8"),
        ("mlr:16|16+level_weight=1+qk_norm=false", "mlr:16|16+paper=false"),
        ("mlr:16|16+paper=false+level_weight=1+qk_norm=false", "mlr:16|16+paper=false"),
        ("mlr:16|16+windows=8+gains=mean+level_weight=1+qk_norm=false", "mlr:16|16/mean+windows=8+paper=false"),
    ],
)
def test_a_label_stands_for_one_attention(attention, expected):
    assert label(attention) == expected
    assert parse_attention(spelling(expected)) == parse_attention(attention)


@pytest.mark.parametrize("recorded", ["btt", "standard/mean", "mlr:16|16/1|0.5"])
def test_a_label_without_a_spelling_is_refused(recorded):
    with pytest.raises(ValueError, match="label must be as in standard"):
        spelling(recorded)


def test_an_attention_that_a_t5_cannot_have_has_no_label():
    with pytest.raises(ValueError, match="level_weight must be 1 in a T5"):
        ChronosRunConfig(attention="mlr:16|16")


def test_results_of_chronos_are_read():
    results = ChronosResults.load(RESULTS / "chronos" / "reduced")
    assert len(results.runs) == 9
    assert "mlr:8|8|8|8 3.863 ± 0.017" in results.verdict


def _outcomes(folder):
    """Return the outcomes that the tables of a study's folder hold."""
    runs, evaluations = (_rows(folder / name) for name in ("results.csv", "curves.csv"))
    names = {name: None for run in runs for name in run if name not in Outcome({}, 0).table_row()}  # labels
    curves = {}
    for row in evaluations:
        curves.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return [
        Outcome(
            {name: run[name] for name in names if name in run},
            run["parameters"],
            tuple(curves[tuple(run.get(name) for name in names)]),
        )
        for run in runs
    ]


def _rows(path):
    """Return the rows of a table without their empty cells, numbers as numbers."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: _value(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


def _value(cell):
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(cell)
    return cell


def _published(name):
    """Return the folder of a study's results; the search for the default form stands beside those of the paper."""
    return RESULTS / name if name == "levels" else RESULTS / "studies" / name


UNPUBLISHED = {"contexts"}
"""Studies that have not been run yet."""


def test_studies_without_a_page_are_known():
    assert {name for name in STUDIES if not _published(name).exists()} == UNPUBLISHED


@pytest.mark.parametrize("name", [name for name in STUDIES if name not in UNPUBLISHED])
def test_a_published_finding_follows_from_its_tables(name):
    """A change of a study's rules or words needs its published page written again."""
    folder = _published(name)
    published = json.loads((folder / "finding.json").read_text())
    assert published["failed"] == []
    finding = STUDIES[name].finding(_outcomes(folder))
    assert dataclasses.asdict(finding) == published["finding"]
    assert f"**Found.** {finding.statement}\n" in (folder / "README.md").read_text()
    assert f"**{finding.agreement}** The paper: {STUDIES[name].text.reported}\n" in (folder / "README.md").read_text()


def test_findings_are_read(tmp_path):
    shutil.copytree(RESULTS / "studies", tmp_path / "studies")
    shutil.copytree(_published("levels"), tmp_path / "studies" / "levels")
    page = collect(tmp_path / "studies").read_text()
    assert all(study.text.title in page for name, study in STUDIES.items() if name not in UNPUBLISHED)
