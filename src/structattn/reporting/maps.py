"""Map the width of every pair's dot product, by structure."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from structattn.drawing.pairs import sampled_positions
from structattn.layers import (
    GlobalSlidingWindowConfig,
    MLRConfig,
    SlidingWindowConfig,
    StandardConfig,
    parse_attention,
)
from structattn.ops import Hierarchy


def pair_widths(structure: str, sizes: Mapping[str, int]) -> NDArray[np.int64] | None:
    """Return the inner width of every pair of positions, query by key.

    Args:
        structure: spelling of an attention structure.
        sizes: `dim`, `heads` and `context_length` of the model.

    Returns:
        `(C, C)`, a cell for each of `sampled_positions(context_length)`; None if a structure has no such map. Masks
        are not applied.
    """
    config = parse_attention(structure)
    length = sizes["context_length"]
    head_dim = sizes["dim"] // sizes["heads"]
    at = torch.from_numpy(sampled_positions(length))
    query, key = at[:, None], at[None, :]
    match config:
        case StandardConfig(heads=heads):
            width = torch.full((len(at), len(at)), sizes["dim"] // (heads or sizes["heads"]))
        case MLRConfig():
            hierarchy: Hierarchy = config.hierarchy(head_dim, length)
            width = torch.tensor((0, *hierarchy.prefix_ranks))[hierarchy.depth(query, key)]
        case SlidingWindowConfig(window=window):
            width = head_dim * ((query - key).abs() < window).long()
        case GlobalSlidingWindowConfig(window=window, global_rank=global_rank):
            width = global_rank + (head_dim - global_rank) * ((query - key).abs() < window).long()
        case _:
            return None
    return width.numpy()
