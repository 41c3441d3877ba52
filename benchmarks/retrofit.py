"""Write the page on retrofitting from finished studies: `python -m benchmarks.retrofit runs/retrofit-*`.

The page in `docs/results/retrofit` has the figure, and a table and a finding for each study, as measured. The studies
are made by `structattn retrofit --model RUN --data NOVELS --ranks … --out FOLDER`. Each section states its command.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path

from structattn.comparison import files
from structattn.retrofit.measure import RetrofitResults
from structattn.retrofit.report import draw_retrofit, retrofit_markdown, retrofit_verdict


def page(folders: list[Path], studies: list[RetrofitResults]) -> str:
    """Return the Markdown page."""
    lines = [
        "# Retrofitting: loss against key numbers",
        "",
        "A trained model with standard attention gets MLR attention without being trained anew. Far pairs of tokens",
        "then multiply only the first dimensions of a head. What is the validation loss? *Trained* order keeps the",
        "dimensions as training left them. *Measured* order sorts them by the energy of far scores: rotary models by",
        "pairs of dimensions, models with learned positions in a new basis. [Retrofit](../../retrofit.md) explains the",
        "method and [the two models](../../retrofit.md#what-was-measured).",
        "",
        "![Validation loss against key numbers](retrofit.png)",
        "",
        "Dashed lines: without tuning. Solid lines: after tuning. The standard model is tuned alike. One seed each.",
    ]
    for folder, results in zip(folders, studies, strict=True):
        environment = files.read_json(folder / "environment.json")
        lines += [
            "",
            f"## {results.positions.capitalize()} positions, {results.context_length} tokens{_pairs(folder)}",
            "",
            "```sh",
            shlex.join(without_folder(environment["command"])),
            "```",
            "",
            retrofit_markdown(results),
            "",
            retrofit_verdict(results),
        ]
    return "\n".join([*lines, ""])


def _pairs(folder: Path) -> str:
    """Return the end of a heading: nothing for far pairs."""
    return ", measured over all tokens" if files.read_json(folder / "config.json")["pairs"] == "all" else ""


def without_folder(command: list[str]) -> list[str]:
    """Return the command with the path of its text shortened."""
    words = list(command)
    place = words.index("--data") + 1
    words[place] = Path(words[place]).name
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="+", help="folders written by structattn retrofit")
    parser.add_argument("--out", type=Path, default=Path("docs/results/retrofit"))
    options = parser.parse_args()
    studies = [RetrofitResults.load(folder) for folder in options.studies]
    draw_retrofit([results for results in studies if results.tune_steps], options.out)
    for folder, results in zip(options.studies, studies, strict=True):
        plain = dataclasses.asdict(results) | {"data": Path(results.data).name}
        files.write_json(options.out / f"{folder.name}.json", plain)
    (options.out / "README.md").write_text(page(options.studies, studies), encoding="utf-8")


if __name__ == "__main__":
    main()
