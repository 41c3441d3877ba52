"""Attention layers behind one face, and the configs and grammar that name them."""

from structattn.layers.attention_configs import (
    KINDS,
    AttentionConfig,
    BilinearConfig,
    BilinearMLRConfig,
    BTTConfig,
    ButterflyConfig,
    GlobalSlidingWindowConfig,
    KroneckerConfig,
    LowRankConfig,
    MLRConfig,
    MonarchConfig,
    SlidingWindowConfig,
    StandardConfig,
    config_from_dict,
)
from structattn.layers.bilinear import BilinearAttention
from structattn.layers.factory import build_attention
from structattn.layers.grammar import as_config, parse_attention
from structattn.layers.interface import Attention
from structattn.layers.kv_cache.key_value_cache import CacheLayout, CachePart, KeyValueCache, Reach
from structattn.layers.mlr import MLRAttention
from structattn.layers.ranks import default_ranks
from structattn.layers.rotary import RotaryEmbedding
from structattn.layers.sliding import GlobalSlidingWindowAttention, SlidingWindowAttention
from structattn.layers.standard import StandardAttention

__all__ = [
    "KINDS",
    "Attention",
    "AttentionConfig",
    "BTTConfig",
    "BilinearAttention",
    "BilinearConfig",
    "BilinearMLRConfig",
    "ButterflyConfig",
    "CacheLayout",
    "CachePart",
    "GlobalSlidingWindowAttention",
    "GlobalSlidingWindowConfig",
    "KeyValueCache",
    "KroneckerConfig",
    "LowRankConfig",
    "MLRAttention",
    "MLRConfig",
    "MonarchConfig",
    "Reach",
    "RotaryEmbedding",
    "SlidingWindowAttention",
    "SlidingWindowConfig",
    "StandardAttention",
    "StandardConfig",
    "as_config",
    "build_attention",
    "config_from_dict",
    "default_ranks",
    "parse_attention",
]
