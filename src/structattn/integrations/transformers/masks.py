"""Turn padding masks and sliding windows into key ranges and biases.

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
    kv_length: int | Tensor,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    *,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """Return the mask `(B, Tk)`, true for real keys; None without padding.

    A sliding window that hides keys is the size of a third axis, `(B, Tk, window)`, and `(B, 0, window)` without
    padding. The attention function checks that the layer has this window. The third axis takes no memory. Its size is 0
    where a cache dropped keys that the mask leaves visible: models make such masks, and no layer may use one. The
    signature is that of transformers' mask functions.

    Args:
        batch_size: `B`.
        q_length: queries `Tq`.
        kv_length: keys `Tk`, including those in the cache.
        q_offset: index of the first query, counted from the first token.
        kv_offset: index of the first key; caches of sliding layers drop the keys before it.
        mask_function: returns whether a pair is visible.
        attention_mask: `(B, kv_offset + Tk)`, false for padding.
        local_size: size of the window or chunk that `mask_function` leaves visible.
        use_vmap: True if the model or its user added to `mask_function`.
        device: device of the positions.

    Raises:
        ValueError: chunks, packed sequences, masks of another form, static caches.
    """
    if isinstance(kv_length, Tensor) or isinstance(kv_offset, Tensor):
        # Sliding caches of transformers 5.17 count in tensors once assisted decoding has taken tokens back.
        q_offset, kv_length, kv_offset = int(q_offset), int(kv_length), int(kv_offset)
    if isinstance(q_offset, Tensor):
        raise ValueError("MLR attention does not serve static caches: use make_cache(model) or DynamicCache")
    if use_vmap:
        raise ValueError("MLR attention does not serve masks that add a function to the causal one")
    tokens = kv_offset + kv_length
    if (mask_function is causal_mask_function or local_size is not None) and tokens != q_offset + q_length:
        raise ValueError(
            f"queries must be the last of the tokens; got {q_length} queries from index {q_offset} on and {tokens} "
            "keys: MLR attention serves neither static caches nor prefixes before the tokens"
        )
    window = 0 if kv_offset else None
    if local_size is not None and tokens > local_size:
        window = local_size
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        queries = range(q_offset, q_offset + q_length)
        _check_causal(mask_function, batch_size, queries, kv_offset, window, device)
    real = _real_keys(attention_mask, batch_size, tokens, kv_offset)
    # Keys of another stack: `kv_length` may be the mask's own length, which the attention function checks.
    # In a compiled graph: whether any key is padding depends on data.
    cross = mask_function is bidirectional_mask_function and kv_length != q_length
    if real is not None and not cross and not torch.compiler.is_compiling() and bool(real.all()):
        real = None
    if window is None:
        return real
    real = torch.empty(batch_size, 0, dtype=torch.bool, device=device) if real is None else real
    return real[:, :, None].expand(-1, -1, window)


def _real_keys(attention_mask: Tensor | None, batch_size: int, tokens: int, kv_offset: int) -> Tensor | None:
    """Return `(B, Tk)`, true for real keys that the cache still holds."""
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch_size, tokens):
        raise ValueError(
            f"attention_mask must have the shape (B, Tk) = {(batch_size, tokens)}, the tokens in the cache "
            f"included, got {tuple(attention_mask.shape)}"
        )
    return attention_mask[:, kv_offset:].bool()


def split_window(mask: Tensor | None, passed: int | None, key_length: int) -> tuple[Tensor | None, int | None]:
    """Return the mask `(B, Tk)` of real keys and the window.

    The window is the one that hides keys. Each is None where there is none.

    Args:
        mask: from `mlr_mask`.
        passed: the window that the layer passes to its attention function.
        key_length: keys that the layer passes.

    Raises:
        ValueError: mask and layer disagree about the window.
    """
    window = mask.shape[2] if mask is not None and mask.dim() == 3 else None
    if window != passed and (window is not None or (passed is not None and key_length > passed)):
        raise ValueError(
            f"mask and layer must have one sliding window, got {window} in the mask and {passed} from the layer, which "
            f"passes {key_length} keys (0 in the mask: its cache dropped keys that the layer sees)"
        )
    if mask is None or window is None:
        return mask, None
    return (mask[:, :, 0] if mask.shape[1] else None), window


def _check_causal(
    mask_function: Callable[..., Any],
    batch_size: int,
    queries: range,
    kv_offset: int,
    window: int | None,
    device: torch.device | str,
) -> None:
    """Raise ValueError unless a mask is causal, with the given window.

    It asks for the pairs of neighbours and for those at the window's edge.
    """
    rows = torch.arange(batch_size, device=device)[:, None]

    def sees(distance: int) -> Tensor:
        """Return True for each query that sees the key `distance` before it."""
        start, stop = max(queries.start, kv_offset + distance), queries.stop + min(distance, 0)
        at = torch.arange(start, max(start, stop), device=device)
        return torch.as_tensor(mask_function(rows, 0, at, at - distance))

    expected = {-1: False, window - 1: True, window: False} if window else {-1: False, 1: True}
    check_all(
        torch.cat([(sees(distance) == visible).flatten() for distance, visible in expected.items()]),
        "MLR attention serves causal masks and sliding windows alone: got a mask that hides a token from the next "
        "(several sequences packed into a row, by position_ids that restart; chunks) or shows it a later one",
    )


def check_all(condition: Tensor, message: str) -> None:
    """Raise ValueError where a condition fails.

    On an accelerator or in a compiled graph it raises later.
    """
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
