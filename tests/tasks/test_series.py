"""Series from CSV files: reading, errors and filling."""

import hashlib
import io
import urllib.error
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pandas")

from structattn.tasks import ett
from structattn.tasks.series import load_series
from tests.tasks.series_files import NAMES, frame, write

REAL = Path(__file__).parents[2] / "../shared/data/ett/ETTh1.csv"


def test_values_times_and_borders(tmp_path):
    made = frame(200)
    series = load_series(write(tmp_path, made))
    assert series.channels == NAMES
    np.testing.assert_array_equal(series.values, made[list(NAMES)].to_numpy())
    assert str(series.times[25]) == "2020-01-02T01:00:00.000000000"
    assert series.borders == (140, 160, 200)


def test_channels_and_the_time_column_can_be_named(tmp_path):
    made = frame(50).rename(columns={"date": "when"})
    made["note"] = "x"
    series = load_series(write(tmp_path, made), time="when", columns=("OT", "north"))
    assert series.channels == ("OT", "north")
    np.testing.assert_array_equal(series.values, made[["OT", "north"]].to_numpy())


def test_a_changed_file_is_read_again(tmp_path):
    first = load_series(write(tmp_path, frame(50)))
    assert load_series(write(tmp_path, frame(60))).values.shape == (60, 3)
    assert first.values.shape == (50, 3)


@pytest.mark.parametrize("freq", ["MS", "B", "YS"])
def test_months_and_working_days_are_regular(freq, tmp_path):
    assert load_series(write(tmp_path, frame(30, freq=freq))).values.shape == (30, 3)


@pytest.mark.parametrize("hours", [17, 65])
def test_a_night_and_a_weekend_are_gaps(hours, tmp_path):
    """Gaps as long as those between business hours, which an hourly series does not have."""
    path = write(tmp_path, frame(200).drop(range(40, 40 + hours - 1)))
    with pytest.raises(ValueError, match="has gaps, the first from row 40 to 41"):
        load_series(path)
    assert load_series(path, fill="linear").values.shape == (200, 3)


def cell(row, column, text):
    def change(made):
        made = made.astype(object)
        made.loc[row, column] = text
        return made

    return change


