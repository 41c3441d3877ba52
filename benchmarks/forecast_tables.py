"""Write the page on forecasting from finished comparisons: `python -m benchmarks.forecast_tables`.

Run the comparisons first, one folder per horizon (160 steps of 16 windows, about 3 minutes of one core each)::

    for horizon in 96 192 336; do
        structattn compare forecast --data ETTh1 --context 512 --horizon $horizon --steps 160 --batch-size 16 \\
            --seeds 3 --attentions standard mlr+paper+levels=2 mlr+paper+levels=4 --out runs/ett-512-$horizon
    done
    python -m benchmarks.forecast_tables runs/ett-512-*
"""

from __future__ import annotations

import argparse
import shlex
import shutil
from pathlib import Path

from structattn.comparison import files
from structattn.comparison.results import Results
from structattn.reporting.table import markdown
from structattn.reporting.verdict import verdict

_OUT = Path(__file__).parents[1] / "docs" / "results" / "forecasting"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of structattn compare forecast")
    parser.add_argument("--out", type=Path, default=_OUT)
    options = parser.parse_args()
    folders = sorted(options.folders, key=_lengths)
    files.make_folder(options.out)
    for folder in folders:
        name = "{}-{}".format(*_lengths(folder))
        shutil.copyfile(folder / "results.json", options.out / f"results-{name}.json")
        for figure in ("forecasts", "target-error"):
            shutil.copyfile(folder / "figures" / f"{figure}.png", options.out / f"{figure}-{name}.png")
    environment = files.read_json(folder / "environment.json")
    files.write_text(options.out / "README.md", _PAGE.format(
        data=Results.load(folder).data.partition(";")[0].rpartition("/")[2],
        sections="\n".join(map(_section, folders)),
        machine=f"{environment['processor']}, threads: {environment['threads']}, commit {environment['commit']}",
    ))  # fmt: skip
    print(f"wrote {options.out / 'README.md'}")


def _lengths(folder: Path) -> tuple[int, int]:
    """Return context and horizon."""
    task = files.read_json(folder / "config.json")["task"]
    return task["context_length"], task["horizon"]


def _section(folder: Path) -> str:
    results = Results.load(folder)
    said = verdict(results)
    words = files.read_json(folder / "environment.json")["command"]
    command = shlex.join(Path(word).name if word.endswith(".csv") else word for word in words)
    context, horizon = _lengths(folder)
    name = f"{context}-{horizon}"
    return (
        f"## Context {context}, horizon {horizon}\n\n```sh\n{command}\n```\n\n{markdown(results)}\n"
        f"{said.answer}\n{said.trust}\n{said.savings}\n\n"
        f"![Forecasts of the target beside the truth](forecasts-{name}.png)\n"
        f"![Error of the target, by seed](target-error-{name}.png)\n\n"
        f"Costs and final metrics of all runs: [results-{name}.json](results-{name}.json).\n"
    )


_PAGE = """# Forecasting: what attention gains, and what a linear map does

{data}.
Written by `python -m benchmarks.forecast_tables` from the comparisons below, as measured. MSE and MAE are those of
standardised values, over all channels and all windows of the test part. The target's MAE stands in standardised values,
then in °C. ± is the standard error over seeds.
[Another study](../studies/forecast/README.md) measures how the gain of levels changes with the length of the context.

{sections}
## What was not measured

Models of the paper's width (`--preset paper`), longer trainings and the other series. The machine did other work, too,
so tokens per second are rough. Machine: {machine}.
"""


if __name__ == "__main__":
    main()
