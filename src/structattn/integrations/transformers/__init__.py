"""Provide MLR attention in models of Hugging Face transformers.

Importing this registers the attention implementation `structattn_mlr` and its mask.

- `set_hierarchy` switches a model to MLR attention with given levels.
- `make_cache` makes a cache for `generate` that keeps only the keys and values that a later query reads.
- `measure_order` orders dimensions by their energy in the scores of far tokens.
- `balance` puts the most score energy into the first dimensions of heads without a rotary embedding.
- `balance_values` changes the basis of values, so that far tokens need only the first dimensions::

    set_hierarchy(model, "16|16|32v@w512|128")
    model.generate(**inputs, cache=make_cache(model))

A model is served if its attention layers call the attention interface with queries, keys and values of one width, and
if masks are causal, sliding windows or absent. Llama, Qwen2, Qwen3, Mistral, Gemma, Gemma 3, GPT-2 and T5 are tested.
Gemma 2 is not served: it caps its scores. Attention weights are never computed, so none can be returned.
"""

from __future__ import annotations

from structattn import checks

checks.require("transformers", "hf")

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402

from structattn.integrations.transformers.attention import mlr_attention_forward  # noqa: E402
from structattn.integrations.transformers.balancing import balance, far_moments  # noqa: E402
from structattn.integrations.transformers.energy import far_energy, measure_order  # noqa: E402
from structattn.integrations.transformers.hierarchies import get_hierarchy, set_hierarchy  # noqa: E402
from structattn.integrations.transformers.layers import IMPLEMENTATION  # noqa: E402
from structattn.integrations.transformers.masks import mlr_mask  # noqa: E402
from structattn.integrations.transformers.transformers_cache import MLRCache, make_cache  # noqa: E402
from structattn.integrations.transformers.value_basis import balance_values, far_value_moments  # noqa: E402
from structattn.layers.deprecation import serve_old_names  # noqa: E402

__all__ = [
    "IMPLEMENTATION",
    "MLRCache",
    "balance",
    "balance_values",
    "far_energy",
    "far_moments",
    "far_value_moments",
    "get_hierarchy",
    "make_cache",
    "measure_order",
    "set_hierarchy",
]

__getattr__ = serve_old_names(__name__, {"measure_moments": "far_moments"})

AttentionInterface.register(IMPLEMENTATION, mlr_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, mlr_mask)
