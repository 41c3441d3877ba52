"""Generation with the compressed key cache against standard attention: `python -m benchmarks.generation`.

*Speed.* A model decodes token by token near the end of its context, where every block is almost full and the compressed
cache largest: with MLR attention and its cache, and with standard attention (PyTorch's SDPA) on two caches, one that
concatenates, as transformers' `DynamicCache` does, and this package's, which grows in place. Caches are filled with
random numbers, which cost what real ones cost. Steps are interleaved.

*Memory.* A small model writes a long text; the bytes of its cache are noted as it goes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from structattn.layers.timeline import Timeline
from structattn.models import LanguageModel, LanguageModelConfig, ModelCache
from structattn.studies.style import new_figure, styled

MLR = "mlr:8x8"
SIZES = {"layers": 4, "dim": 512, "heads": 8, "positions": "rotary"}
SMALL = {"layers": 1, "dim": 64, "heads": 1, "positions": "rotary", "context_length": 1024}
PREFILL = 4096


class Concatenating(Timeline):
    """A timeline that concatenates at every step, as transformers' `DynamicLayer` does."""

    def append(self, entries: torch.Tensor) -> None:
        """Old entries and new ones in a new tensor."""
        self._storage = entries if self._storage is None else torch.cat([self._storage, entries], dim=self.axis)
        self.end += entries.shape[self.axis]


VARIANTS: dict[str, tuple[str, bool]] = {
    "standard, DynamicCache": ("standard", True),
    "standard, cache in place": ("standard", False),
    f"{MLR}, compressed cache": (MLR, False),
}
"""Name, attention, whether the cache concatenates."""


def build(attention: str, context: int) -> LanguageModel:
    """A model of random weights, zero ones drawn too."""
    torch.manual_seed(0)
    model = LanguageModel(LanguageModelConfig(**SIZES, context_length=context, attention=attention)).eval()
    for block in model.backbone.layers:
        torch.nn.init.normal_(block.attention.out_proj.weight, std=0.02)
        torch.nn.init.normal_(block.mlp.contract.weight, std=0.02)
    return model


def filled_cache(model: LanguageModel, length: int, concatenates: bool) -> ModelCache:
    """As after reading `length` tokens."""
    cache = ModelCache(model)
    for store in cache.stores:
        if concatenates:
            store.keys = tuple(Concatenating(-2) for _ in store.keys)
            store.value = Concatenating(-2)
        keys = [torch.randn(1, part.heads, length, part.width) for part in store.layout.keys]
        store.append(keys, torch.randn(1, store.layout.value.heads, length, store.layout.value.width))
        store.forget()
    return cache


def decoding(name: str, context: int, rounds: int) -> tuple[Callable[[], None], ModelCache]:
    """One step of decoding, and its cache."""
    attention, concatenates = VARIANTS[name]
    model = build(attention, context)
    cache = filled_cache(model, context - rounds - 1, concatenates)
    token = torch.zeros(1, 1, dtype=torch.long)

    def step() -> None:
        model(token, cache=cache)

    return step, cache


def prefill(name: str) -> Callable[[], None]:
    """Reading a prompt into an empty cache."""
    attention, _ = VARIANTS[name]
    model, tokens = build(attention, PREFILL), torch.randint(96, (1, PREFILL))
    return lambda: model(tokens, use_cache=True, logits_to_keep=1) and None


