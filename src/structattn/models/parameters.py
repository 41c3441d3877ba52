"""What every tensor of a model is: its fans, and the part it plays.

Both the initialisation and the learning rates of muP follow from these two, for dense matrices and for structured
factors alike (Yang et al., *Tensor Programs V*, 2022; arXiv 2509.07963, section 5).
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import torch
from transformers import initialization


class ParameterRole(enum.Enum):
    """The part a tensor plays, which says how it starts and how it trains."""

    EMBEDDING = "embedding"
    """Table of tokens. Deviation 1: the residual stream starts at the size that norms keep it at."""

    POSITION = "position"
    """Table of positions. Its deviation is the model's choice: see `StructuredModel.position_deviation`."""

    READ_IN = "read-in"
    """Matrix from an input of fixed size. Deviation `1/sqrt(fan_in)`, trains at the base rate."""

    HIDDEN = "hidden"
    """Matrix, or block of a structured one, whose fan-in grows with the width. Deviation `1/sqrt(fan_in)`."""

    RESIDUAL = "residual"
    """Matrix whose output is added to the residual stream. Starts at zero: a block starts as the identity."""

    READ_OUT = "read-out"
    """Matrix to an output of fixed size. Starts at zero: the first prediction is even."""

    GAIN = "gain"
    """Gain of a norm. Starts at one, trains at the base rate."""


@dataclass(frozen=True)
class Description:
    """The fans of one tensor and its part.

    Fans are those of one block where a tensor holds several, such as a factor of a structured matrix.
    """

    fan_in: int
    """Numbers that each output of the tensor sums over."""

    fan_out: int
    """Outputs that each input of the tensor feeds."""

    role: ParameterRole
    """The part it plays."""

    deviation: float = 1.0
    """Deviation that a table of positions starts with."""

    @property
    def grows(self) -> bool:
        """Whether the fan-in grows with the width of the model."""
        return self.role in (ParameterRole.HIDDEN, ParameterRole.RESIDUAL, ParameterRole.READ_OUT)

    @property
    def decays(self) -> bool:
        """Whether weight decay is for it: matrices, not tables or gains."""
        return self.role not in (ParameterRole.EMBEDDING, ParameterRole.POSITION, ParameterRole.GAIN)


def initialise_(tensor: torch.Tensor, description: Description) -> None:
    """Draw `tensor` afresh as its part asks, by the default generator.

    Tensors that `from_pretrained` has filled are left alone: `transformers.initialization` sees their mark.
    """
    if description.role in (ParameterRole.RESIDUAL, ParameterRole.READ_OUT):
        initialization.zeros_(tensor)
    elif description.role is ParameterRole.GAIN:
        initialization.ones_(tensor)
    elif description.role is ParameterRole.EMBEDDING:
        initialization.normal_(tensor, std=1.0)
    elif description.role is ParameterRole.POSITION:
        initialization.normal_(tensor, std=description.deviation)
    else:
        initialization.normal_(tensor, std=1.0 / math.sqrt(description.fan_in))
