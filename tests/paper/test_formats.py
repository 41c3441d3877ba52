"""Folders and results that earlier versions wrote are recognised."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from paper.catalogue import STUDIES
from paper.chronos.data import RealSeries
from paper.chronos.study import ChronosResults, ChronosStudy
from paper.report import collect

RESULTS = Path(__file__).parents[2] / "docs" / "results"

# For each study and scale: the digest of the first run's config, and a digest of the names of all runs' folders.
# They were computed before the studies left the package, with `structattn study`.
FOLDERS = {
    ("bottleneck", "small"): ("c2d22552", "d2cb22be2dbffdef"),
    ("bottleneck", "paper"): ("d5ab79ca", "b460bd2c083ead52"),
    ("width", "small"): ("c2d22552", "a5375ec8d898d962"),
    ("width", "paper"): ("8e6325d4", "6fe2c192f9812d3f"),
    ("compute", "small"): ("38e8ee64", "63ced93e7c99dd86"),
    ("compute", "paper"): ("4231aa13", "cb78e026c54cbd00"),
    ("scaling", "small"): ("6f0fa57f", "a59a5129e3c32f55"),
    ("scaling", "paper"): ("837bb883", "611032ba394dea57"),
    ("mup", "small"): ("084e0a21", "da6e7ca71bd0dfca"),
    ("mup", "paper"): ("7e9f621c", "836bdaac8f21d228"),
    ("ranks", "small"): ("dba9736a", "3af96a59c9c71c98"),
    ("ranks", "paper"): ("e802ccba", "a11a849cc0331f37"),
    ("forecast", "small"): ("118cb9b1", "1365534908723392"),
    ("forecast", "paper"): ("5023b75f", "5ea603c4f5c0a6f8"),
}


@pytest.mark.parametrize(("name", "scale"), FOLDERS)
def test_folders_of_runs_keep_their_names(name, scale):
    """A name holds a digest of the run's config."""
    folders = [trial.folder for trial in STUDIES[name].trials(scale, STUDIES[name].data or "", 2)]
    first, digest = FOLDERS[name, scale]
    assert folders[0].endswith(f"-{first}")
    assert hashlib.sha256("\n".join(folders).encode()).hexdigest()[:16] == digest


def test_the_folder_of_a_run_keeps_its_name():
    trial = STUDIES["width"].trials("small", "", 1)[0]
    assert trial.folder == "structure=standard,width=16,head-rank=2,input-dim=6,seed=0-c2d22552"


def test_every_study_is_held_to_its_names():
    assert {name for name, _ in FOLDERS} == set(STUDIES)


def test_a_study_of_chronos_keeps_its_config():
    config = ChronosStudy(series=RealSeries("ETTh1")).to_dict()
    assert hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8] == "6726a091"


def test_results_of_chronos_are_read():
    results = ChronosResults.load(RESULTS / "chronos" / "reduced")
    assert len(results.runs) == 9
    assert "mlr:8|8|8|8 3.863 ± 0.017" in results.verdict


def test_findings_are_read(tmp_path):
    shutil.copytree(RESULTS / "studies", tmp_path / "studies")
    page = collect(tmp_path / "studies").read_text()
    assert all(study.title in page for study in STUDIES.values())
