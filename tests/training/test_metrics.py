import pytest

from structattn import training
from structattn.training import MetricsFile, MetricsRow, RunFolderError


def test_lines_come_back(tmp_path):
    file = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    assert (file.size, file.rows()) == (0, [])
    rows = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "errors": [1.0, 1e-17]}]
    for row in rows:
        file.append(row)
    assert file.rows() == rows


def test_truncate_drops_later_and_half_written_lines(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"step": 1})
    size = file.size
    file.append({"step": 2})
    with file.path.open("a") as handle:
        handle.write('{"step": 3, "lo')
    file.truncate(size)
    assert file.rows() == [{"step": 1}]


def test_a_file_that_lost_lines_is_refused(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"step": 1})
    with pytest.raises(
        RunFolderError, match=r"metrics.jsonl: expected at least the 100 bytes of the checkpoint, got 12"
    ):
        file.truncate(100)


def test_a_number_that_json_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        MetricsFile(tmp_path / "metrics.jsonl").append({"loss": float("nan")})


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="metrics cannot be written: "):
        MetricsFile(tmp_path / "file" / "metrics.jsonl").append({"step": 1})


def test_the_old_name_of_a_row_still_works():
    with pytest.warns(DeprecationWarning, match="Row is now structattn.training.MetricsRow"):
        assert training.Row is MetricsRow
