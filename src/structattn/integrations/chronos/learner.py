"""Adapt a Chronos-T5 to the training loop."""

from __future__ import annotations

import os

import torch
from chronos import ChronosPipeline
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import Seq2SeqLMOutput

from structattn.flops import Flops
from structattn.integrations.chronos.cost import t5_flops
from structattn.integrations.transformers import IMPLEMENTATION, get_hierarchy
from structattn.models.parameters import Description, ParameterRole
from structattn.models.transformers_internals import attention_implementation
from structattn.ops.hierarchy import Hierarchy


class ChronosLearner(nn.Module):
    """Adapter of a pipeline's model to `structattn.training.train`.

    The model is trained in place. A row holds the ids of the context and its end token, then those of the future and
    its end token. Train with `mup=False`: T5's initial deviations are not muP's.

    Args:
        pipeline: holds the model to train.
    """

    def __init__(self, pipeline: ChronosPipeline) -> None:
        super().__init__()
        self.model: T5ForConditionalGeneration = pipeline.inner_model
        self._context = pipeline.model.config.context_length + 1
        self._future = pipeline.model.config.prediction_length + 1

    @property
    def config(self) -> T5Config:
        """Config of the model."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    def forward(self, inputs: Tensor) -> Seq2SeqLMOutput:
        """Return the logits of the future's ids, given those before.

        Args:
            inputs: `(B, C + 1 + P + 1)`, ids of the context and of the future, each with its end token.

        Returns:
            The model's output, with `logits (B, P + 1, n_tokens)`.

        Raises:
            ValueError: `inputs` has another shape.
        """
        if inputs.dim() != 2 or inputs.shape[1] != self._context + self._future:
            raise ValueError(
                f"inputs must be (B, C + P + 2) = (B, {self._context} + {self._future}) ids of context and future, "
                f"got {tuple(inputs.shape)}"
            )
        context, future = inputs.split([self._context, self._future], dim=1)
        output: Seq2SeqLMOutput = self.model(
            input_ids=context,
            attention_mask=context != self.config.pad_token_id,
            decoder_input_ids=self.model.prepare_decoder_input_ids_from_labels(future),
            use_cache=False,
        )
        return output

    def num_parameters(self) -> int:
        """Return the number of parameters; the tied embedding counts once."""
        return self.model.num_parameters()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Save the model by transformers, for `structattn.integrations.chronos.load_chronos`."""
        self.model.save_pretrained(folder)

    def flops(self, length: int, batch: int = 1) -> Flops:
        """Return the FLOPs of `batch` rows of `length` ids, future included."""
        return t5_flops(self.config, self._hierarchies(), length - self._future, self._future, batch)

    def describe(self) -> dict[str, Description]:
        """Return fans and role of every parameter, a tied one once."""
        return {name: _describe(name, parameter) for name, parameter in self.named_parameters()}

    def _hierarchies(self) -> dict[str, list[Hierarchy]]:
        if attention_implementation(self.config) == IMPLEMENTATION:
            return get_hierarchy(self.model)
        flat = Hierarchy.flat(self.config.d_kv)
        return {"encoder": [flat] * self.config.num_layers, "decoder": [flat] * self.config.num_decoder_layers}


def _describe(name: str, parameter: nn.Parameter) -> Description:
    if parameter.dim() == 1:
        return Description(1, parameter.numel(), ParameterRole.GAIN)
    rows, columns = parameter.shape
    if "shared" in name:
        return Description(1, columns, ParameterRole.EMBEDDING)
    if "relative_attention_bias" in name:
        return Description(1, columns, ParameterRole.POSITION)
    if "lm_head" in name:
        return Description(columns, rows, ParameterRole.READ_OUT)
    part = ParameterRole.RESIDUAL if name.endswith((".o.weight", ".wo.weight")) else ParameterRole.HIDDEN
    return Description(columns, rows, part)