def interleaved(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, in turn; the first of each is not timed."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            samples[name].append(time.perf_counter() - start)
    return samples


def measure_speed(contexts: list[int], rounds: int) -> dict[str, Any]:
    """Decoding at each context, and prefill."""
    decode = {}
    for context in contexts:
        made = {name: decoding(name, context, rounds) for name in VARIANTS}
        samples = interleaved({name: step for name, (step, _) in made.items()}, rounds)
        sizes = {name: {"key bytes": cache.key_bytes, "bytes": cache.nbytes} for name, (_, cache) in made.items()}
        decode[context] = {"seconds": samples, "cache": sizes}
    names = [name for name in VARIANTS if name != "standard, DynamicCache"]
    return {"decode": decode, "prefill": interleaved({name: prefill(name) for name in names}, max(2, rounds // 10))}


def measure_memory(tokens: int, every: int) -> dict[str, list[list[int]]]:
    """`[token, bytes of level 1 and values, bytes of all]` as a small model writes, for each attention."""
    grown: dict[str, list[list[int]]] = {}
    for attention in ("standard", MLR):
        torch.manual_seed(0)
        model = LanguageModel(LanguageModelConfig(**SMALL, attention=attention)).eval()
        cache, token, rows = ModelCache(model), torch.zeros(1, 1, dtype=torch.long), []
        for index in range(1, tokens + 1):
            token = model(token, cache=cache).logits[:, -1:].argmax(-1)
            if index % every == 0:
                growing = sum(store.keys[0].nbytes + store.value.nbytes for store in cache.stores)
                rows.append([index, growing, cache.nbytes])
        grown[attention] = rows
    return grown


def draw_memory(grown: dict[str, list[list[int]]], path: Path) -> None:
    """Bytes of the cache against tokens written."""
    with styled():
        figure = new_figure(5.2, 3.2)
        axes = figure.add_subplot()
        for attention, rows in grown.items():
            axes.plot([row[0] / 1e3 for row in rows], [row[2] / 2**20 for row in rows], label=attention)
        rows = grown[MLR]
        axes.plot(
            [row[0] / 1e3 for row in rows], [row[1] / 2**20 for row in rows], ":", label=f"{MLR}: level 1 and values"
        )
        axes.set(xlabel="thousands of tokens written", ylabel="MiB in the cache, keys and values", xlim=(0, None))
        axes.set_ylim(0, None)
        axes.legend(frameon=False)
        figure.savefig(path, dpi=160)


def page(document: dict[str, Any]) -> str:
    """The Markdown page."""
    facts, speed = document["machine"], document["speed"]
    base, mlr = "standard, DynamicCache", f"{MLR}, compressed cache"
    lines = [
        "# Generation with the compressed key cache",
        "",
        f"{facts['cpu']}, {facts['threads']} threads pinned to {facts['pinning']}, {', '.join(facts['instructions'])}; "
        f"torch {facts['torch']}, commit {facts['commit'][:12]}, {facts['time']}. Load average "
        f"{facts['load_average_before'][0]:.1f} before.",
        "",
        f"Language model of {SIZES['layers']} layers, width {SIZES['dim']}, {SIZES['heads']} heads of 64, rotary, "
        "float32, one row, blocks that halve the context seven times and are almost full. Milliseconds per token "
        f"written, medians of interleaved steps; in parentheses times the speed of `{base}`.",
        "",
        "| tokens in the cache | " + " | ".join(VARIANTS) + " | key cache, MiB | keys and values, MiB |",
        "|---" * (len(VARIANTS) + 3) + "|",
    ]
    for context, row in speed["decode"].items():
        medians = {name: statistics.median(row["seconds"][name]) for name in VARIANTS}
        cells = [f"{1e3 * median:.2f} ({medians[base] / median:.2f})" for median in medians.values()]
        sizes = row["cache"]
        for kind in ("key bytes", "bytes"):
            whole, small = sizes[base][kind] / 2**20, sizes[mlr][kind] / 2**20
            cells.append(f"{whole:.1f} → {small:.1f} ({whole / small:.2f})")
        lines.append(f"| {context:,} | " + " | ".join(cells) + " |")
    prefilled = {name: statistics.median(times) for name, times in speed["prefill"].items()}
    standard = prefilled["standard, cache in place"]
    read = ", ".join(f"{name.split(',')[0]} {seconds:.2f} s" for name, seconds in prefilled.items())
    lines += ["", f"Reading a prompt of {PREFILL:,} tokens: {read} ({standard / prefilled[mlr]:.2f} times the speed)."]
    lines += ["", "## Memory", "", "![cache against tokens](generation-cpu-memory.png)", ""]
    first, last = document["memory"][MLR][0], document["memory"][MLR][-1]
    lines += [
        f"A model of one layer and one head of 64, blocks of 512 and less, writes {last[0]:,} tokens. Beyond level 1 "
        f"and the values its cache holds {(last[2] - last[1]) / 2**10:.0f} KiB at the end, "
        f"{(first[2] - first[1]) / 2**10:.0f} KiB at token {first[0]:,}.",
        "",
        "Made by `python -m benchmarks.generation`.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16_384])
    parser.add_argument("--rounds", type=int, default=40, help="timed steps of each kind")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens written for the memory figure")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder for JSON, Markdown and figure")
    options = parser.parse_args()
    machine.pin_threads("benchmarks.generation")
    facts = machine.facts()
    with torch.inference_mode():
        speed = measure_speed(options.contexts, options.rounds)
        memory = measure_memory(options.tokens, max(1, options.tokens // 200))
    document = {"machine": facts, "sizes": SIZES, "speed": speed, "memory": memory}
    (options.out / "generation-cpu.json").write_text(json.dumps(document, indent=1) + "\n")
    draw_memory(memory, options.out / "generation-cpu-memory.png")
    text = page(document)
    (options.out / "generation-cpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
