"""LayerNorm on the slices of a head."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DegenerateNormWarning(UserWarning):
    """A LayerNorm over two numbers or fewer, whose gradient is zero almost everywhere."""


def warn_of_degenerate_norm(widths: Sequence[int], remedy: str) -> None:
    """Warn if a LayerNorm of these widths cannot learn.

    Over one number it gives 0. Over two it gives `±d / sqrt(d² + ε)`, `d` half of their difference: signs, but for `d`
    below some `sqrt(ε) = 0.003`. It is a warning, since a saved model must load; a new run refuses it.

    Args:
        widths: numbers that each norm runs over.
        remedy: setting of the layer that avoids it, for the message.
    """
    if min(widths) > 2:
        return
    text = "|".join(map(str, widths))
    warnings.warn(
        f"LayerNorm needs at least 3 numbers to learn, got {text}: over two it is a sign function, over one it is 0, "
        f"and its gradient is zero almost everywhere; {remedy}",
        DegenerateNormWarning,
        stacklevel=3,
    )


class LevelNorm(nn.Module):
    """LayerNorm on consecutive slices of the last axis.

    With one slice it is `nn.LayerNorm(width, bias=False)`. Heads share the gain. There is no shift: a shift of all keys
    adds the same number to all scores of a query, which softmax does not see.

    Args:
        widths: widths of the slices, each normalised alone.
        device: of the gain.
        dtype: of the gain.
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
        """Set the gain to 1."""
        self.weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each slice of `x (..., sum(widths))`, then multiply by the gain."""
        if len(self.widths) == 1:
            return F.layer_norm(x, self.widths, self.weight, eps=self.eps)
        slices = zip(x.split(self.widths, -1), self.weight.split(self.widths), strict=True)
        return torch.cat([F.layer_norm(part, part.shape[-1:], gain, eps=self.eps) for part, gain in slices], -1)

    def extra_repr(self) -> str:
        """Return the widths."""
        return "|".join(map(str, self.widths))
