"""The key-value cache of an attention layer: what is kept, how long, and who reads it.

**What is kept.** Each layer describes its cache by a `CacheLayout`: one or more `CacheSlice` of keys and one of values.
A slice is a number of heads, a width, and a `Retention`.

| layer | key slices | values |
|---|---|---|
| standard | all keys | all |
| sliding window | keys of the last `window` tokens | of the last `window` tokens |
| global + sliding window | the first `g` dimensions of all keys; the rest for the last `window` tokens | all |
| MLR | level 1 of all keys; level `l >= 2` of the keys in the current block of `b_l` positions | all |
| bilinear, contracted on the query side | one vector `y` for all heads, and two norm statistics for each head | all |
| bilinear, on another side | all keys | all |

**How long.** `Retention` gives the oldest token that the next query still reads: the first of the sequence, of the
query's block, or of its window. Blocks are counted from the first real token of a row, so a batch keeps what its rows
need together. `KeyValueCache.forget` drops everything older.

**Who reads it.** `Attention.forward` (`layers/interface.py`) appends the new tokens, calls the layer's `attend_cached`,
and then `forget`. MLR attention reads its slices with `attend_mlr_cache` (`mlr_cache.py`), which also serves models of
transformers. `models/generation_cache.py` wraps one `KeyValueCache` for each layer as the `Cache` of transformers that
`generate` uses.

**Where the numbers lie.** Each slice is a `GrowingBuffer`: one tensor with spare room, which is copied when it is full
and when tokens are dropped. MLR keys are stored dimension-major, `(B, heads, width, T)`: a decoding step then reads one
stream for each dimension.
"""

from structattn.layers.kv_cache.growing_buffer import GrowingBuffer
from structattn.layers.kv_cache.key_value_cache import KeyValueCache, in_autocast_dtype
from structattn.layers.kv_cache.layout import CacheLayout, CacheSlice, Retention
from structattn.layers.kv_cache.mlr_cache import attend_mlr_cache, mlr_cache_layout

__all__ = [
    "CacheLayout",
    "CacheSlice",
    "GrowingBuffer",
    "KeyValueCache",
    "Retention",
    "attend_mlr_cache",
    "in_autocast_dtype",
    "mlr_cache_layout",
]
