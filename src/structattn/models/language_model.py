"""Define the language model.

Shapes: `B` rows, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from structattn import flops
from structattn.models.backbone import Backbone
from structattn.models.configuration import LanguageModelConfig
from structattn.models.generation_cache import ModelCache
from structattn.models.parameters import Description, ParameterRole
from structattn.models.pretrained import StructuredModel, padding_bounds
from structattn.models.transformers_internals import CACHE, mark_as_given, one_cache, prepares_cache


class LanguageModel(StructuredModel, GenerationMixin):
    """Embedding, backbone and head that predict the next token.

    `AutoModelForCausalLM` knows it by the config's `model_type`. It works in `transformers.Trainer` and in `generate`,
    with a cache that keeps what each attention layer reads again (`structattn.layers.kv_cache`).

    By default head and embedding have matrices of their own. The head starts at zero and its learning rate falls with
    the width; neither holds for the embedding. With a vocabulary of characters, sharing would save little.
    """

    config_class = LanguageModelConfig
    config: LanguageModelConfig
    main_input_name = "input_ids"
    # Text is learned mostly from which token stands how far back, so positions start large. At 1, as large as a token's
    # own vector, a first training is faster still, but short ones stall, and changes shrink with the width.
    position_deviation: ClassVar[float] = 0.3
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
        cache: ModelCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        *,
        past_key_values: ModelCache | None = None,
    ) -> CausalLMOutputWithPast:
        """Return the logits of the token after each.

        Args:
            input_ids: `(B, T)` integers in [0, V).
            attention_mask: `(B, T)`, 0 for padding, at either end of a row. A row gives what it gives without padding;
                logits at padding have no meaning. With a cache the mask spans the cached tokens too, and padding must
                be on the left.
            labels: `(B, T)` integers, the same tokens as `input_ids`: the model shifts them. -100 is ignored.
            num_items_in_batch: tokens to average the loss over where a batch comes in parts (`transformers.Trainer`).
            cache: holds the tokens before `input_ids`, which are added to it.
            use_cache: make a cache if none is given.
            logits_to_keep: return logits of only the last so many tokens; 0 for all.
            past_key_values: another name of `cache`, from before transformers 5.24.

        Returns:
            `logits (B, T, V)` in float32 (under autocast, in its dtype), the mean cross-entropy `loss` where labels are
            given, and the cache.

        Raises:
            TypeError: the cache is of a class of transformers.
            ValueError: an argument has another shape, labels come with `logits_to_keep`, the mask has holes, a learned
                position table has fewer rows than tokens, or the cache is of another model or of this one before its
                parameters changed.
        """
        cache = one_cache(cache, past_key_values)
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must be (B, T), got shape {tuple(input_ids.shape)}")
        if labels is not None and logits_to_keep:
            raise ValueError(f"labels need the logits of all tokens, got logits_to_keep = {logits_to_keep}")
        if cache is None and use_cache:
            cache = ModelCache(self)
        if cache is not None:
            self._check_cache(cache)
        read = 0 if cache is None else cache.get_seq_length()
        batch, length = input_ids.shape
        key_start, key_end = padding_bounds(attention_mask, (batch, read + length), may_begin_later=cache is not None)
        stores = None
        if cache is not None:
            _check_padding_is_left(key_end, read + length)
            stores, key_end = cache.stores, None
        hidden = self.backbone(self.embedding(input_ids), key_start, key_end, stores)
        logits = self.head(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding, as `resize_token_embeddings` does."""
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head."""
        self.head = new_embeddings

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        cache: ModelCache | None = None,
        past_key_values: ModelCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate after `inputs (B, T)` as `GenerationMixin.generate` does; the cache goes by either name.

        In versions of transformers where a model cannot make its own cache, nothing is cached unless one is given.
        """
        cache = one_cache(cache, past_key_values)
        if cache is not None:
            kwargs[CACHE] = cache
        elif not prepares_cache():
            kwargs["use_cache"] = False
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache: ModelCache | None = None,
        attention_mask: Tensor | None = None,
        logits_to_keep: int = 0,
        use_cache: bool | None = None,
        *,
        past_key_values: ModelCache | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Return the inputs of the next call: tokens not yet cached."""
        cache = one_cache(cache, past_key_values)
        read = 0 if cache is None else cache.get_seq_length()
        return {
            "input_ids": input_ids[:, read:],
            "attention_mask": attention_mask,
            CACHE: cache,
            "logits_to_keep": logits_to_keep,
        }

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *_: Any
    ) -> None:
        """Put an empty cache into `model_kwargs` if there is none and caching is on."""
        given = model_kwargs.get(CACHE)
        if given is not None:
            self._check_cache(given)
            mark_as_given(given)
            return
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation must be None, got {generation_config.cache_implementation!r}: "
                "the attention layers say what is kept"
            )
        if generation_config.use_cache is not False:
            cache = ModelCache(self)
            if generation_config.is_assistant:
                cache.activate_past_recording()
            model_kwargs[CACHE] = cache

    def _check_cache(self, cache: object) -> None:
        if not isinstance(cache, ModelCache):
            raise TypeError(f"cache must be a structattn.models.ModelCache of this model, got {type(cache).__name__}")
        cache.check(self)

    def _describe_ends(self) -> dict[str, Description]:
        vocabulary, dim = self.embedding.weight.shape
        described = {"embedding.weight": Description(1, dim, ParameterRole.EMBEDDING, self.config.token_deviation)}
        if not self.config.tie_word_embeddings:
            described["head.weight"] = Description(dim, vocabulary, ParameterRole.READ_OUT)
        return described

    def _ends_flops(self, tokens: int) -> flops.Flops:
        return flops.linear(self.config.dim, self.config.vocab_size, tokens)


def _check_padding_is_left(key_end: Tensor | None, length: int) -> None:
    if key_end is not None and bool((key_end < length).any()):
        raise ValueError(
            "attention_mask must pad on the left where there is a cache, so that new tokens follow old ones; "
            f"got padding on the right in row {int((key_end < length).nonzero()[0])}"
        )
