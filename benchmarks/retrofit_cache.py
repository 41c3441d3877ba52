"""Judge models with smaller caches where a window must fail.

It writes their page. `python -m benchmarks.retrofit_cache judge runs/smollm2` reads a folder that `structattn retrofit
--windows` wrote. It measures, for the model as it was and for the tuned ones with caches of equal size:

*Retrieval.* A number of five digits stands in the first half of a text of novels, and the text ends by asking for it.
Found means that every digit is the likeliest token after the ones before.

*Choice.* After a text of novels stand four continuations: its own, and three from other places of the same book. Chosen
is the one of the highest mean log-probability. Each model reads the text once, into the cache that it generates with.

*Position.* The loss over the eighths of a window longer than the tuned one: its end shows what far tokens are worth.

`python -m benchmarks.retrofit_cache speed runs/smollm2` times a decoded token of the model with levels and of the one
as it was, each with its cache almost full, for one row and for eight.

`python -m benchmarks.retrofit_cache page runs/smollm2` writes the page and the figure from all three. `--seeds` adds
folders of the same study with another `--seed` and `--tune-steps 0`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks import machine
from benchmarks.generation import cache_bytes, model_decoding
from benchmarks.output import describe_machine, table, write_json
from benchmarks.retrofit import without_folder
from benchmarks.timing import sample_warm
from structattn.comparison import files
from structattn.comparison.environment import environment
from structattn.integrations.transformers import get_hierarchy, make_cache, set_hierarchy
from structattn.integrations.transformers.layers import DECODER, IMPLEMENTATION, attention_layers
from structattn.models.transformers_internals import CACHE, attention_implementation
from structattn.retrofit.cache_methods import CacheMethod, Levels, Rounded, cache_share, rivals_of, token_losses
from structattn.retrofit.cache_report import cache_markdown, cache_verdict, draw_cache, layer_cells
from structattn.retrofit.cache_results import CacheResults
from structattn.retrofit.pretrained import find_model, open_pretrained
from structattn.training.precision import uses_bfloat16

LENGTHS = (1024, 2048)
PROMPTS = 20
LONG, LONG_WINDOWS = 8192, 3
EIGHTHS = 8
BITS = 4
SEED = 0
ROWS, ROUNDS = (1, 8), 30
STANDARD, LEVELS, BY_LAYER, WINDOW = "standard", "levels", "by layer", "window"
ROUNDED = f"levels, int{BITS}"
ITEMS, CHOICES, CONTEXT, CONTINUATION = 200, 4, 1024, 24

_UNFINISHED = "The study was stopped before its last rows."


class Judged:
    """The models of a study's folder, and the text they read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = files.read_json(folder / "config.json")
        self.model, self.tokenizer = open_pretrained(find_model(self.config["model"]))
        self.layers = attention_layers(self.model)[DECODER]
        rows = CacheResults.load(folder).rows
        self.names = {kind: [row.name for row in rows if row.kind == kind] for kind in (LEVELS, BY_LAYER, WINDOW)}
        self.smaller = (self.names[BY_LAYER] or self.names[LEVELS])[0]
        self.levels = Levels(tuple(get_hierarchy(self._saved(self.smaller))[DECODER]), self.smaller)
        self.novels = [Path(name) for name in sorted(map(str, Path().glob(self.config["data"])))]

    def methods(self, length: int) -> dict[str, CacheMethod]:
        """Return the methods to compare by name: at `length`, the window has as many bytes as the levels.

        A study that was stopped may have no window yet.
        """
        found = {STANDARD: CacheMethod(), LEVELS: self.levels, ROUNDED: Rounded(self.levels, BITS)}
        if self.names[WINDOW]:
            found[WINDOW] = rivals_of(self.levels, self.layers, length, self.config["sinks"])[0]
        return found

    def load(self, method: CacheMethod) -> Any:
        """Return the tuned model of a method."""
        if isinstance(method, Rounded):
            model = self._saved(self.smaller)
            method.attach(model)
        elif method is self.levels:
            model = self._saved(self.smaller)
        elif isinstance(method, Levels):
            model = self._saved(self.names[WINDOW][0])
            set_hierarchy(model, list(method.hierarchies) * len(self.layers))
        else:
            model = self.model
        return model.eval()

    def _saved(self, name: str) -> Any:
        path = self.folder / "models" / files.safe_name(name)
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=IMPLEMENTATION)

    def tokens(self, count: int, book: int, at: float) -> list[int]:
        """Return tokens of a book's held-out end, from a place in it."""
        text = self.novels[book % len(self.novels)].read_text(encoding="utf-8")
        held = text[len(text) - len(text) // 20 :]
        start = int(at * max(0, len(held) - 8 * count))
        return self.encode(held[start : start + 8 * count])[:count]

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids


def passkey_prompts(judged: Judged, length: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield prompts of `length` tokens that end with the number.

    Yield also how many tokens the number has.
    """
    draws = random.Random(SEED)
    for prompt in range(PROMPTS):
        key = str(draws.randrange(10_000, 100_000))
        fact = judged.encode(f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n")
        question = judged.encode("\n\nWhat is the pass key? The pass key is")
        answer = judged.encode(f" {key}")
        filler = judged.tokens(length - len(fact) - len(question) - len(answer), prompt, draws.random())
        place = draws.randrange(0, len(filler) // 2)
        ids = [*filler[:place], *fact, *filler[place:], *question, *answer]
        yield torch.tensor(ids), len(answer)


@torch.no_grad()
def found(model: Any, ids: torch.Tensor, digits: int) -> bool:
    """Return True if every token of the number is the likeliest one."""
    with torch.autocast("cpu", torch.bfloat16, enabled=uses_bfloat16("auto", ids.device)):
        logits = model(ids[None, :-1], use_cache=False, logits_to_keep=digits).logits[0]
    return bool((logits.argmax(-1) == ids[-digits:]).all())


def choice_items(judged: Judged) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Yield a context `(T,)`, continuations of it `(CHOICES, n)`, and which of them is its own."""
    draws = random.Random(SEED)
    for item in range(ITEMS):
        text = judged.tokens(CONTEXT + CONTINUATION, item, draws.random())
        others = [judged.tokens(CONTINUATION, item, draws.random()) for _ in range(CHOICES - 1)]
        own = draws.randrange(CHOICES)
        others.insert(own, text[CONTEXT:])
        yield torch.tensor(text[:CONTEXT]), torch.tensor(others), own


@torch.no_grad()
def chosen(model: Any, context: torch.Tensor, continuations: torch.Tensor) -> int:
    """Return the continuation of the highest log-probability; the context is read once, into a cache."""
    levels = attention_implementation(model.config) == IMPLEMENTATION
    cache = make_cache(model) if levels else DynamicCache(config=model.config)
    with torch.autocast("cpu", torch.bfloat16, enabled=uses_bfloat16("auto", context.device)):
        first = model(context[None], **{CACHE: cache}, logits_to_keep=1).logits
        cache.batch_repeat_interleave(len(continuations))
        later = model(continuations[:, :-1], **{CACHE: cache}).logits
    logits = torch.cat([first.expand(len(continuations), -1, -1), later], 1).float()
    scores = logits.log_softmax(-1).gather(2, continuations[..., None]).sum((1, 2))
    return int(scores.argmax())


def judge(folder: Path, out: Path) -> None:
    """Measure retrieval, choices and losses by position.

    Write after each, and go on where an earlier call stopped.
    """
    judged = Judged(folder)
    result: dict[str, Any] = {"retrieval": [], "choice": [], "position": [], "environment": environment()}
    result |= {"prompts": PROMPTS, "items": ITEMS, "long": LONG, "windows": LONG_WINDOWS}
    if out.exists():
        result = files.read_json(out)
    windows = torch.tensor([judged.tokens(LONG, 5 * book, 0.3) for book in range(LONG_WINDOWS)])
    parts = [("retrieval", length) for length in LENGTHS] + [("choice", CONTEXT), ("position", LONG)]
    for name in judged.methods(LONG):
        for part, length in parts:
            method = judged.methods(length)[name]
            row = {"length": length, "method": name, "setting": method.name}
            if any(row.items() <= there.items() for there in result[part]):
                continue
            if part == "choice" and isinstance(method, Rounded):
                continue  # it has no cache to generate with
            share = cache_share(method, judged.layers, length)
            model = judged.load(method)
            match part:
                case "retrieval":
                    more = _retrieved(judged, model, length)
                case "choice":
                    more = _right(judged, model)
                case _:
                    more = _by_position(model, windows)
            result[part].append({**row, "share": share, **more})
            write_json(result, out)


def _right(judged: Judged, model: Any) -> dict[str, Any]:
    """Return how many of the chosen continuations are the context's own."""
    items = track(choice_items(judged), f"{ITEMS} choices", total=ITEMS)
    return {"right": sum(chosen(model, context, continuations) == own for context, continuations, own in items)}


def _retrieved(judged: Judged, model: Any, length: int) -> dict[str, Any]:
    """Return how many numbers a model finds in prompts of `length` tokens."""
    prompts = track(passkey_prompts(judged, length), f"{length} tokens", total=PROMPTS)
    return {"found": sum(found(model, *prompt) for prompt in prompts)}


def _by_position(model: Any, windows: torch.Tensor) -> dict[str, Any]:
    """Return the loss of long windows, whole and by eighth."""
    with torch.autocast("cpu", torch.bfloat16, enabled=uses_bfloat16("auto", windows.device)):
        losses = token_losses(model, track(list(windows), f"{windows.shape[1]} tokens"))
    return {"loss": float(losses.mean()), "eighths": [float(part.mean()) for part in losses.chunk(EIGHTHS, dim=1)]}


def speed(folder: Path, out: Path) -> None:
    """Time decoding with both caches, and measure them."""
    machine.pin_threads("benchmarks.retrofit_cache")
    judged = Judged(folder)
    models = {STANDARD: judged.model, LEVELS: judged.load(judged.levels)}
    result: dict[str, Any] = {"machine": machine.facts(), "context": LONG, "rows": {}}
    for rows in ROWS:
        with torch.inference_mode():
            made = {name: model_decoding(model, LONG, ROUNDS, rows) for name, model in models.items()}
            seconds = sample_warm({name: step for name, (step, _) in made.items()}, ROUNDS)
        sizes = {name: cache_bytes(cache) for name, (_, cache) in made.items()}
        result["rows"][rows] = {"seconds": seconds, "bytes": sizes}
        write_json(result, out)


def layer_lines(layers: dict[str, Any]) -> list[str]:
    """Return the table of each layer's hierarchy."""
    return [
        "What each layer has, whole attention first; `+4` are sinks:",
        "",
        *table(["hierarchy", "layers"], [[name.replace("|", ","), places] for name, places in layer_cells(layers)]),
        "",
    ]


def retrieval_lines(judged: dict[str, Any]) -> list[str]:
    """Return the section on retrieval."""
    cells = [
        [str(row["length"]), row["setting"], f"{row['share']:.0%}", f"{row['found']} of {judged['prompts']}"]
        for row in sorted(judged["retrieval"], key=lambda row: row["length"])
    ]
    return [
        "## Retrieval",
        "",
        "A number of five digits stands in the first half of a text, whose end asks for it. *Found*: all digits are",
        "the likeliest tokens. The window has as many bytes as the levels at each length. The models are those above.",
        "",
        *table(["tokens", "method", "cache", "found"], cells),
        "",
    ]


def position_lines(judged: dict[str, Any]) -> list[str]:
    """Return the section on losses by position."""
    standard = judged["position"][0]
    cells = [
        [row["setting"], f"{row['share']:.1%}", f"{row['loss']:.3f}"]
        + [f"{row['eighths'][at]:.3f} ({row['eighths'][at] - standard['eighths'][at]:+.3f})" for at in (0, 3, 7)]
        for row in judged["position"]
    ]
    return [
        f"## Loss by position in {judged['long']} tokens",
        "",
        f"{judged['windows']} windows of held-out novels, in nats per token; in brackets the change against standard.",
        "",
        *table(["method", "cache", "loss", "1st eighth", "4th eighth", "8th eighth"], cells),
        "",
    ]


def choice_lines(judged: dict[str, Any]) -> list[str]:
    """Return the section on choices."""
    cells = [
        [row["setting"], f"{row['share']:.0%}", f"{row['right']} of {judged['items']}"] for row in judged["choice"]
    ]
    return [
        "## Which continuation",
        "",
        f"After {CONTEXT:,} tokens of a held-out text stand {CHOICES} continuations of {CONTINUATION} tokens: its own,",
        "and others from the same book. *Right*: its own has the highest probability. Chance is one of four.",
        "",
        *table(["method", "cache", "right"], cells),
        "",
    ]


def speed_lines(measured: dict[str, Any]) -> list[str]:
    """Return the section on speed."""
    cells = []
    for rows, row in measured["rows"].items():
        slow, fast = (machine.median(row["seconds"][name]) for name in (STANDARD, LEVELS))
        whole, small = (row["bytes"][name] for name in (STANDARD, LEVELS))
        times = [f"{1e3 * slow:.1f}", f"{1e3 * fast:.1f} ({slow / fast:.2f})"]
        sizes = [f"{whole / 2**20:.0f}", f"{small / 2**20:.0f} ({small / whole:.1%})"]
        cells.append([str(rows), *times, *sizes])
    return [
        "## Speed and memory of generation",
        "",
        describe_machine(measured["machine"]),
        "",
        f"One token of each row is decoded with about {measured['context']:,} tokens in the cache, in float32: ms per",
        "step, medians of interleaved steps, and in brackets the speed over the standard cache, which is filled in",
        "place. Caches count the room they keep for growth.",
        "",
        *table(["rows", "standard, ms", "levels, ms", "standard, MiB", "levels, MiB"], cells),
        "",
    ]


def page(document: dict[str, Any]) -> str:
    """Return the Markdown page of the published JSON."""
    results, judged = CacheResults.from_dict(document), document.get("judged", {})
    tuned = next(row for row in results.rows if row.tuned)
    lines = [
        f"# A smaller cache for {results.model}",
        "",
        cache_verdict(results),
        "",
        "```sh",
        shlex.join(document["command"]),
        "```",
        "",
        f"![Perplexity against bytes of the cache]({document['name']}.png)",
        "",
        f"Perplexity per token over windows of {results.length} tokens, every token but a window's first. Tuned ones",
        f"had {tuned.tuning_tokens:,} tokens of distillation from the model as it was, all alike; *untuned* is the",
        "perplexity before. The standard model is its own teacher, so distillation leaves it as it is. Bytes count",
        "keys and values against 16 bits a number. Rounded caches count scales, offsets and newest tokens in 16 bits.",
        "*Last quarter* is the change of the loss there in nats: what the missing far tokens cost. One seed.",
        "",
        cache_markdown(results),
        "",
        *(layer_lines(document["layers"]) if "layers" in document else []),
        *([] if any(row.kind == "uniform" for row in results.rows) else [_UNFINISHED, ""]),
        *(retrieval_lines(judged) if judged.get("retrieval") else []),
        *(choice_lines(judged) if judged.get("choice") else []),
        *(position_lines(judged) if judged.get("position") else []),
        *(seed_lines(document["seeds"]) if "seeds" in document else []),
        *(speed_lines(document["speed"]) if "speed" in document else []),
        "Method and options: [Retrofit](../../retrofit.md).",
    ]
    return "\n".join([*lines, ""])


def seed_lines(seeds: list[dict[str, Any]]) -> list[str]:
    """Return the section on other calibration texts."""
    cells = []
    for row in seeds:
        results = CacheResults.from_dict(row)
        before = results.standard.untuned[0].perplexity
        for each in results.rows[1:]:
            perplexity = each.untuned[0].perplexity
            cells.append([str(row["seed"]), each.name, f"{each.share:.1%}", f"{perplexity / before - 1:+.1%}"])
    return [
        "## Other calibration texts",
        "",
        "The seed chooses the windows that orders, bases and layers are measured on. Change of perplexity untuned:",
        "",
        *table(["seed", "method", "cache", "untuned"], cells),
        "",
    ]


def write_page(folder: Path, out: Path, seeds: list[Path]) -> None:
    """Write page, figure and JSON of a study into `out`, with untuned studies of other seeds."""
    results, name = CacheResults.load(folder), folder.name
    made_by = files.read_json(folder / "environment.json")
    words = without_folder(made_by.pop("command"))
    words[words.index("--out") + 1] = f"runs/{folder.name}"
    document = dataclasses.asdict(results) | {
        "name": name,
        "command": words,
        "environment": made_by,
    }
    for part in ("layers", "judged", "speed"):
        if (folder / f"{part}.json").exists():
            document[part] = files.read_json(folder / f"{part}.json")
    if seeds:
        document["seeds"] = [
            {"seed": files.read_json(each / "config.json")["seed"]} | dataclasses.asdict(CacheResults.load(each))
            for each in seeds
        ]
    for row in itertools.chain(document["rows"], *(each["rows"] for each in document.get("seeds", ()))):
        for text in (*row["untuned"], *row["tuned"]):
            text["text"] = Path(text["text"]).name
    files.write_json(out / f"{name}.json", document)
    draw_cache(results, out, name)
    (out / f"{name}.md").write_text(page(document), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("judge", "speed", "page"))
    parser.add_argument("folder", type=Path, help="folder written by structattn retrofit --windows")
    parser.add_argument("--seeds", type=Path, nargs="*", default=[], help="folders of untuned studies of other seeds")
    parser.add_argument("--out", type=Path, default=Path("docs/results/retrofit"), help="folder of the page")
    options = parser.parse_args()
    match options.what:
        case "judge":
            judge(options.folder, options.folder / "judged.json")
        case "speed":
            speed(options.folder, options.folder / "speed.json")
        case _:
            write_page(options.folder, options.out, options.seeds)


if __name__ == "__main__":
    main()
