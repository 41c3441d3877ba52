"""The how-to page's snippets run, in their order, on a tiny model."""

import re
from pathlib import Path
from types import SimpleNamespace

import torch

from integrations.families import make, tokens

ROOT = Path(__file__).parents[2]


def test_snippets_of_the_page_on_transformers(tmp_path):
    make("llama").save_pretrained(tmp_path / "model")
    page = (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8").replace("path/to/", f"{tmp_path}/")
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    tokenizer = lambda text, return_tensors: SimpleNamespace(input_ids=tokens(1, 30))  # noqa: E731
    names = {"tokenizer": tokenizer, "calibration_ids": tokens(2, 40)}
    for snippet in snippets:
        exec(compile(snippet, "docs/transformers.md", "exec"), names)
    assert names["text"].shape == (1, 50)
    assert round(names["share"], 2) == 0.28
    assert names["model"].config._attn_implementation == "structattn_mlr"
    assert torch.isfinite(names["model"](tokens()).logits).all()


def test_snippet_of_the_page_on_retrofitting():
    page = (ROOT / "docs" / "retrofit.md").read_text(encoding="utf-8")
    model = make("gpt2")
    names = {"model": model, "calibration_ids": tokens(2, 40)}
    for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(snippet, "docs/retrofit.md", "exec"), names)
    assert model.config._attn_implementation == "structattn_mlr"
    assert torch.isfinite(model(tokens()).logits).all()
