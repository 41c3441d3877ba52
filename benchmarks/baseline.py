"""Compare standard attention here with nanoGPT: `python -m benchmarks.baseline --data FOLDER --out baseline.json`.

This checks that "standard" is a fair baseline. Two models of one size read the same windows in the same order for the
same number of steps. One is this package's model with standard attention, trained by its own loop. The other is
transformers' GPT-2, trained by nanoGPT's recipe for characters: tied head, deviation 0.02 with residual outputs divided
by sqrt(2 · layers), AdamW with betas 0.9 and 0.99, weight decay 0.1 on matrices, 100 steps of warm-up, cosine to a
tenth of the peak, gradients clipped at 1, no dropout (https://github.com/karpathy/nanoGPT, train.py and
config/train_shakespeare_char.py). Both are evaluated on the same held-out set.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.output import write_json
from structattn.comparison.environment import environment
from structattn.models import LanguageModel, LanguageModelConfig
from structattn.tasks import LanguageConfig, LanguageTask
from structattn.tasks.characters import VOCABULARY
from structattn.training import TrainConfig, train
from structattn.training.evaluation import evaluate, predict

_WARMUP_STEPS = 100
_FINAL_RATE = 0.1


def train_ours(options: argparse.Namespace, task: LanguageTask) -> dict[str, Any]:
    """Train this package's model by its own loop.

    Saves it if `--keep` names a folder.
    """
    torch.manual_seed(options.seed)
    sizes = {"layers": options.layers, "dim": options.dim, "heads": options.heads, "positions": options.positions}
    model = LanguageModel(LanguageModelConfig(**sizes, context_length=task.context_length, standard_kernel="torch"))
    config = TrainConfig(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        precision=options.precision,
        evaluation_interval=options.steps,
    )
    with tempfile.TemporaryDirectory() as folder:
        result = train(model, lambda total_steps: task, config, Path(folder))
    if options.keep:
        model.save_pretrained(options.keep)
    return _row("structattn", model, result.seconds, evaluate(model, task, options.batch_size), options.learning_rate)


def train_peer(options: argparse.Namespace, task: LanguageTask) -> dict[str, Any]:
    """Train GPT-2 by nanoGPT's recipe on the same windows."""
    torch.manual_seed(options.seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(VOCABULARY),
            n_positions=task.context_length,
            n_embd=options.dim,
            n_layer=options.layers,
            n_head=options.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=options.peer_learning_rate, betas=(0.9, 0.99))
    start = time.perf_counter()
    for step in track(range(options.steps), description="GPT-2, nanoGPT's recipe"):
        for group in optimiser.param_groups:
            group["lr"] = options.peer_learning_rate * _nanogpt_factor(step, options.steps)
        batch = task.batch(step, options.batch_size)
        task.loss(predict(model, batch, options.precision), batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - start
    metrics = evaluate(model, task, options.batch_size)
    return _row("GPT-2, nanoGPT's recipe", model, seconds, metrics, options.peer_learning_rate)


def _nanogpt_factor(step: int, steps: int) -> float:
    if step < _WARMUP_STEPS:
        return (step + 1) / (_WARMUP_STEPS + 1)
    done = (step - _WARMUP_STEPS) / (steps - _WARMUP_STEPS)
    return _FINAL_RATE + (1 - _FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done))


def _row(
    name: str, model: torch.nn.Module, seconds: float, metrics: dict[str, Any], learning_rate: float
) -> dict[str, Any]:
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "learning rate": learning_rate,
        "seconds of training": round(seconds, 1),
        "validation loss": metrics["nats_per_character"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--context-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--positions", choices=["learned", "rotary"], default="learned")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--peer-learning-rate", type=float, default=2e-3)
    parser.add_argument("--precision", choices=["float32", "bfloat16", "auto"], default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", nargs="+", choices=["ours", "peer"], default=["ours", "peer"])
    parser.add_argument("--keep", type=Path, help="folder to save this package's trained model in")
    parser.add_argument("--out", type=Path, help="where to write the JSON; otherwise it is printed")
    options = parser.parse_args()
    task = LanguageTask(LanguageConfig(options.data, options.context_length), seed=options.seed)
    recipes = {"ours": train_ours, "peer": train_peer}
    rows = [recipes[name](options, task) for name in options.models]
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "keep", "data")}
    settings |= {"data": task.corpus.name, "threads": torch.get_num_threads()}
    write_json({"environment": environment(), "settings": settings, "models": rows}, options.out)


if __name__ == "__main__":
    main()
