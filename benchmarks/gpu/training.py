"""Part 3: train and generate on the card, and hold losses and tokens to those of the CPU.

A model of each kind takes the same steps from the same weights on the card in float32, on the CPU in float32 and on the
CPU in float64, which is the truth. The card's losses may err at most twice as much as the CPU's in float32, whose
rounding differs by kernel: two of them calibrate. Then both continue a text greedily, with the compressed cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.models import loss_of
from benchmarks.gpu.setup import Setup, auto_means, compile_times, kernels_serve
from benchmarks.gpu.workers import Job, Stage
from benchmarks.output import Row
from structattn.models import LanguageModel, LanguageModelConfig

SECONDS = 120.0
"""Time of the part on a card."""
VOCABULARY = 96


@dataclass(frozen=True)
class Run:
    """A small model, how long it trains, and what it writes."""

    kind: str  # "language model" or "Llama"
    attention: str
    context: int = 256
    layers: int = 2
    heads: int = 2
    head_dim: int = 64
    batch: int = 2
    steps: int = 12
    prompt: int = 100
    written: int = 60

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


RUNS = [
    Run("language model", "mlr"),
    Run("language model", "mlr:8x8+paper"),
    Run("Llama", "mlr:16|16|32v@w*|128|32"),
]


def stages(setup: Setup, document: Row) -> list[Stage]:
    """Return a job for each run."""
    return [Stage([_job(run) for run in (map(_tiny, RUNS[::2]) if setup.rehearse else RUNS)], min(3, setup.processes))]


def _tiny(run: Run) -> Run:
    tiny = replace(run, context=32, layers=1, heads=1, batch=1, steps=3, prompt=10, written=4, head_dim=16)
    return replace(tiny, attention=run.attention if run.attention == "mlr" else "mlr:8|8v@w*|8")


def _job(run: Run) -> Job:
    return Job(f"{run.kind}, {run.attention}", compare, (run,), {"inputs": str(run)}, limit=200.0)


def compare(setup: Setup, run: Run) -> Iterator[Row]:
    """Yield losses on card and CPU, then the tokens that both write."""
    torch.manual_seed(0)
    model = build(run)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def losses(device: str, dtype: torch.dtype, serving: AbstractContextManager[None]) -> list[float]:
        model.to(device, dtype).load_state_dict(weights)
        with serving:
            return train(model, run)

    exact = losses("cpu", torch.float64, auto_means("reference"))
    plain = [losses("cpu", torch.float32, auto_means(backend)) for backend in ("reference", "tiled")]
    with compile_times() as kernels:
        actual = losses(setup.device, torch.float32, kernels_serve(setup))
    yield _losses_row(exact, plain, actual) | {"kernels": kernels}
    yield written_alike(model.to("cpu", torch.float32), run, setup)


def build(run: Run) -> nn.Module:
    """Return the model of a run, on the CPU in float32."""
    if run.kind == "language model":
        sizes: dict[str, Any] = {"layers": run.layers, "dim": run.dim, "heads": run.heads, "positions": "rotary"}
        return LanguageModel(LanguageModelConfig(**sizes, context_length=run.context, attention=run.attention))
    from transformers import LlamaConfig, LlamaForCausalLM

    from structattn.integrations.transformers import set_hierarchy
    from structattn.layers import MLRConfig, parse_attention

    sizes = {"hidden_size": run.dim, "intermediate_size": 2 * run.dim, "num_hidden_layers": run.layers}
    heads = {"num_attention_heads": run.heads, "num_key_value_heads": max(1, run.heads // 2), "head_dim": run.head_dim}
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens, max_position_embeddings=run.context))
    config = parse_attention(run.attention)
    if not isinstance(config, MLRConfig):
        raise TypeError(f"a Llama takes the levels of MLR attention, got {run.attention}")
    set_hierarchy(model, config.hierarchy(run.head_dim, run.context))
    return model


def train(model: nn.Module, run: Run) -> list[float]:
    """Take the steps of a run and return the loss of each."""
    parameter = next(model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    found: list[Tensor] = []
    for step in range(run.steps):
        tokens = text(run.batch, run.context + 1, seed=step).to(parameter.device)
        loss = loss_of(model.train(), tokens, torch.float32)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found).tolist()


def text(rows: int, length: int, seed: int) -> Tensor:
    """Return tokens with something to learn: each row counts on by a step of its own, with a tenth of noise."""
    generator = torch.Generator().manual_seed(seed)
    start, step = (torch.randint(1, VOCABULARY, (rows, 1), generator=generator) for _ in range(2))
    counted = (start + (step % 7 + 1) * torch.arange(length)) % VOCABULARY
    noise = torch.randint(VOCABULARY, counted.shape, generator=generator)
    return torch.where(torch.rand(counted.shape, generator=generator) < 0.1, noise, counted)


def _losses_row(exact: list[float], plain: list[list[float]], actual: list[float]) -> Row:
    """Return the losses and the first step with too large an error.

    Errors grow from step to step, as each step starts from weights that differ: the largest error of the CPU up to a
    step counts, and that of the next step, too, since one run may be a step ahead.
    """
    errors = [max(abs(run[at] - exact[at]) for run in plain) for at in range(len(exact))]
    reasons = []
    for at, loss in enumerate(actual):
        allowed = 2 * (max(errors[: at + 2]) + torch.finfo(torch.float32).eps * abs(exact[at]))
        if not abs(loss - exact[at]) <= allowed:
            reasons.append(f"loss of step {at}: error {abs(loss - exact[at]):.2g}, allowed {allowed:.2g}")
    row: Row = {"kind": "training", "exact": exact, "cpu": plain, "losses": actual}
    largest = max(abs(a - b) for a, b in zip(actual, exact, strict=True))
    row["shown"] = {
        "loss": f"{actual[0]:.3f} to {actual[-1]:.3f}",
        "error": f"{largest:.1e}",
        "CPU": f"{max(errors):.1e}",
    }
    return row | ({"reason": reasons[0]} if reasons else {})


def written_alike(model: nn.Module, run: Run, setup: Setup) -> Row:
    """Return the tokens that card and CPU write from the same weights.

    Both use the compressed cache. They may differ only where the truth is a tie: where float64 tells the two tokens
    apart by less than twice what float32 on the CPU changes in a logit.
    """
    model = model.eval()
    prompt = text(1, run.prompt, seed=10_000)
    with torch.no_grad():
        by_cpu = generate(model, prompt, run)
        with kernels_serve(setup):
            by_card = generate(model.to(setup.device), prompt.to(setup.device), run).cpu()
        model = model.to("cpu")
        row: Row = {"kind": "generation", "cpu_tokens": by_cpu.tolist(), "tokens": by_card.tolist()}
        same = by_cpu == by_card
        row["shown"] = {"tokens alike": f"{int(same.sum())} of {len(same)}"}
        if same.all():
            return row
        at = int((~same).nonzero()[0])
        read = torch.cat([prompt[0], by_cpu[:at]])[None]
        plain, exact = model(read).logits[0, -1], model.double()(read).logits[0, -1]
    gap = float((exact[by_cpu[at]] - exact[by_card[at]]).abs())
    allowed = 2 * float((plain - exact).abs().max())
    row["first_difference"] = {"at": at, "gap": gap, "allowed": allowed}
    reason = f"token {at} is {int(by_card[at])}, the CPU's {int(by_cpu[at])}: {gap:.2g} apart, a tie is {allowed:.2g}"
    return row if gap <= allowed else row | {"reason": reason}


def generate(model: nn.Module, prompt: Tensor, run: Run) -> Tensor:
    """Return the likeliest tokens after the prompt, with the compressed cache."""
    from structattn.models.transformers_internals import CACHE

    if isinstance(model, LanguageModel):
        from structattn.models import ModelCache

        cache: Any = ModelCache(model)
    else:
        from structattn.integrations.transformers import make_cache

        cache = make_cache(model)
    found, token = [], prompt
    for _ in range(run.written):
        token = model(token, **{CACHE: cache}).logits[:, -1:].argmax(-1)
        found.append(token)
    return torch.cat(found, 1)[0]


def conclude(document: dict[str, Any]) -> None:
    """Name the cases that failed."""
    document["failed"] = [f"{row['case']}: {row.get('kind', 'run')}" for row in document["rows"] if "reason" in row]
