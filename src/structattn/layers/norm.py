"""LayerNorm on the slices of a head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LevelNorm(nn.Module):
    """LayerNorm on consecutive slices of the last axis; with one slice, `nn.LayerNorm(width, bias=False)`.

    The gain is shared by heads and there is no shift: the layers have no biases, and a shift of all keys adds the same
    number to a query's whole row of scores, which softmax does not see.

    Args:
        widths: widths of the slices, normalised one by one.
        device: where the gain lives.
        dtype: its dtype.
    """

    eps = 1e-5

    def __init__(
        self, widths: Sequence[int], *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.weight = nn.Parameter(torch.ones(sum(self.widths), device=device, dtype=dtype))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Gain 1."""
        self.weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """`x (..., sum(widths))`, each slice with mean 0 and variance 1, times the gain."""
        if len(self.widths) == 1:
            return F.layer_norm(x, self.widths, self.weight, eps=self.eps)
        slices = zip(x.split(self.widths, -1), self.weight.split(self.widths), strict=True)
        return torch.cat([F.layer_norm(part, part.shape[-1:], gain, eps=self.eps) for part, gain in slices], -1)

    def extra_repr(self) -> str:
        """The widths."""
        return "|".join(map(str, self.widths))
