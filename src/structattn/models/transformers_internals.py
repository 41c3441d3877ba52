"""Bridge versions of transformers and its private names.

No other module asks which version of transformers is installed.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import transformers
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

CacheT = TypeVar("CacheT")

CACHE = "cache" if any(f.name == "cache" for f in dataclasses.fields(CausalLMOutputWithPast)) else "past_key_values"
"""Keyword of the key-value cache in models, in `generate` and in outputs: `cache` from transformers 5.24 on."""


def one_cache(cache: CacheT | None, past_key_values: CacheT | None) -> CacheT | None:
    """Return the cache that was given under either name.

    Raises:
        ValueError: two different caches were given.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two names of one argument: give one of them")
    return past_key_values if cache is None else cache


def prepares_cache() -> bool:
    """Return True if `generate` calls a model's `_prepare_cache_for_generation`."""
    return hasattr(GenerationMixin, "_prepare_cache_for_generation")


def mark_as_given(cache: Cache) -> None:
    """Mark a cache as the caller's: `generate` leaves it ready to go on."""
    cache._is_user_defined = True


def attention_implementation(config: Any) -> str | None:
    """Return the attention implementation that a model's config names, or None.

    Raises:
        RuntimeError: this version of transformers keeps it elsewhere.
    """
    if not hasattr(config, "_attn_implementation"):
        raise RuntimeError(
            f"transformers {transformers.__version__} does not say which attention a model has "
            "(config._attn_implementation is missing): install a version that `structattn info` lists as tested"
        )
    name: str | None = config._attn_implementation
    return name


def set_attention_implementation(model: PreTrainedModel, name: str | None) -> None:
    """Set the attention implementation of a model and its parts.

    Before transformers 5.20 `model.set_attn_implementation` skips inner models whose config is a copy of the outer
    model's, such as encoder and decoder of T5.
    """
    model.set_attn_implementation(name)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and attention_implementation(part.config) != name:
            part.set_attn_implementation(name)
