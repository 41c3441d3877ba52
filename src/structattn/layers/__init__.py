"""Provide attention layers, and the configs and grammar that name them."""

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
from structattn.layers.deprecation import serve_old_names
from structattn.layers.factory import build_attention
from structattn.layers.grammar import as_config, parse_attention
from structattn.layers.interface import Attention
from structattn.layers.kv_cache import CacheLayout, CacheSlice, KeyValueCache, Retention
from structattn.layers.mlr import MLRAttention
from structattn.layers.norm import DegenerateNormWarning
from structattn.layers.options import StandardKernel
from structattn.layers.ranks import default_ranks, default_windows, paper_ranks
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
    "CacheSlice",
    "DegenerateNormWarning",
    "GlobalSlidingWindowAttention",
    "GlobalSlidingWindowConfig",
    "KeyValueCache",
    "KroneckerConfig",
    "LowRankConfig",
    "MLRAttention",
    "MLRConfig",
    "MonarchConfig",
    "Retention",
    "RotaryEmbedding",
    "SlidingWindowAttention",
    "SlidingWindowConfig",
    "StandardAttention",
    "StandardConfig",
    "StandardKernel",
    "as_config",
    "build_attention",
    "config_from_dict",
    "default_ranks",
    "default_windows",
    "paper_ranks",
    "parse_attention",
]

__getattr__ = serve_old_names(__name__, {"CachePart": "CacheSlice", "Reach": "Retention"})
