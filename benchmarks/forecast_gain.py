"""Tables and figures of forecasting comparisons at several lengths of context: `python -m benchmarks.forecast_gain`.

Make the comparisons first, one folder for each length (160 steps of 16 windows, about 25 minutes of one core in all)::

    for context in 96 192 336 512; do
        structattn compare forecast --data ETTh1 --context $context --horizon 96 --steps 160 --batch-size 16 --seeds 3 \
            --attentions standard mlr+levels=2 mlr+levels=4 --out runs/ett-$context
    done
    python -m benchmarks.forecast_gain runs/ett-*
"""

from __future__ import annotations

import argparse
import shlex
import shutil
from pathlib import Path

from structattn.studies import files
from structattn.studies.forecast_gain import comparison_table, draw_gains, gains_table
from structattn.studies.results import Results
from structattn.studies.verdict import verdict

_OUT = Path(__file__).parents[1] / "docs" / "results" / "forecasting"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of structattn compare forecast")
    parser.add_argument("--out", type=Path, default=_OUT)
    options = parser.parse_args()
    made = sorted(((Results.load(folder), folder) for folder in options.folders), key=lambda each: _length(each[0]))
    comparisons = [results for results, _ in made]
    draw_gains(comparisons, options.out)
    longest, folder = made[-1]
    for name in ("forecasts", "target-error"):
        for kind in ("png", "svg"):
            shutil.copyfile(folder / "figures" / f"{name}.{kind}", options.out / f"{name}.{kind}")
    environment = files.read_json(folder / "environment.json")
    sections = [_section(results, where) for results, where in made]
    files.write_text(options.out / "README.md", _PAGE.format(
        data=longest.data.partition(";")[0].rpartition("/")[2],
        gains=gains_table(comparisons),
        length=_length(longest),
        sections="\n".join(sections),
        machine=f"{environment['processor']}, {environment['threads']} thread, commit {environment['commit']}",
    ))  # fmt: skip
    print(f"wrote {options.out / 'README.md'}")


def _length(results: Results) -> int:
    return results.sizes["context_length"]


def _section(results: Results, folder: Path) -> str:
    said = verdict(results)
    words = files.read_json(folder / "environment.json")["command"]
    command = shlex.join(Path(word).name if word.endswith(".csv") else word for word in words)
    return (
        f"## Context {_length(results)}\n\n```sh\n{command}\n```\n\n{comparison_table(results)}\n"
        f"{said.answer}\n{said.trust}\n{said.savings}\n"
    )


_PAGE = """# Forecasting: what attention gains, and what a linear map does

{data}.
Written by `python -m benchmarks.forecast_gain` from the comparisons below, as measured. MSE and MAE are of
standardised values, all channels, on every window of the test part; the target's MAE is standardised, then in its unit.

## Gain over standard attention against the length of the context

How much lower the target's mean absolute error is than standard attention's, paired by seed, ± half the 95% interval of
the mean (Student's t). An interval that holds zero shows no gain.

{gains}
![Gain in the error of the target against the length of the context](gain.png)

Forecasts and errors at context {length}:

![Forecasts of the target beside the truth](forecasts.png)
![Error of the target, by seed](target-error.png)

{sections}
## What was not measured

Models of the paper's width (`--preset paper`), longer training, other horizons and the other series. Tokens per second
include whatever else the machine did. Measured on {machine}.
"""


if __name__ == "__main__":
    main()
