"""Check the arguments that attention ops share."""

from __future__ import annotations

import torch
from torch import Tensor

from structattn.ops.hierarchy import Hierarchy
from structattn.ops.torch_internals import assert_later

CallTensors = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""Query, key, value, bias, `key_start` and `key_end` of a call of `mlr_attention`."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool) -> None:
    """Check dtype, device and shapes of query, key and value. Raise TypeError or ValueError."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_operand(name, tensor)
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on the query's device {query.device}, got {tensor.device}")
        if tensor.dtype != query.dtype and not _autocast_unifies(tensor, query):
            raise TypeError(f"{name} must have the query's dtype {query.dtype}, got {tensor.dtype}")
    (batch, heads, _, rank), (_, key_heads, _, _) = query.shape, key.shape
    if key.shape[0] != batch or key.shape[3] != rank:
        raise ValueError(
            f"key must have the query's batch and width: expected (B, Hkv, Tk, r) = ({batch}, Hkv, Tk, {rank}), "
            f"got {tuple(key.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value must be (B, Hkv, Tk, dv) as key is {tuple(key.shape)}, got {tuple(value.shape)}")
    if key_heads != heads and not enable_gqa:
        raise ValueError(f"key must have the query's {heads} heads unless enable_gqa=True, got {key_heads}")
    if rank == 0:
        raise ValueError(f"query must have a width of at least 1, got shape {tuple(query.shape)}")
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"key heads must divide the query's {heads} heads, got {key_heads}")


def check_operand(name: str, tensor: Tensor) -> None:
    """Check that `tensor` is floating and has four axes. Raise TypeError or ValueError."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dim() != 4:
        raise ValueError(f"{name} must have four axes (B, H, T, width), got shape {tuple(tensor.shape)}")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def _autocast_unifies(tensor: Tensor, query: Tensor) -> bool:
    """Return True if autocast will bring both to one dtype. It casts neither float64 nor integers."""
    low = (torch.float16, torch.bfloat16, torch.float32)
    return torch.is_autocast_enabled(query.device.type) and tensor.dtype in low and query.dtype in low


def check_query_offset(query_offset: int, query_length: int, key_length: int) -> None:
    """Check that `query_offset` is an integer from 0 to `Tk - Tq`. Raise TypeError or ValueError."""
    if isinstance(query_offset, bool) or not isinstance(query_offset, (int, torch.SymInt)):
        raise TypeError(f"query_offset must be an integer, got {query_offset!r} ({type(query_offset).__name__})")
    if not 0 <= query_offset <= max(key_length - query_length, 0):
        raise ValueError(
            f"query_offset must be between 0 and {max(key_length - query_length, 0)} (Tk - Tq): no query may "
            f"stand past the keys; got {query_offset} with Tq = {query_length}, Tk = {key_length}"
        )


def check_hierarchy(hierarchy: Hierarchy, query: Tensor, value: Tensor | None = None) -> None:
    """Check that the hierarchy's ranks fit query and value. Raise TypeError or ValueError."""
    if not isinstance(hierarchy, Hierarchy):
        raise TypeError(f"hierarchy must be a structattn.Hierarchy, got {type(hierarchy).__name__}")
    if hierarchy.rank != query.shape[3]:
        raise ValueError(
            f"hierarchy's ranks must sum to the query's width {query.shape[3]}, "
            f"got {'|'.join(map(str, hierarchy.ranks))} = {hierarchy.rank}"
        )
    if value is not None:
        hierarchy.value_widths(value.shape[3])


def bias_with_four_axes(bias: Tensor, query: Tensor, key_length: int) -> Tensor:
    """Return `bias` as `(B or 1, Hq or 1, Tq or 1, Tk or 1)`.

    Raises:
        TypeError, ValueError: dtype, device or shape do not fit.
    """
    if not isinstance(bias, Tensor):
        raise TypeError(f"attn_bias must be a tensor, got {type(bias).__name__}")
    if bias.dtype not in (query.dtype, torch.float32) and not _autocast_unifies(bias, query):
        hint = "; turn a mask into a bias by torch.where(mask, 0.0, -torch.inf)" if bias.dtype == torch.bool else ""
        wanted = " or ".join(map(str, dict.fromkeys((query.dtype, torch.float32))))
        raise TypeError(f"attn_bias must be {wanted}, got {bias.dtype}{hint}")
    if bias.device != query.device:
        raise ValueError(f"attn_bias must be on the query's device {query.device}, got {bias.device}")
    shape = (*query.shape[:3], key_length)
    wide = bias[(None,) * (4 - bias.dim())] if bias.dim() <= 4 else bias
    if wide.dim() != 4 or any(have not in (1, want) for have, want in zip(wide.shape, shape, strict=True)):
        raise ValueError(f"attn_bias must broadcast to (B, Hq, Tq, Tk) = {shape}, got {tuple(bias.shape)}")
    return wide


def check_key_bound(name: str, bound: Tensor | None, query: Tensor) -> Tensor | None:
    """Return `bound` as int64 `(B,)`, checked against the query's batch and device."""
    if bound is None:
        return None
    if not isinstance(bound, Tensor) or bound.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {getattr(bound, 'dtype', type(bound).__name__)}")
    if bound.shape != query.shape[:1]:
        raise ValueError(f"{name} must have one entry per row, ({query.shape[0]},), got {tuple(bound.shape)}")
    if bound.device != query.device:
        raise ValueError(f"{name} must be on the query's device {query.device}, got {bound.device}")
    return bound.to(torch.int64).contiguous()  # Kernels read one number after another.


def check_key_bounds(start: Tensor | None, end: Tensor | None, key_length: int) -> None:
    """Raise unless 0 <= key_start <= key_end <= Tk in every row.

    It reads numbers, so it runs inside the operator. On an accelerator it queues a device-side assertion, since waiting
    for the numbers would stall the device. In a compiled graph, where there are no numbers yet, it does the same.

    Raises:
        ValueError: on a CPU, naming the row.
        RuntimeError: elsewhere, later.
    """
    given = start if start is not None else end
    if given is None:
        return
    start = torch.zeros_like(given) if start is None else start
    end = torch.full_like(given, key_length) if end is None else end
    valid = (start >= 0) & (start <= end) & (end <= key_length)
    if torch.compiler.is_compiling() or valid.device.type != "cpu":
        assert_later(valid.all(), f"expected 0 <= key_start <= key_end <= Tk = {key_length} in every row")
    elif not valid.all():
        row = int((~valid).nonzero()[0])
        raise ValueError(
            f"expected 0 <= key_start <= key_end <= Tk = {key_length} in every row, "
            f"got key_start = {int(start[row])}, key_end = {int(end[row])} in row {row}"
        )
