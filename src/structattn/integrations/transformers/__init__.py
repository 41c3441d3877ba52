"""MLR attention inside the models of Hugging Face transformers.

Importing this registers the attention implementation `structattn_mlr` and its mask. `set_hierarchy` gives a model its
levels and switches it over; `make_cache` makes the key cache that `generate` needs to keep no more keys than a later
query reads; `measure_order` says which dimensions far pairs use most; `balance` gives heads without a rotary embedding
the basis in which the fewest dimensions carry the scores::

    set_hierarchy(model, "32|16|8|8@1024")
    model.generate(**inputs, cache=make_cache(model))

Any model serves whose attention layers call the attention interface with queries, keys and values of one width, all
causal or all seeing everything: tested are Llama, Qwen2, Qwen3, GPT-2 and T5. Attention weights are not computed, so
that there are none to return.
"""

from __future__ import annotations

from structattn import checks

checks.require("transformers", "hf")

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402

from structattn.integrations.transformers.attention import mlr_attention_forward  # noqa: E402
from structattn.integrations.transformers.balancing import balance, measure_moments  # noqa: E402
from structattn.integrations.transformers.energy import far_energy, measure_order  # noqa: E402
from structattn.integrations.transformers.hierarchies import get_hierarchy, set_hierarchy  # noqa: E402
from structattn.integrations.transformers.layers import IMPLEMENTATION  # noqa: E402
from structattn.integrations.transformers.masks import mlr_mask  # noqa: E402
from structattn.integrations.transformers.transformers_cache import MLRCache, make_cache  # noqa: E402

__all__ = [
    "IMPLEMENTATION",
    "MLRCache",
    "balance",
    "far_energy",
    "get_hierarchy",
    "make_cache",
    "measure_moments",
    "measure_order",
    "set_hierarchy",
]

AttentionInterface.register(IMPLEMENTATION, mlr_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, mlr_mask)
