"""Define the base class of models: initialisation, parameters, cost."""

from __future__ import annotations

import abc
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from structattn import flops
from structattn.models.backbone import Backbone
from structattn.models.configuration import BackboneConfig
from structattn.models.parameters import Description, ParameterRole, initialise_


class StructuredModel(PreTrainedModel):
    """`Backbone` between an embedding and a head.

    Attributes:
        backbone: the transformer.
    """

    config_class = BackboneConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (Hugging Face declares it so)

    backbone: Backbone

    position_deviation: ClassVar[float] = 0.02
    """Initial deviation of a learned position table where the config names none; tokens have deviation 1."""

    @abc.abstractmethod
    def _describe_ends(self) -> dict[str, Description]:
        """Return the descriptions of the parameters of embedding and head by name."""

    @abc.abstractmethod
    def _ends_flops(self, tokens: int) -> flops.Flops:
        """Return the FLOPs of embedding and head on `tokens` tokens."""

    def describe(self) -> dict[str, Description]:
        """Return the description of every parameter by name; a shared one once."""
        described = self._describe_ends()
        if self.backbone.positions is not None:
            chosen = self.config.position_deviation
            deviation = self.position_deviation if chosen is None else chosen
            described["backbone.positions.weight"] = Description(1, self.config.dim, ParameterRole.POSITION, deviation)
        for index, block in enumerate(self.backbone.layers):
            prefix = f"backbone.blocks.{index}"
            for name, (fan_in, fan_out) in block.attention.fans().items():
                role = ParameterRole.RESIDUAL if name == "out_proj.weight" else ParameterRole.HIDDEN
                described[f"{prefix}.attention.{name}"] = Description(fan_in, fan_out, role)
            for name, description in block.mlp.describe().items():
                described[f"{prefix}.mlp.{name}"] = description
        for name, parameter in self.named_parameters():
            if name not in described:
                described[name] = Description(1, parameter.numel(), ParameterRole.GAIN)
        return described

    def flops(self, length: int, batch: int = 1) -> flops.Flops:
        """Return the FLOPs of a call on unpadded rows, and its backward."""
        return self.backbone.flops(length, batch) + self._ends_flops(batch * length)

    def key_numbers(self, length: int) -> int:
        """Return one row's live key numbers, all blocks, after `length` tokens."""
        return sum(block.attention.key_numbers(length) for block in self.backbone.layers)

    def value_numbers(self, length: int) -> int:
        """Return one row's live value numbers, all blocks, after `length` tokens."""
        return sum(block.attention.value_numbers(length) for block in self.backbone.layers)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw all that `from_pretrained` has not filled; Hugging Face calls this."""
        parameters = dict(self.named_parameters())
        for name, description in self.describe().items():
            initialise_(parameters[name], description)


def padding_bounds(
    attention_mask: Tensor | None, shape: tuple[int, int], *, may_begin_later: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Return `key_start` and `key_end` of rows, or None without padding.

    Args:
        attention_mask: `(B, T)`, 1 for real tokens and 0 for padding at either end, or None.
        shape: `(B, T)` of the tokens.
        may_begin_later: allow rows that are all padding so far; they start at `T`.

    Raises:
        ValueError: the mask has another shape, or a row has padding between real tokens or no real token.
    """
    if attention_mask is None:
        return None, None
    if tuple(attention_mask.shape) != tuple(shape):
        raise ValueError(
            f"attention_mask must have the shape (B, T) = {tuple(shape)}, got {tuple(attention_mask.shape)}"
        )
    real = attention_mask.bool()
    if bool(real.all()):
        return None, None
    begun = real.any(dim=1)
    start = torch.where(begun, real.int().argmax(dim=1), shape[1])
    end = start + real.sum(dim=1)
    places = torch.arange(shape[1], device=real.device)
    run = (places >= start[:, None]) & (places < end[:, None])
    broken = ((run != real).any(dim=1) | ~(begun | may_begin_later)).nonzero()
    if len(broken):
        raise ValueError(
            f"attention_mask must have one run of ones in every row, got holes or none in row {int(broken[0])}; "
            "without a mask, `generate` makes one from the prompt's pad_token_id"
        )
    return start, end