BAD = {
    "text": (cell(4, "south", "12,5"), r"row 5, column 'south': expected a finite number, got '12,5'"),
    "infinite": (cell(4, "OT", "inf"), r"row 5, column 'OT': expected a finite number, got 'inf'"),
    "missing": (
        cell(7, "north", "NaN"),
        r"has 1 missing values, the first in row 8, column 'north'; fill must choose .* forward .* linear .* drop",
    ),
    "no time": (cell(2, "date", "soon"), r"row 3, column 'date': expected a time such as .*, got 'soon'"),
    "twice": (
        cell(9, "date", "2020-01-01 08:00:00"),
        r"row 10: 2020-01-01 08:00:00 repeats the time of the row before; a time has",
    ),
    "unsorted": (
        lambda made: made.iloc[::-1],
        r"row 2: 2020-01-01 18:00:00 is earlier than the time of the row before; sort",
    ),
    "irregular": (
        cell(9, "date", "2020-01-01 09:20:00"),
        r"row 10 comes 0 days 01:20:00 after the row before, where most rows are 0 days 01:00:00 apart: times must be",
    ),
    "gap": (
        lambda made: made.drop([5, 6]),
        r"has gaps, the first from row 5 to 6, 0 days 03:00:00, where .* fill must",
    ),
    "short": (lambda made: made[:2], r"must have three rows or more, got 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tables_are_named_by_row_and_column(name, tmp_path):
    change, message = BAD[name]
    path = write(tmp_path, change(frame(20)))
    with pytest.raises(ValueError, match=message) as caught:
        load_series(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no table: No columns"),
        (b"date,a\n2020-01-01,1\n2020-01-02,1,2\n", "is no table: .*Expected 2 fields in line 3, saw 3"),
        (b"date,a\n2020-01-01,1,2\n2020-01-02,1,2\n", "is no table: Length of header"),
        (b"date,a\n\xff,1\n", "is not UTF-8 text"),
    ],
)
def test_files_that_are_no_tables(content, message, tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_series(str(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"time": "dat"},
            r"a column of series.csv must be one of date, north, south, OT, got 'dat'; did you mean 'date'",
        ),
        ({"columns": ("nort",)}, r"a column of series.csv must be one of .* did you mean 'north'"),
        ({"columns": ("OT", "OT")}, "columns must name one or more channels of series.csv once each, got OT, OT"),
        ({"columns": ("date",)}, "columns must name one or more channels"),
        ({"fill": "forwards"}, "fill must be one of forward, linear, drop, got 'forwards'"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_series(write(tmp_path), **arguments)
    with pytest.raises(TypeError, match="data must be a string"):
        load_series(3)
    with pytest.raises(ValueError, match="data must be ETTh1, ETTh2, ETTm1, ETTm2 or a CSV file, got 'ETTh3': No such"):
        load_series("ETTh3")


def holes():
    made = frame(20).astype(object)
    made.loc[4, "north"] = ""
    made.loc[5, "north"] = "null"
    return made


@pytest.mark.parametrize("fill", ["forward", "linear", "drop"])
def test_missing_values_are_filled(fill, tmp_path):
    series, made = load_series(write(tmp_path, holes()), fill=fill), frame(20)
    whole = made[list(NAMES)].to_numpy()
    if fill == "drop":
        np.testing.assert_array_equal(series.values, np.delete(whole, [4, 5], axis=0))
        assert len(series.times) == 18
        return
    before, after = whole[3, 0], whole[6, 0]
    expected = [before, before] if fill == "forward" else [(2 * before + after) / 3, (before + 2 * after) / 3]
    assert series.values[4:6, 0] == pytest.approx(expected)
    whole[4:6, 0] = series.values[4:6, 0]
    np.testing.assert_array_equal(series.values, whole)


@pytest.mark.parametrize("fill", ["forward", "linear", "drop"])
def test_gaps_are_filled(fill, tmp_path):
    made = frame(20)
    series = load_series(write(tmp_path, made.drop([5, 6])), fill=fill)
    assert len(series.values) == (18 if fill == "drop" else 20)
    whole = made[list(NAMES)].to_numpy()
    np.testing.assert_array_equal(series.values[:5], whole[:5])
    np.testing.assert_array_equal(series.values[-13:], whole[7:])
    if fill == "forward":
        np.testing.assert_array_equal(series.values[5:7], whole[[4, 4]])
    if fill == "linear":
        np.testing.assert_allclose(series.values[5], (2 * whole[4] + whole[7]) / 3)


@pytest.mark.parametrize("fill", ["forward", "linear"])
def test_windows_do_not_look_ahead_and_mask_filled_futures(fill, tmp_path):
    series, made = load_series(write(tmp_path, holes()), fill=fill), frame(20)
    whole = made[list(NAMES)].to_numpy()
    assert np.argwhere(~series.observed).tolist() == [[4, 0], [5, 0]]
    past, future = series.windows(np.array([0, 2, 3, 8]), 4, 2)
    np.testing.assert_array_equal(future[0], [[np.nan, *whole[4, 1:]], [np.nan, *whole[5, 1:]]])
    np.testing.assert_array_equal(past[1, 2:, 0], whole[[3, 3], 0])  # Both at the end: the last value known.
    np.testing.assert_array_equal(past[2, 1:3, 0], series.values[4:6, 0])  # A value follows them: as filled.
    np.testing.assert_array_equal(past[:, :, 1:], whole[np.array([0, 2, 3, 8])[:, None] + np.arange(4), 1:])
    np.testing.assert_array_equal(future[1:], whole[np.array([2, 3, 8])[:, None] + np.arange(4, 6)])


def test_nothing_to_fill_from(tmp_path):
    with pytest.raises(ValueError, match=r"fill = 'forward' has no value of 'OT' to fill from at 2020-01-01 00:00:00"):
        load_series(write(tmp_path, cell(0, "OT", "")(frame(20))), fill="forward")
    with pytest.raises(ValueError, match=r"fill = 'linear' has no value of 'OT'"):
        load_series(write(tmp_path, cell(19, "OT", "")(frame(20))), fill="linear")
    nothing = frame(20).astype(object)
    nothing["OT"] = ""
    with pytest.raises(ValueError, match=r"misses a value in every row, so that fill = 'drop' would leave none"):
        load_series(write(tmp_path, nothing), fill="drop")


def test_gaps_longer_than_the_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match="longer than the data"):
        load_series(write(tmp_path, cell(19, "date", "2021-01-01 00:00:00")(frame(20))), fill="linear")


# --- the four files by name -------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A stand-in for the server: its answer, and the addresses asked for."""
    monkeypatch.setenv("STRUCTATTN_CACHE", str(tmp_path))
    answers, asked = {}, []

    def urlopen(url, timeout):
        asked.append(url)
        if url not in answers:
            raise urllib.error.URLError("Temporary failure in name resolution")
        return io.BytesIO(answers[url])

    monkeypatch.setattr(ett.urllib.request, "urlopen", urlopen)
    return answers, asked


def quarter_hours(rows=69_680):
    times = np.datetime64("2016-07-01T00:00:00") + np.arange(rows) * np.timedelta64(15, "m")
    lines = [f"{str(time).replace('T', ' ')},1,2,3,4,5,6,7" for time in times]
    return "\n".join(["date,HUFL,HULL,MUFL,MULL,LUFL,LULL,OT", *lines, ""]).encode()


def test_a_named_file_is_downloaded_once_and_split_as_in_the_literature(home, monkeypatch):
    answers, asked = home
    monkeypatch.setitem(ett.ETT, "ETTm2", ett.ETTFile(4, hashlib.sha256(quarter_hours()).hexdigest()))
    url = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/ETTm2.csv"
    answers[url] = quarter_hours()
    series = load_series("ETTm2")
    assert series.borders == (34_560, 46_080, 57_600)
    assert series.channels[-1] == "OT"
    answers.clear()
    assert load_series("ETTm2").borders == series.borders
    assert asked == [url]


def test_without_network_the_message_says_where_to_put_the_file(home, tmp_path):
    place = tmp_path / "ett" / "ETTh1.csv"
    with pytest.raises(
        ValueError, match=r"ETTh1 cannot be downloaded \(Temporary failure.*ETT-small/ETTh1.csv from"
    ) as e:
        load_series("ETTh1")
    assert str(e.value).endswith(f"put it at {place}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "known"), [("ETTh1", "f18de3ad"), ("ETTm1", "6ce1759b")])
def test_a_downloaded_file_is_checked(home, tmp_path, name, known):
    home[0][f"https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/{name}.csv"] = b"<html>"
    found = hashlib.sha256(b"<html>").hexdigest()
    with pytest.raises(ValueError, match=f"is not {name}: expected SHA-256 {known}.*, got {found}; get ETT-small"):
        load_series(name)
    assert list(tmp_path.iterdir()) == []


def test_a_placed_file_is_checked_too(home, tmp_path):
    (tmp_path / "ett").mkdir()
    (tmp_path / "ett" / "ETTh1.csv").write_bytes(b"date,OT\n")
    with pytest.raises(ValueError, match=r"ETTh1\.csv is not the ETTh1 of https://github.com/.*; delete it"):
        load_series("ETTh1")


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL.name} is not beside the project")
def test_the_real_file_is_the_one_known(home, tmp_path):
    (tmp_path / "ett").mkdir()
    (tmp_path / "ett" / "ETTh1.csv").write_bytes(REAL.read_bytes())
    series = load_series("ETTh1")
    assert series.values.shape == (17_420, 7)
    assert series.borders == (8_640, 11_520, 14_400)
    assert home[1] == []
