"""Describe every parameter by its fans and its role.

Initialisation and the learning rates of muP follow from these two, for dense matrices and structured factors alike
(Yang et al., *Tensor Programs V*, 2022; arXiv 2509.07963, section 5).
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import torch
from transformers import initialization


class ParameterRole(enum.Enum):
    """Role of a parameter, which sets initial values and learning rate."""

    EMBEDDING = "embedding"
    """Table of tokens. By default of deviation 1: the residual stream starts at the size that norms give it."""

    POSITION = "position"
    """Table of positions. The model sets its deviation, see `StructuredModel.position_deviation`."""

    READ_IN = "read-in"
    """Matrix from an input of fixed size. Deviation `1/sqrt(fan_in)`, base learning rate."""

    HIDDEN = "hidden"
    """Matrix, or block of a structured one, whose fan-in grows with the width. Deviation `1/sqrt(fan_in)`."""

    RESIDUAL = "residual"
    """Matrix whose output is added to the residual stream. Starts at zero: a block starts as the identity."""

    READ_OUT = "read-out"
    """Matrix to an output of fixed size. Starts at zero: the first prediction is uniform."""

    GAIN = "gain"
    """Gain of a norm. Starts at one, base learning rate."""


@dataclass(frozen=True)
class Description:
    """Fans and role of one parameter.

    Where a parameter holds several blocks, such as a factor of a structured matrix, fans are those of one block.
    """

    fan_in: int
    """Inputs that each output sums over."""

    fan_out: int
    """Outputs that each input feeds."""

    role: ParameterRole
    """Role in the model."""

    deviation: float = 1.0
    """Initial deviation of a table of tokens or positions."""

    @property
    def grows(self) -> bool:
        """True if the fan-in grows with the width of the model."""
        return self.role in (ParameterRole.HIDDEN, ParameterRole.RESIDUAL, ParameterRole.READ_OUT)

    @property
    def decays(self) -> bool:
        """True if weight decay applies: to matrices, not to tables or gains."""
        return self.role not in (ParameterRole.EMBEDDING, ParameterRole.POSITION, ParameterRole.GAIN)


def initialise_(tensor: torch.Tensor, description: Description) -> None:
    """Draw initial values for the role of `tensor`, from the default generator.

    `transformers.initialization` recognises tensors that `from_pretrained` has filled, and leaves them as they are.
    """
    if description.role in (ParameterRole.RESIDUAL, ParameterRole.READ_OUT):
        initialization.zeros_(tensor)
    elif description.role is ParameterRole.GAIN:
        initialization.ones_(tensor)
    elif description.role in (ParameterRole.EMBEDDING, ParameterRole.POSITION):
        initialization.normal_(tensor, std=description.deviation)
    else:
        initialization.normal_(tensor, std=1.0 / math.sqrt(description.fan_in))
