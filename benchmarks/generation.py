"""Compare generation with compressed and standard caches: `python -m benchmarks.generation`.

*Speed.* A model decodes token by token near the end of its context, where every block is almost full and the compressed
cache is largest. MLR attention uses its own cache. Standard attention (PyTorch's SDPA) uses two: one that concatenates,
like transformers' `DynamicCache`, and this package's, which grows in place. Caches hold random numbers, since their
values do not change the time. The variants are timed in turn.

*Levels.* The same with levels by window in keys and values, for one row and for several, in a model of this project and
in a Llama of transformers, against standard caches that are filled in place.

*Memory.* A small model writes a long text; the bytes of its cache are recorded on the way.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from benchmarks import machine
from benchmarks.output import describe_machine, table, write_json
from benchmarks.timing import sample_warm
from structattn.drawing.style import new_figure, styled
from structattn.integrations.transformers import IMPLEMENTATION, MLRCache, make_cache, set_hierarchy
from structattn.integrations.transformers.layers import DECODER, attention_layers
from structattn.layers import MLRConfig, parse_attention
from structattn.layers.kv_cache.growing_buffer import GrowingBuffer
from structattn.models import LanguageModel, LanguageModelConfig, ModelCache
from structattn.models.generation_cache import GenerationCache
from structattn.models.transformers_internals import CACHE, attention_implementation

MLR = "mlr:8x8+paper"
NEAR = str(MLRConfig((16, 16, 32), windows=(None, 512, 128), value_ranks=(16, 16, 32)))
SIZES: dict[str, Any] = {"layers": 4, "dim": 512, "heads": 8, "positions": "rotary"}
SMALL = {"layers": 1, "dim": 64, "heads": 1, "positions": "rotary", "context_length": 1024}
PREFILL = 4096


class Concatenating(GrowingBuffer):
    """A buffer that concatenates at every step, as transformers' `DynamicLayer` does."""

    def append(self, entries: torch.Tensor) -> None:
        """Copy old and new entries into a new tensor."""
        self._storage = entries if self._storage is None else torch.cat([self._storage, entries], dim=self.axis)
        self.end += entries.shape[self.axis]


BASELINE = "standard, DynamicCache"
VARIANTS: dict[str, tuple[str, bool]] = {
    BASELINE: ("standard", True),
    "standard, cache in place": ("standard", False),
    f"{MLR}, compressed cache": (MLR, False),
}
"""Attention of each variant, and True if its cache concatenates."""

STANDARD, LEVELS = "standard, cache in place", "levels, compressed cache"
LLAMA_STANDARD, LLAMA_LEVELS = "Llama, StaticCache", "Llama, levels, compressed cache"
LEVELS_VARIANTS = {STANDARD: "standard", LEVELS: NEAR, LLAMA_STANDARD: "standard", LLAMA_LEVELS: NEAR}
"""Attention of each variant; each standard one comes before the one that it is compared with."""


def build(attention: str, context: int, sizes: Mapping[str, Any] = SIZES) -> LanguageModel:
    """Return a model without zero weights.

    Matrices that would start at zero are random, too.
    """
    torch.manual_seed(0)
    config = LanguageModelConfig(**sizes, context_length=context, attention=attention, standard_kernel="torch")
    model = LanguageModel(config).eval()
    for block in model.backbone.layers:
        torch.nn.init.normal_(block.attention.out_proj.weight, std=0.02)
        torch.nn.init.normal_(block.mlp.contract.weight, std=0.02)
    return model


def filled_cache(model: LanguageModel, length: int, concatenates: bool, rows: int = 1) -> ModelCache:
    """Return a cache of random numbers, as large as after `length` tokens."""
    cache = ModelCache(model)
    for store in cache.stores:
        if concatenates:
            store.keys = tuple(Concatenating(-2) for _ in store.keys)
            store.values = tuple(Concatenating(-2) for _ in store.values)
        keys, values = (
            [
                torch.randn(rows, part.heads, length, part.width, device=model.device, dtype=model.dtype)
                for part in slices
            ]
            for slices in (store.layout.keys, store.layout.values)
        )
        store.append(keys, values)
        store.forget()
    return cache


def decoding(
    attention: str, concatenates: bool, context: int, rounds: int, rows: int = 1
) -> tuple[Callable[[], None], ModelCache]:
    """Return a function that decodes a token per row, and its cache."""
    model = build(attention, context)
    cache = filled_cache(model, context - rounds - 1, concatenates, rows)
    token = torch.zeros(rows, 1, dtype=torch.long)

    def step() -> None:
        model(token, cache=cache)

    return step, cache


