"""Turn padding masks into key ranges and biases.

A mask that MLR attention cannot honour is refused, never dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from structattn.ops.torch_internals import assert_later


def mlr_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    *,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """Return the mask `(B, Tk)`, true for real keys; None without padding.

    The signature is that of transformers' mask functions.

    Args:
        batch_size: `B`.
        q_length: queries `Tq`.
        kv_length: keys `Tk`, including those in the cache.
        q_offset: index of the first query among the keys.
        kv_offset: index of the first key.
        mask_function: returns whether a pair is visible.
        attention_mask: `(B, Tk)`, false for padding.
        local_size: size of the window or chunk that `mask_function` leaves visible.
        use_vmap: True if the model or its user added to `mask_function`.
        device: device of the positions.

    Raises:
        ValueError: sliding windows, packed sequences, masks of another form, static caches.
    """
    if isinstance(q_offset, Tensor) or kv_offset:
        raise ValueError("MLR attention does not serve static or sliding caches: use make_cache(model) or DynamicCache")
    if local_size is not None:
        check_window(local_size, kv_length)
    if use_vmap:
        raise ValueError("MLR attention does not serve masks that add a function to the causal one")
    if mask_function is causal_mask_function and kv_length != q_offset + q_length:
        raise ValueError(
            f"queries must be the last of the tokens; got {q_length} queries from index {q_offset} on and {kv_length} "
            "keys: MLR attention serves neither static caches nor prefixes before the tokens"
        )
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        _check_causal(mask_function, batch_size, q_length, q_offset, device)
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch_size, kv_length):
        raise ValueError(
            f"attention_mask must have the shape (B, Tk) = {(batch_size, kv_length)}, the tokens in the cache "
            f"included, got {tuple(attention_mask.shape)}"
        )
    real = attention_mask.bool()
    # Keys of another stack: `kv_length` may be the mask's own length, which the attention function checks.
    # In a compiled graph: whether any key is padding depends on data.
    if (mask_function is bidirectional_mask_function and kv_length != q_length) or torch.compiler.is_compiling():
        return real
    return None if bool(real.all()) else real


def check_window(window: int, key_length: int) -> None:
    """Raise ValueError unless a sliding window covers all keys."""
    if key_length > window:
        raise ValueError(
            f"MLR attention sees every key, but the model has a window of {window} tokens, got {key_length}; turn the "
            "window off in the model's config (`sliding_window=None`)"
        )


def _check_causal(
    mask_function: Callable[..., Any], batch_size: int, q_length: int, q_offset: int, device: torch.device | str
) -> None:
    """Raise ValueError unless every token sees the previous one and not the next."""
    rows = torch.arange(batch_size, device=device)[:, None]
    at = torch.arange(q_offset, q_offset + q_length, device=device)
    sees_before = mask_function(rows, 0, at[1:], at[:-1])
    sees_after = mask_function(rows, 0, at[:-1], at[1:])
    check_all(
        torch.as_tensor(sees_before & ~sees_after),
        "MLR attention serves causal masks alone: got one that hides a token from the next (several sequences packed "
        "into a row, by position_ids that restart) or shows it a later one",
    )


def check_all(condition: Tensor, message: str) -> None:
    """Raise ValueError where a condition fails; asynchronously on an accelerator or in a compiled graph."""
    if torch.compiler.is_compiling() or condition.device.type != "cpu":
        assert_later(condition.all(), message)
    elif not bool(condition.all()):
        raise ValueError(message)


def visible_keys(mask: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return bounds of each row's real keys, and a bias masking holes.

    A row without a real key has an empty range at its end: a left-padded row that is read in chunks begins like this.

    Args:
        mask: `(B, Tk)`, true for real keys.

    Returns:
        `key_start` and `key_end (B,)`, and a bias `(B, 1, 1, Tk)`, minus infinity at padding between real keys; None
        where there is no such padding.

    Raises:
        RuntimeError: in a compiled graph, a row has padding between real keys; the graph has no branch for it.
    """
    length = mask.shape[1]
    some = mask.any(dim=1)
    start = torch.where(some, mask.int().argmax(dim=1), length)
    end = torch.where(some, length - mask.int().flip(1).argmax(dim=1), length)
    places = torch.arange(length, device=mask.device)
    hidden = (places >= start[:, None]) & (places < end[:, None]) & ~mask
    if torch.compiler.is_compiling():
        check_all(~hidden, "attention_mask must have one run of ones in every row of a compiled model, got holes")
    elif bool(hidden.any()):
        return start, end, torch.zeros(hidden.shape, device=mask.device).masked_fill(hidden, -torch.inf)[:, None, None]
    return start, end, None
