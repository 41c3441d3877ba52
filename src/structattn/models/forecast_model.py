"""Define the forecasting model.

It has an encoder over time steps, and a read-out over time and channels.

Shapes: `B` windows, `T` steps of context, `H` steps of horizon, `C` channels, `D` width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput, can_return_tuple

from structattn import flops
from structattn.models.backbone import Backbone
from structattn.models.configuration import ForecastModelConfig
from structattn.models.parameters import Description, ParameterRole
from structattn.models.pretrained import StructuredModel

_EPSILON = 1e-5


@dataclass
class ForecastOutput(ModelOutput):
    """Output of `ForecastModel`."""

    loss: Tensor | None = None
    """Mean squared error; None without labels."""

    logits: Tensor | None = None
    """`(B, H, C)`, the prediction."""


class ForecastModel(StructuredModel):
    """Read-in of each time step, non-causal backbone, linear read-out to the horizon.

    The read-out maps hidden states `h (T, D)` to `A h Bᵀ`, with `A (H, T)` over time and `B (C, D)` to channels: a
    linear map of all of `h` with `T·H + D·C` numbers instead of `T·D·H·C`. Its size depends on `T`, so a model reads
    contexts of one length.
    """

    config_class = ForecastModelConfig
    config: ForecastModelConfig
    main_input_name = "inputs"

    def __init__(self, config: ForecastModelConfig) -> None:
        super().__init__(config)
        self.read_in = nn.Linear(config.channels, config.dim, bias=False)
        self.backbone = Backbone(config)
        self.to_channels = nn.Linear(config.dim, config.channels, bias=False)
        self.to_horizon = nn.Linear(config.context_length, config.horizon, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> ForecastOutput:
        """Predict the next `H` values of every channel.

        Args:
            inputs: `(B, T, C)`, the values so far.
            labels: `(B, H, C)`, the values to predict.

        Returns:
            `logits (B, H, C)` in float32 and, with labels, their mean squared error as `loss`.

        Raises:
            ValueError: `inputs` is not `(B, T, C)` with the config's `context_length` and `channels`, or `labels` not
                `(B, H, C)`.
        """
        config = self.config
        if inputs.dim() != 3 or inputs.shape[1:] != (config.context_length, config.channels):
            raise ValueError(
                f"inputs must be (B, T, C) with context_length T = {config.context_length} and channels "
                f"C = {config.channels}, got {tuple(inputs.shape)}"
            )
        future = (len(inputs), config.horizon, config.channels)
        if labels is not None and tuple(labels.shape) != future:
            raise ValueError(f"labels must be (B, H, C) = {future}, got {tuple(labels.shape)}")
        centre, scale = self._window_moments(inputs)
        hidden = self.backbone(self.read_in((inputs - centre) / scale))
        by_channel = self.to_channels(hidden).transpose(1, 2)  # (B, C, T)
        predictions = centre + scale * self.to_horizon(by_channel).transpose(1, 2).float()
        loss = None if labels is None else F.mse_loss(predictions, labels)
        return ForecastOutput(loss=loss, logits=predictions)

    def _window_moments(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the centre and scale of each window, `(B, 1, C)` each."""
        if self.config.window_norm == "last":
            centre = inputs[:, -1:]
            return centre, torch.ones_like(centre)
        if self.config.window_norm == "standard":
            variance, mean = torch.var_mean(inputs, dim=1, correction=0, keepdim=True)
            return mean, (variance + _EPSILON).sqrt()
        return torch.zeros_like(inputs[:, :1]), torch.ones_like(inputs[:, :1])

    def _describe_ends(self) -> dict[str, Description]:
        config = self.config
        return {
            "read_in.weight": Description(config.channels, config.dim, ParameterRole.READ_IN),
            "to_channels.weight": Description(config.dim, config.channels, ParameterRole.READ_OUT),
            # Its fan-in is the context length, not the width, so it trains as a read-in does. If it started at zero, as
            # `to_channels` does, neither would have a gradient.
            "to_horizon.weight": Description(config.context_length, config.horizon, ParameterRole.READ_IN),
        }

    def _ends_flops(self, tokens: int) -> flops.Flops:
        config = self.config
        read_in = flops.linear(config.channels, config.dim, tokens)
        rows = tokens // config.context_length * config.channels
        # The inputs need no gradient: the read-in's backward pass computes that of its weight alone.
        total = flops.Flops(read_in.forward, read_in.forward) + flops.linear(config.dim, config.channels, tokens)
        return total + flops.linear(config.context_length, config.horizon, rows)
