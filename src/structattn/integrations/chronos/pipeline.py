"""Build or load a Chronos-T5 with a given self-attention."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from chronos import ChronosConfig, ChronosPipeline
from chronos.chronos import ChronosModel
from transformers import AutoConfig, PreTrainedModel, T5Config, T5ForConditionalGeneration

from structattn import checks
from structattn.integrations.chronos.sizes import SIZES, ChronosSize
from structattn.integrations.t5 import T5_STANDARD, t5_hierarchy
from structattn.integrations.transformers import IMPLEMENTATION, set_hierarchy
from structattn.layers import AttentionConfig
from structattn.ops.hierarchy import Hierarchy

LayerAttention = str | AttentionConfig | Hierarchy
"""A spelling or config as `structattn.layers.parse_attention` reads it, or levels."""

Attention = LayerAttention | Mapping[str, LayerAttention | Sequence[LayerAttention]]
"""One for all layers; or by stack, `{"encoder": …, "decoder": …}`, one for its layers or a sequence of one for each."""


def make_chronos(
    size: str | ChronosSize,
    attention: Attention = T5_STANDARD,
    *,
    context_length: int = 512,
    prediction_length: int = 64,
    n_tokens: int = 4096,
    dropout: float = 0.1,
    initializer_factor: float = 0.05,
    seed: int = 0,
) -> ChronosPipeline:
    """Return a Chronos-T5 with random weights.

    Defaults are those of the published models.

    Args:
        size: `"tiny"`, `"mini"`, `"small"`, or other sizes.
        attention: self-attention of encoder and decoder, see `set_attention`.
        context_length: values that a forecast reads.
        prediction_length: values to forecast.
        n_tokens: bins of the tokenizer, plus three special ids.
        dropout: dropout rate in training.
        initializer_factor: factor on T5's initial deviations.
        seed: seed of the weights, which do not depend on the attention.

    Raises:
        TypeError, ValueError: an argument has another type or is out of range, or the attention does not fit a T5.
    """
    sizes = SIZES[checks.one_of("size", size, SIZES)] if isinstance(size, str) else size
    if not isinstance(sizes, ChronosSize):
        raise TypeError(f"size must be one of {', '.join(SIZES)} or a ChronosSize, got {size!r}")
    settings = chronos_settings(context_length, prediction_length, n_tokens)
    config = T5Config(
        d_model=sizes.d_model,
        d_ff=sizes.d_ff,
        d_kv=sizes.d_kv,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        vocab_size=n_tokens,
        n_positions=context_length,
        dropout_rate=checks.probability("dropout", dropout),
        initializer_factor=initializer_factor,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        chronos_config=dataclasses.asdict(settings),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5ForConditionalGeneration(config).eval()
    set_attention(model, attention)
    return _pipeline(model)


def chronos_settings(context_length: int = 512, prediction_length: int = 64, n_tokens: int = 4096) -> ChronosConfig:
    """Return Chronos's config of tokenizer and lengths.

    Defaults are those of the published models. The other settings are those of `config.json` of amazon/chronos-t5-tiny
    on Hugging Face; bins reach to 15 mean absolute values.

    Args:
        context_length: values that a forecast reads.
        prediction_length: values to forecast.
        n_tokens: bins of the tokenizer, plus three special ids.

    Raises:
        TypeError, ValueError: an argument is no positive integer, or too few ids are left for two bins.
    """
    checks.positive_int("context_length", context_length)
    checks.positive_int("prediction_length", prediction_length)
    if checks.positive_int("n_tokens", n_tokens) < 5:
        raise ValueError(f"n_tokens must be at least 5, two bins and three special ids, got {n_tokens}")
    return ChronosConfig(
        tokenizer_class="MeanScaleUniformBins",
        tokenizer_kwargs={"low_limit": -15.0, "high_limit": 15.0},
        context_length=context_length,
        prediction_length=prediction_length,
        n_tokens=n_tokens,
        n_special_tokens=2,
        pad_token_id=0,
        eos_token_id=1,
        use_eos_token=True,
        model_type="seq2seq",
        num_samples=20,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
    )


def load_chronos(folder: str | os.PathLike[str], attention: Attention | None = None, **options: Any) -> ChronosPipeline:
    """Load a Chronos-T5 from a folder that `save_pretrained` wrote.

    The attention is the saved one, or another.

    Args:
        folder: holds `config.json` with a `chronos_config`, and weights.
        attention: see `set_attention`; by default the hierarchies in `config.json`, or T5's own attention.
        options: arguments of `from_pretrained`, such as `dtype`.

    Raises:
        ValueError: `folder` holds no Chronos-T5, or a hierarchy does not fit the width of its heads.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ValueError(f"folder must hold a saved Chronos-T5, got {path}, which has no config.json")
    config = AutoConfig.from_pretrained(path)
    if config.model_type != "t5" or not getattr(config, "chronos_config", None):
        raise ValueError(
            f"folder must hold a Chronos-T5, whose config.json has model_type 't5' and a chronos_config; got {path} "
            f"with model_type {config.model_type!r} and {'a' if hasattr(config, 'chronos_config') else 'no'} "
            "chronos_config"
        )
    if getattr(config, IMPLEMENTATION, None) is not None:
        options.setdefault("attn_implementation", IMPLEMENTATION)
    model = T5ForConditionalGeneration.from_pretrained(path, **options).eval()
    if attention is not None:
        set_attention(model, attention)
    return _pipeline(model)


