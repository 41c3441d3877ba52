"""Count the FLOPs of a T5 by formula."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import T5Config

from structattn import checks
from structattn.flops import Flops, attention, linear
from structattn.ops.hierarchy import Hierarchy


def t5_flops(
    config: T5Config,
    hierarchies: Mapping[str, Sequence[Hierarchy]],
    encoder_length: int,
    decoder_length: int,
    batch: int = 1,
) -> Flops:
    """Return the FLOPs of a pass forward and backward on unpadded rows.

    Only matrix products count, as everywhere in `structattn.flops`: look-ups, norms and the position bias are free.
    Masked pairs do not count.

    Args:
        config: sizes of the model.
        hierarchies: of each layer's self-attention, `{"encoder": …, "decoder": …}`, from `get_hierarchy`.
        encoder_length: tokens that the encoder reads.
        decoder_length: tokens that the decoder writes.
        batch: rows.

    Raises:
        TypeError, ValueError: a length is not a positive integer.
    """
    for name, value in (("encoder_length", encoder_length), ("decoder_length", decoder_length), ("batch", batch)):
        checks.positive_int(name, value)
    flat, total = Hierarchy.flat(config.d_kv), Flops(0, 0)
    for hierarchy in hierarchies["encoder"]:
        total += _attention(config, hierarchy, encoder_length, encoder_length, batch, is_causal=False)
        total += _feed_forward(config, batch * encoder_length)
    for hierarchy in hierarchies["decoder"]:
        total += _attention(config, hierarchy, decoder_length, decoder_length, batch, is_causal=True)
        total += _attention(config, flat, decoder_length, encoder_length, batch, is_causal=False)
        total += _feed_forward(config, batch * decoder_length)
    return total + linear(config.d_model, config.vocab_size, batch * decoder_length)


def _attention(
    config: T5Config, hierarchy: Hierarchy, queries: int, keys: int, batch: int, *, is_causal: bool
) -> Flops:
    """Return the FLOPs of projections and attention, `queries` tokens to `keys`."""
    inner = config.num_heads * config.d_kv
    projections = 2 * linear(config.d_model, inner, batch * queries) + 2 * linear(config.d_model, inner, batch * keys)
    scores = attention(hierarchy, config.d_kv, queries, keys, heads=config.num_heads, batch=batch, is_causal=is_causal)
    return projections + scores


def _feed_forward(config: T5Config, tokens: int) -> Flops:
    matrices = 3 if config.is_gated_act else 2
    return matrices * linear(config.d_model, config.d_ff, tokens)
