"""The how-to page's snippets run, in their order, on a tiny model."""

from types import SimpleNamespace

import torch

from integrations.families import make, tokens
from snippets import snippets_of


def test_snippets_of_the_page_on_transformers(tmp_path):
    make("llama").save_pretrained(tmp_path / "model")
    snippets = [snippet.replace("path/to/", f"{tmp_path}/") for snippet in snippets_of("docs/transformers.md")]
    tokenizer = lambda text, return_tensors: SimpleNamespace(input_ids=tokens(1, 30))  # noqa: E731
    names = {"tokenizer": tokenizer, "calibration_ids": tokens(2, 40)}
    for snippet in snippets:
        exec(compile(snippet, "docs/transformers.md", "exec"), names)
    assert names["text"].shape == (1, 50)
    assert round(names["share"], 2) == 0.28
    assert names["model"].config._attn_implementation == "structattn_mlr"
    assert torch.isfinite(names["model"](tokens()).logits).all()


def test_snippet_of_the_page_on_retrofitting():
    model = make("gpt2")
    names = {"model": model, "calibration_ids": tokens(2, 40)}
    for snippet in snippets_of("docs/retrofit.md"):
        exec(compile(snippet, "docs/retrofit.md", "exec"), names)
    assert model.config._attn_implementation == "structattn_mlr"
    assert torch.isfinite(model(tokens()).logits).all()