def llama_decoding(attention: str, context: int, rounds: int, rows: int) -> tuple[Callable[[], None], Cache]:
    """Return what `model_decoding` does, for a Llama with random weights."""
    torch.manual_seed(0)
    dim, heads, layers = SIZES["dim"], SIZES["heads"], SIZES["layers"]
    sizes = {
        "hidden_size": dim,
        "intermediate_size": 4 * dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=96, max_position_embeddings=context)).eval()
    if attention != "standard":
        set_hierarchy(model, parse_attention(attention).hierarchy(dim // heads, context))
    return model_decoding(model, context, rounds, rows)


def model_decoding(model: PreTrainedModel, context: int, rounds: int, rows: int) -> tuple[Callable[[], None], Cache]:
    """Return a function that decodes a token per row, and its cache.

    The model is of transformers. The cache is filled with random numbers. Standard attention has a `StaticCache`, which
    is filled in place.
    """
    levels = attention_implementation(model.config) == IMPLEMENTATION
    cache = make_cache(model) if levels else StaticCache(config=model.config, max_cache_len=context)
    for layer in attention_layers(model)[DECODER]:
        keys, values = torch.randn(2, rows, layer.key_heads, context - rounds - 1, layer.width)
        cache.update(keys, values, layer.index)
    if isinstance(cache, MLRCache):
        for store in cache.stores:
            store.forget()
    token = torch.zeros(rows, 1, dtype=torch.long)

    def step() -> None:
        model(token, **{CACHE: cache})

    return step, cache


def cache_bytes(cache: Cache) -> int:
    """Return the bytes of a cache, room for growth included."""
    if isinstance(cache, GenerationCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def prefill(name: str) -> Callable[[], None]:
    """Return a function that reads a prompt into an empty cache."""
    attention, _ = VARIANTS[name]
    model, tokens = build(attention, PREFILL), torch.randint(96, (1, PREFILL))
    return lambda: model(tokens, use_cache=True, logits_to_keep=1) and None


def measure_speed(contexts: list[int], rounds: int) -> dict[str, Any]:
    """Time decoding at each context, and prefill."""
    decode = {}
    for context in contexts:
        made = {name: decoding(*variant, context, rounds) for name, variant in VARIANTS.items()}
        samples = sample_warm({name: step for name, (step, _) in made.items()}, rounds)
        sizes = {name: {"key bytes": cache.key_bytes, "bytes": cache.nbytes} for name, (_, cache) in made.items()}
        decode[context] = {"seconds": samples, "cache": sizes}
    names = [name for name in VARIANTS if name != BASELINE]
    return {"decode": decode, "prefill": sample_warm({name: prefill(name) for name in names}, max(2, rounds // 10))}


def measure_levels(context: int, batches: list[int], rounds: int) -> dict[str, Any]:
    """Time decoding with levels by window for each number of rows.

    Measure the caches, too. Keys and values both have levels.
    """
    measured = {}
    for rows in batches:
        made = {
            name: llama_decoding(attention, context, rounds, rows)
            if name in (LLAMA_STANDARD, LLAMA_LEVELS)
            else decoding(attention, False, context, rounds, rows)
            for name, attention in LEVELS_VARIANTS.items()
        }
        samples = sample_warm({name: step for name, (step, _) in made.items()}, rounds)
        measured[rows] = {"seconds": samples, "bytes": {name: cache_bytes(cache) for name, (_, cache) in made.items()}}
    return {"attention": NEAR, "context": context, "rows": measured}


def measure_memory(tokens: int, every: int) -> dict[str, list[list[int]]]:
    """Record the bytes of the cache while a small model writes.

    Returns:
        By attention, rows of `[tokens written, bytes of level 1 and its values, bytes of the cache]`.
    """
    grown: dict[str, list[list[int]]] = {}
    for attention in ("standard", MLR, NEAR):
        torch.manual_seed(0)
        model = LanguageModel(LanguageModelConfig(**SMALL, attention=attention, standard_kernel="torch")).eval()
        cache, token, rows = ModelCache(model), torch.zeros(1, 1, dtype=torch.long), []
        for index in range(1, tokens + 1):
            token = model(token, cache=cache).logits[:, -1:].argmax(-1)
            if index % every == 0:
                growing = sum(store.keys[0].nbytes + store.values[0].nbytes for store in cache.stores)
                rows.append([index, growing, cache.nbytes])
        grown[attention] = rows
    return grown


def draw_memory(grown: dict[str, list[list[int]]], path: Path) -> None:
    """Plot the bytes of the cache against the tokens written."""
    labels = {MLR: "8x8, blocks, in keys", NEAR: "16|16|32, windows, in keys and values"}
    with styled():
        figure = new_figure(6.2, 3.6)
        axes = figure.add_subplot()
        for attention, rows in grown.items():
            label = labels.get(attention, attention)
            axes.plot([row[0] / 1e3 for row in rows], [row[2] / 2**20 for row in rows], label=label)
        for attention in labels:
            label = "level 1 and its values alone" if attention == NEAR else None
            places, sizes = (
                [row[column] / unit for row in grown[attention]] for column, unit in ((0, 1e3), (1, 2**20))
            )
            axes.plot(places, sizes, ":", color="black", label=label)
        axes.set(xlabel="thousands of tokens written", ylabel="MiB in the cache, keys and values", xlim=(0, None))
        axes.set_ylim(0, None)
        axes.legend(frameon=False)
        figure.savefig(path, dpi=160)


def page(document: dict[str, Any]) -> str:
    """Return the Markdown page."""
    speed, mlr = document["speed"], f"{MLR}, compressed cache"
    prefilled = {name: machine.median(times) for name, times in speed["prefill"].items()}
    standard = prefilled["standard, cache in place"]
    read = ", ".join(f"{name.split(',')[0]} {seconds:.2f} s" for name, seconds in prefilled.items())
    first, last = document["memory"][MLR][0], document["memory"][MLR][-1]
    lines = [
        "# Generation with the compressed key cache",
        "",
        describe_machine(document["machine"]),
        "",
        f"The language model has {SIZES['layers']} layers, width {SIZES['dim']}, {SIZES['heads']} heads of 64 and "
        "rotary positions. It writes one row in float32. Blocks halve the context seven times and are almost full. "
        "Times are ms per token, medians of interleaved steps. In parentheses: the speed over that of "
        f"`{BASELINE}`. Cache sizes are those of standard attention → MLR attention, and their ratio.",
        "",
        *table(
            ["tokens in the cache", *VARIANTS, "key cache, MiB", "keys and values, MiB"],
            [_speed_row(int(context), row) for context, row in speed["decode"].items()],
        ),
        "",
        f"Reading a prompt of {PREFILL:,} tokens: {read} ({standard / prefilled[mlr]:.2f} times the speed).",
        "",
        "## Memory",
        "",
        "![Size of the cache against tokens](generation-cpu-memory.png)",
        "",
        f"A model of one layer and one head of 64, with blocks of at most 512, writes {last[0]:,} tokens. Beside level "
        f"1 and the values, its cache holds {(last[2] - last[1]) / 2**10:.0f} KiB at the end and "
        f"{(first[2] - first[1]) / 2**10:.0f} KiB at token {first[0]:,}.",
        "",
        *(_levels_section(document["levels"], document["memory"][NEAR]) if "levels" in document else []),
        "Written by `python -m benchmarks.generation`.",
        "",
    ]
    return "\n".join(lines)


def _levels_section(levels: dict[str, Any], grown: list[list[int]]) -> list[str]:
    """Return the lines on levels by window in keys and values."""
    half, last = grown[(len(grown) - 1) // 2], grown[-1]
    tokens = max(last[0] - half[0], 1)
    return [
        "## Levels by window, in keys and values",
        "",
        f"The attention is `{levels['attention']}`, with {levels['context']:,} tokens in the cache. Times are ms per "
        "step of all rows. Standard caches are filled in place. In parentheses: the speed over that of the standard "
        "cache in the column before.",
        "",
        *table(
            ["rows", *LEVELS_VARIANTS, "cache, MiB", "share of the standard cache"],
            [_levels_row(int(rows), row) for rows, row in levels["rows"].items()],
        ),
        "",
        f"The model of one layer and one head writes {last[0]:,} tokens. In the second half its cache grows by "
        f"{(last[2] - half[2]) / tokens:.0f} bytes per token, of which level 1 and its values are "
        f"{(last[1] - half[1]) / tokens:.0f}.",
        "",
    ]


def _levels_row(rows: int, row: dict[str, Any]) -> list[str]:
    """Return the cells of one number of rows: times, cache size and its share."""
    cells, standard = [str(rows)], 0.0
    for name in LEVELS_VARIANTS:
        median = machine.median(row["seconds"][name])
        speed = "" if name in (STANDARD, LLAMA_STANDARD) else f" ({standard / median:.2f})"
        cells.append(f"{1e3 * median:.2f}{speed}")
        standard = median
    small, whole = row["bytes"][LEVELS], row["bytes"][STANDARD]
    return [*cells, f"{whole / 2**20:.1f} → {small / 2**20:.1f}", f"{small / whole:.1%}"]


def _speed_row(context: int, row: dict[str, Any]) -> list[str]:
    """Return the cells of one context: times and cache sizes."""
    medians = {name: machine.median(row["seconds"][name]) for name in VARIANTS}
    cells = [f"{1e3 * median:.2f} ({medians[BASELINE] / median:.2f})" for median in medians.values()]
    for kind in ("key bytes", "bytes"):
        whole, small = (row["cache"][name][kind] / 2**20 for name in (BASELINE, f"{MLR}, compressed cache"))
        cells.append(f"{whole:.1f} → {small:.1f} ({whole / small:.2f})")
    return [f"{context:,}", *cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16_384])
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1, 8], help="rows decoded together, with levels by window"
    )
    parser.add_argument("--rounds", type=int, default=40, help="timed steps of each kind")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens written for the memory figure")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder for JSON, Markdown and figure")
    options = parser.parse_args()
    machine.pin_threads("benchmarks.generation")
    facts = machine.facts()
    with torch.inference_mode():
        speed = measure_speed(options.contexts, options.rounds)
        levels = measure_levels(options.contexts[-1], options.rows, options.rounds)
        memory = measure_memory(options.tokens, max(1, options.tokens // 200))
    document = {"machine": facts, "sizes": SIZES, "speed": speed, "levels": levels, "memory": memory}
    write_json(document, options.out / "generation-cpu.json")
    draw_memory(memory, options.out / "generation-cpu-memory.png")
    text = page(document)
    (options.out / "generation-cpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
