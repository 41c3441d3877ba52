"""Cache the keys and values of an attention layer.

**What is kept.** Each layer describes its cache by a `CacheLayout`: one or more `CacheSlice` of the keys and of the
values. A slice is a number of heads, a width, and a `Retention`.

| layer | key slices | values |
|---|---|---|
| standard | all keys | all |
| sliding window | last `window` keys | last `window` values |
| global + sliding window | the first `g` dimensions of all keys; the rest for the last `window` tokens | all |
| MLR | level `l` of the keys in the current block of `b_l` positions, or of the last `w_l` keys | the same |
| bilinear, query side | one input vector `y` (width `D`), shared by all heads; two norm statistics per head | all |
| bilinear, other sides | all keys | all |

With sinks, MLR attention also keeps the first `s` tokens of each row, whole (`SinkTokens`).

**How long.** `Retention` gives the oldest index that the next query reads: 0, the start of its block, or the start of
its window. Blocks start at each row's first real token. A batch keeps the union of what its rows need.
`KeyValueCache.forget` drops everything older.

**Who reads it.** `Attention.forward` (`layers/interface.py`) appends the new tokens, calls the layer's `attend_cached`,
and then `forget`. MLR attention reads its slices with `attend_mlr_cache` (`mlr_cache.py`), which also serves models of
transformers. `models/generation_cache.py` wraps one `KeyValueCache` for each layer as the `Cache` of transformers that
`generate` uses.

**Where the numbers lie.** Each slice is a `GrowingBuffer`: one tensor with spare room. It is copied when it is full and
when many tokens have been dropped. MLR keys are stored dimension-major, `(B, heads, width, T)`: a decoding step then
reads one stream for each dimension.
"""

from structattn.layers.kv_cache.growing_buffer import GrowingBuffer
from structattn.layers.kv_cache.key_value_cache import KeyValueCache, to_autocast_dtype
from structattn.layers.kv_cache.layout import CacheLayout, CacheSlice, Retention
from structattn.layers.kv_cache.mlr_cache import attend_mlr_cache, mlr_cache_layout

__all__ = [
    "CacheLayout",
    "CacheSlice",
    "GrowingBuffer",
    "KeyValueCache",
    "Retention",
    "attend_mlr_cache",
    "mlr_cache_layout",
    "to_autocast_dtype",
]