def set_attention(model: PreTrainedModel | ChronosPipeline, attention: Attention) -> None:
    """Set the self-attention of a Chronos-T5 in encoder and decoder.

    Cross-attention stays standard. Weights and the relative position bias stay as they are. Where a spelling gives
    neither block sizes nor windows, they follow from the context in the encoder and from the horizon in the decoder. An
    end token follows the context; by blocks it lies in one of its own.

    Args:
        model: a Chronos-T5, or its pipeline.
        attention: see `Attention`. A T5 does not scale its scores and has no norms, so that a spelling must say so:
            `standard+qk_norm=false+scale=1`, `mlr:16|16|32+level_weight=1+qk_norm=false`.

    Raises:
        TypeError: `attention` has another type.
        ValueError: a T5 cannot have it, or it does not fit the model; the model is unchanged.
    """
    inner = model.inner_model if isinstance(model, ChronosPipeline) else model
    settings = getattr(getattr(inner, "config", None), "chronos_config", None)
    if settings is None:
        raise ValueError(f"model must be a Chronos-T5, whose config has a chronos_config, got {type(inner).__name__}")
    lengths = {"encoder": settings["context_length"], "decoder": settings["prediction_length"]}
    width = inner.config.d_kv
    if not isinstance(attention, Mapping):
        set_hierarchy(inner, {stack: _hierarchy(attention, width, length) for stack, length in lengths.items()})
        return
    hierarchies: dict[str, Hierarchy | list[Hierarchy]] = {}
    for stack, each in attention.items():
        length = lengths[checks.one_of("stack of attention", stack, lengths)]
        if isinstance(each, Sequence) and not isinstance(each, str):
            hierarchies[stack] = [_hierarchy(one, width, length) for one in each]
        else:
            hierarchies[stack] = _hierarchy(each, width, length)
    set_hierarchy(inner, hierarchies)


def _hierarchy(attention: LayerAttention, head_dim: int, context_length: int) -> Hierarchy:
    return attention if isinstance(attention, Hierarchy) else t5_hierarchy(attention, head_dim, context_length)


def _pipeline(model: T5ForConditionalGeneration) -> ChronosPipeline:
    config = ChronosConfig(**model.config.chronos_config)
    return ChronosPipeline(tokenizer=config.create_tokenizer(), model=ChronosModel(config=config, model=model))
