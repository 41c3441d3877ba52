"""CSV files for tests of series."""

import numpy as np
import pandas as pd

NAMES = ("north", "south", "OT")


def frame(rows=300, seed=0, freq="h"):
    """Return three channels of random walks around a daily wave."""
    rng = np.random.default_rng(seed)
    hours = np.arange(rows)[:, None]
    values = 10 + np.sin(hours / 24 * 2 * np.pi + np.arange(3)) + 0.1 * rng.standard_normal((rows, 3)).cumsum(axis=0)
    made = pd.DataFrame(values.round(4), columns=NAMES)
    made.insert(0, "date", pd.date_range("2020-01-01", periods=rows, freq=freq).astype(str))
    return made


def write(folder, made=None, name="series.csv"):
    """Write a file and return its path, as text."""
    path = folder / name
    (frame() if made is None else made).to_csv(path, index=False)
    return str(path)
