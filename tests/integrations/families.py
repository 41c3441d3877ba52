"""Tiny randomly initialised models of each family, and inputs for them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.tolerance import assert_calibrated

Gradients = dict[str, Tensor]
VOCABULARY, WIDTH, HEAD = 50, 32, 8
_ROTARY_SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD,
    "max_position_embeddings": 256,
}
_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}

ROTARY = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3")
DECODERS = (*ROTARY, "gpt2")
FAMILIES = (*DECODERS, "t5")
SLIDING = {
    "mistral": {},
    "gemma3": {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": HEAD},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 0},
}
"""Families whose layers may have a native sliding window, and the fields that give one to some layers."""


def make(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: object) -> torch.nn.Module:
    """Return a model whose weights are so large that the whole context counts."""
    torch.manual_seed(seed)
    if family == "gpt2":
        sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}
        model = GPT2LMHeadModel(GPT2Config(**sizes | _TOKENS | fields))
    elif family == "t5":
        sizes = {"d_model": WIDTH, "d_kv": HEAD, "num_heads": 4, "num_layers": 2, "d_ff": 64, "initializer_factor": 1.5}
        model = T5ForConditionalGeneration(T5Config(**sizes | _TOKENS | {"decoder_start_token_id": 1} | fields))
    else:
        config, causal = {
            "gemma": (GemmaConfig, GemmaForCausalLM),
            "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
            "llama": (LlamaConfig, LlamaForCausalLM),
            "mistral": (MistralConfig, MistralForCausalLM),
            "qwen2": (Qwen2Config, Qwen2ForCausalLM),
            "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        }[family]
        # Sliding windows are longer than any sequence here unless a test asks for another.
        sliding = {"sliding_window": 128} | SLIDING[family] if family in ("mistral", "gemma3") else {}
        model = causal(config(**_ROTARY_SIZES | _TOKENS | {"initializer_range": 0.2} | sliding | fields))
    return model.to(dtype).eval()


def tokens(batch: int = 2, length: int = 21, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def mask(padding: str, batch: int = 2, length: int = 21) -> Tensor | None:
    """Return a mask that pads the rows by 5 and 2 at one end, or None."""
    if padding == "none":
        return None
    real = torch.ones(batch, length, dtype=torch.long)
    for row, count in zip(range(batch), (5, 2), strict=False):
        columns = slice(0, count) if padding == "left" else slice(length - count, length)
        real[row, columns] = 0
    return real


def inputs(family: str, padding: str = "none") -> dict[str, Tensor]:
    """Return arguments of `forward`; T5 has one text to read and another to write."""
    x, real = tokens(), mask(padding)
    given = {"input_ids": x} | ({} if real is None else {"attention_mask": real})
    if family == "t5":
        given["decoder_input_ids"] = tokens(length=18, seed=1)
    return given


def real_logits(model: torch.nn.Module, given: dict[str, Tensor]) -> Tensor:
    """Return logits at real tokens, `(N, V)`; T5's decoder has no padding here."""
    logits = model(**given).logits
    real = given.get("attention_mask")
    return logits.flatten(0, 1) if real is None or "decoder_input_ids" in given else logits[real.bool()]


def gradients(model: torch.nn.Module, given: dict[str, Tensor]) -> Gradients:
    """Return gradients, by parameter, of a fixed weighted sum of the logits at real tokens."""
    model.zero_grad()
    logits = real_logits(model, given)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (logits * weight.to(logits.dtype)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_calibrated_gradients(actual: Gradients, exact: Gradients, plain: Gradients) -> None:
    """Compare all gradients at once, each over its largest entry.

    One alone may be exact by luck.
    """
    assert actual.keys() == exact.keys() == plain.keys()
    scales = {name: float(grad.abs().max()) or 1.0 for name, grad in exact.items()}
    flat = [torch.cat([grads[name].flatten() / scales[name] for name in exact]) for grads in (actual, exact, plain)]
    assert_calibrated(*flat, "gradients")
