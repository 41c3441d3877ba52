"""The layers every test runs over: one of each kind, in float64, for a model 16 wide with 4 heads of 4."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from structattn.layers import Attention, build_attention

DIM, HEADS, CONTEXT = 16, 4, 16

SPELLINGS = [
    "standard",
    "standard:1",
    "standard+qk_norm=false+scale=1/r",
    "swa:3",
    "gswa:3|2",
    "mlr",
    "mlr:2|1|1",
    "mlr+paper",
    "mlr:2|1|1+paper",
    "mlr:1x4+paper+gains=none+level_weight=1/sqrt(r_l)",
    "mlr:1|1|2+windows=7|3+value_ranks=1|2|1+gains=mean",
    "mlr:3|1+windows=9|2+value_ranks=4|0",
    "mlr:2|1|1+block_sizes=*|8|4+value_ranks=1|0|3+gains=mean",
    "mlr:1|2+windows=5+value_ranks=2|4",
    "mlr:3|1v1|3@w20|5+3",
    "lowrank",
    "lowrank:3+norm=none",
    "bmlr:3|2|1",
    "btt",
    "btt:2+norm=none",
    "btt+side=query",
    "btt+side=split",
    "monarch",
    "kronecker",
    "butterfly",
]
ROTARY = ["standard", "swa:3", "gswa:3|2", "mlr:2|2", "mlr:2|2+windows=3+value_ranks=1|3", "lowrank", "btt"]

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
"""What `tests/tolerance.py` allows in float64."""

each_kind = pytest.mark.parametrize("spelling", SPELLINGS)


def build(spelling: str, *, seed: int = 0, **options: Any) -> Attention:
    """Return the layer in float64, with gains of norms drawn too.

    A lost gain then shows.
    """
    generator = torch.Generator().manual_seed(seed)
    options = {"dtype": torch.float64, "generator": generator} | options
    layer = build_attention(spelling, DIM, HEADS, CONTEXT, **options)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "norm" in name:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype))
    return layer


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
