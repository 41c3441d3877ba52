"""Define the model for in-context regression.

It reads a prompt of inputs and answers, and predicts every answer.

Shapes: `B` prompts, `N` points, `2N` tokens, `d` dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from transformers.utils import ModelOutput, can_return_tuple

from structattn import flops
from structattn.models.backbone import Backbone
from structattn.models.configuration import RegressionModelConfig
from structattn.models.parameters import Description, ParameterRole
from structattn.models.pretrained import StructuredModel


@dataclass
class RegressionOutput(ModelOutput):
    """Output of `RegressionModel`."""

    loss: Tensor | None = None
    """Mean squared error over `d`; None without labels."""

    logits: Tensor | None = None
    """`(B, 2N)`; the entry at the token of `x_i` predicts `y_i`."""


class RegressionModel(StructuredModel):
    """Read-in, backbone, and read-out of one number per token.

    Source: arXiv 2509.07963, section 4.
    """

    config_class = RegressionModelConfig
    config: RegressionModelConfig
    main_input_name = "inputs"
    position_deviation: ClassVar[float] = 0.5
    """Only its position tells which input an answer belongs to. With a small table that takes long to learn."""

    def __init__(self, config: RegressionModelConfig) -> None:
        super().__init__(config)
        self.read_in = nn.Linear(config.input_dim, config.dim, bias=False)
        self.backbone = Backbone(config)
        self.head = nn.Linear(config.dim, 1, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> RegressionOutput:
        """Predict one number for each token.

        Args:
            inputs: `(B, 2N, d)`, rows `x_1, y_1, x_2, y_2, …`, `y_i` in coordinate 0.
            labels: `(B, N)`, the answers `y_i`.

        Returns:
            `logits (B, 2N)` and, with labels, the mean of `(logits[:, 2i] - y_i)² / d` as `loss`.

        Raises:
            ValueError: `inputs` are not `(B, 2N, d)`, `labels` are not `(B, N)`, or there are more tokens than rows of
                a learned position table.
        """
        if inputs.dim() != 3 or inputs.shape[2] != self.config.input_dim:
            raise ValueError(f"inputs must be (B, 2N, d) with d = {self.config.input_dim}, got {tuple(inputs.shape)}")
        points = (inputs.shape[0], (inputs.shape[1] + 1) // 2)
        if labels is not None and tuple(labels.shape) != points:
            raise ValueError(f"labels must be (B, N) = {points}, an answer for each input, got {tuple(labels.shape)}")
        predictions = self.head(self.backbone(self.read_in(inputs))).squeeze(-1)
        loss = None
        if labels is not None:
            loss = (predictions[:, 0::2].float() - labels).square().mean() / self.config.input_dim
        return RegressionOutput(loss=loss, logits=predictions)

    def _describe_ends(self) -> dict[str, Description]:
        dim, input_dim = self.read_in.weight.shape
        return {
            "read_in.weight": Description(input_dim, dim, ParameterRole.READ_IN),
            "head.weight": Description(dim, 1, ParameterRole.READ_OUT),
        }

    def _ends_flops(self, tokens: int) -> flops.Flops:
        read_in = flops.linear(self.config.input_dim, self.config.dim, tokens)
        # The inputs need no gradient: the read-in's backward pass computes that of its weight alone.
        return flops.Flops(read_in.forward, read_in.forward) + flops.linear(self.config.dim, 1, tokens)
