"""A language model: tokens in, the next token out. Shapes: `B` rows, `T` tokens, `V` vocabulary."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import can_return_tuple

from structattn import flops
from structattn.models.backbone import Backbone
from structattn.models.configuration import LanguageModelConfig
from structattn.models.parameters import Description, Part
from structattn.models.pretrained import StructuredModel, padding_bounds


class LanguageModel(StructuredModel, GenerationMixin):
    """Embedding, backbone, head: `AutoModelForCausalLM` knows it by the config's `model_type`.

    The head has its own matrix by default: it starts at zero and its rate falls with the width, while the embedding's
    does not, and the two want different scales; at a vocabulary of characters sharing would save next to nothing.

    It works in `transformers.Trainer` and in `generate` (which recomputes every token: there is no cache yet).
    """

    config_class = LanguageModelConfig
    config: LanguageModelConfig
    main_input_name = "input_ids"
    accepts_loss_kwargs = True
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012 (Hugging Face declares it so)

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.backbone = Backbone(config)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutput:
        """Logits of the token after each.

        Args:
            input_ids: `(B, T)` integers in [0, V).
            attention_mask: `(B, T)`, 0 for padding, which may stand at either end of a row. A row gives what it gives
                without its padding; the logits at padding mean nothing.
            labels: `(B, T)` integers, the same tokens as `input_ids`: they are shifted here. -100 is left out.
            num_items_in_batch: tokens to average the loss over where a batch comes in parts (`transformers.Trainer`).

        Returns:
            `logits (B, T, V)` in float32 (under autocast: in its type) and, with labels, the mean cross-entropy `loss`.

        Raises:
            ValueError: the mask has holes, or a learned position table has fewer rows than tokens.
        """
        key_start, key_end = padding_bounds(attention_mask, input_ids.shape)
        logits = self.head(self.backbone(self.embedding(input_ids), key_start, key_end))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        return CausalLMOutput(loss=loss, logits=logits)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Tensor | None]:
        """Every token so far: without a cache a step of `generate` reads them all."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def _prepare_cache_for_generation(self, *_: Any) -> None:
        """No cache."""

    def _describe_ends(self) -> dict[str, Description]:
        vocabulary, dim = self.embedding.weight.shape
        described = {"embedding.weight": Description(1, dim, Part.EMBEDDING)}
        if not self.config.tie_word_embeddings:
            described["head.weight"] = Description(dim, vocabulary, Part.READ_OUT)
        return described

    def _ends_flops(self, tokens: int) -> flops.Flops:
        return flops.linear(self.config.dim, self.config.vocab_size, tokens)
