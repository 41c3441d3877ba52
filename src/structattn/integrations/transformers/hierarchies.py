"""Set the hierarchies of a model's layers and keep them in its config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from torch import nn
from transformers import PreTrainedModel

from structattn import checks
from structattn.integrations.transformers.layer_levels import LayerLevels
from structattn.integrations.transformers.layers import (
    IMPLEMENTATION,
    AttentionLayer,
    attention_layers,
    describe,
    stack_of,
)
from structattn.integrations.transformers.pairs import find_pairing, rates
from structattn.models.transformers_internals import attention_implementation, set_attention_implementation
from structattn.ops.hierarchy import Hierarchy

SETTINGS = "structattn_mlr"
"""The field of the model's config. An example with two layers, two key heads of width 8 and rotary pairs::

    {
        "pairing": "halves",
        "decoder": [
            {"hierarchy": "4|4@1024", "order": [[2, 0, 3, 1], [0, 1, 2, 3]]},
            {"hierarchy": "8", "order": None},
        ],
    }

`pairing` is None without a rotary embedding, or where no layer has several levels or an order. An order of None keeps
the dimensions as trained.
"""

NamedOrder = Literal["as_trained", "fastest_first", "slowest_first"]
LayerOrder = Sequence[int] | Sequence[Sequence[int]]
DimensionOrder = NamedOrder | Sequence[LayerOrder] | Mapping[str, NamedOrder | Sequence[LayerOrder]]
Hierarchies = Hierarchy | str | Sequence[Hierarchy | str] | Mapping[str, Hierarchy | str | Sequence[Hierarchy | str]]


def set_hierarchy(model: PreTrainedModel, hierarchy: Hierarchies, *, order: DimensionOrder = "as_trained") -> None:
    """Switch a model's self-attention to MLR attention.

    Cross-attention and weights stay as they are. One level (`Hierarchy.flat(width)`) is the attention that the model
    had. A layer with a native sliding window keeps it: its levels lie within the window (`Hierarchy.within`).

    The hierarchy is kept in `model.config`: `from_pretrained(..., attn_implementation="structattn_mlr")` restores it
    from a saved model, and `model.set_attn_implementation` switches to another implementation and back.

    Args:
        model: its attention layers use the attention interface.
        hierarchy: levels whose ranks, and value ranks if any, sum to the head width, or their text form
            (`"16|8|4|4@1024"`, `"16|16|32v@w512|128"`): one for all layers or a list with one per layer. For an encoder
            with a decoder: one for all, or `{"encoder": …, "decoder": …}`. Value dimensions stay in their places.
        order: which dimensions come first within a head. A named order, or a list with one entry per layer: a
            permutation, or a list of one permutation per key head. Under a rotary embedding it permutes rotary pairs.
            Far pairs are scored by the first dimensions alone, so measure the order (`measure_order`). `"as_trained"`
            keeps the order (pair 0 rotates fastest); `"fastest_first"` and `"slowest_first"` sort pairs by frequency.

    Raises:
        TypeError, ValueError: before anything is changed, naming the layer: ranks or value ranks do not sum to the head
            width, a rank is odd under a rotary embedding, the number of layers differs, an order is no permutation,
            the layer caps its scores (`attn_logit_softcapping`), or its rotary pairs cannot be found.
        ValueError: the model does not let its attention implementation be set. The model is left as it was.
    """
    stacks = attention_layers(model)
    hierarchies = _by_layer("hierarchy", hierarchy, stacks)
    orders = _by_layer("order", order, stacks)
    settings: dict[str, Any] = {"pairing": None}
    for stack, layers in stacks.items():
        settings[stack] = []
        for layer, spec, layer_order in zip(layers, hierarchies[stack], orders[stack], strict=True):
            _check_scores(layer)
            parsed = _parse_hierarchy(spec)
            _check_sinks(layer, parsed)
            if parsed.levels > 1 or layer_order != "as_trained":
                settings["pairing"] = find_pairing(model, layer.module, layer.name, layer.width)
            settings[stack].append({"hierarchy": str(parsed), "order": _permutations(layer_order, model, layer)})
    made = [(layer, _levels(layer, settings)) for layers in stacks.values() for layer in layers]
    _switch(model, [layer for layer, _ in made])
    for config in (model.config, *(layer.config for layer, _ in made)):
        setattr(config, SETTINGS, settings)
    for layer, levels in made:
        layer.module.structattn_levels = levels


def get_hierarchy(model: PreTrainedModel) -> dict[str, list[Hierarchy]]:
    """Return a model's hierarchies by stack and layer: `{"decoder": [first layer's, …]}`.

    Raises:
        ValueError: none is set.
    """
    settings = _settings(model)
    return {
        stack: [Hierarchy.parse(layer["hierarchy"]) for layer in settings[stack]] for stack in attention_layers(model)
    }


def levels_of(module: nn.Module) -> LayerLevels:
    """Return the levels of an attention layer.

    They are built from its config if needed.

    Raises:
        ValueError: its config has none.
    """
    settings = _settings(module)
    levels = getattr(module, "structattn_levels", None)
    if levels is None or levels.settings is not settings:
        levels = _levels(describe(f"{stack_of(module)} layer {module.layer_idx}", module), settings)
        module.structattn_levels = levels
    return levels


def _settings(module: nn.Module) -> dict[str, Any]:
    settings = getattr(module.config, SETTINGS, None)
    if settings is None:
        raise ValueError(
            f"the attention implementation {IMPLEMENTATION!r} needs a hierarchy, and config.{SETTINGS} has none: call "
            "structattn.integrations.transformers.set_hierarchy(model, hierarchy)"
        )
    return settings


def _levels(layer: AttentionLayer, settings: dict[str, Any]) -> LayerLevels:
    stack = settings.get(layer.stack, ())
    if layer.index >= len(stack):
        raise ValueError(f"config.{SETTINGS} has {len(stack)} layers of the {layer.stack}, none for {layer.name}")
    choice = stack[layer.index]
    levels = LayerLevels(
        Hierarchy.parse(choice["hierarchy"]),
        settings["pairing"],
        choice["order"],
        width=layer.width,
        key_heads=layer.key_heads,
        name=layer.name,
    )
    levels.settings = settings
    device = next(layer.module.parameters()).device
    return levels if device.type == "meta" else levels.to(device)


def _switch(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> None:
    """Set the attention implementation.

    Raises:
        ValueError: the model does not take it, which transformers only logs.
    """
    before = attention_implementation(model.config)
    set_attention_implementation(model, IMPLEMENTATION)
    unchanged = [layer.name for layer in layers if attention_implementation(layer.config) != IMPLEMENTATION]
    if unchanged:
        set_attention_implementation(model, before)
        raise ValueError(f"model does not let its attention implementation be set, at {', '.join(unchanged)}")


def _by_layer(name: str, value: Any, stacks: Mapping[str, list[AttentionLayer]]) -> dict[str, list[Any]]:
    """Return the entry of `value` for each layer of each stack."""
    if not isinstance(value, Mapping):
        if len(stacks) > 1 and not isinstance(value, (str, Hierarchy)):
            raise ValueError(f"{name} must be one for all layers or a mapping of {' and '.join(stacks)}, got {value!r}")
        value = dict.fromkeys(stacks, value)
    if set(value) != set(stacks):
        raise ValueError(f"{name} must have the keys {', '.join(stacks)}, got {', '.join(map(str, value)) or 'none'}")
    return {
        stack: _one_per_layer(f"{name} of the {stack}", value[stack], len(layers)) for stack, layers in stacks.items()
    }


def _one_per_layer(name: str, value: Any, layers: int) -> list[Any]:
    if isinstance(value, (str, Hierarchy)):
        return [value] * layers
    if not isinstance(value, Sequence):
        raise TypeError(f"{name} must be one for all layers or a sequence with one per layer, got {value!r}")
    if len(value) != layers:
        raise ValueError(f"{name} must have one entry per layer ({layers}), got {len(value)}")
    return list(value)


def _check_scores(layer: AttentionLayer) -> None:
    cap = getattr(layer.module, "attn_logit_softcapping", None)
    if cap is not None:
        raise ValueError(
            f"{layer.name} caps its scores at {cap} (config.attn_logit_softcapping, as in Gemma 2), which MLR "
            "attention does not do: it serves models that were trained without"
        )


def _check_sinks(layer: AttentionLayer, hierarchy: Hierarchy) -> None:
    if layer.window is not None and hierarchy.sinks >= layer.window:
        raise ValueError(
            f"sinks must be below the native window of {layer.window} tokens at {layer.name}, got {hierarchy.sinks}"
        )


def _parse_hierarchy(value: object) -> Hierarchy:
    if isinstance(value, str):
        return Hierarchy.parse(value)
    if not isinstance(value, Hierarchy):
        raise TypeError(f"hierarchy must be a Hierarchy or its text form, got {value!r} ({type(value).__name__})")
    return value


def _permutations(order: Any, model: PreTrainedModel, layer: AttentionLayer) -> list[list[int]] | None:
    """Return a layer's order as permutations, one per key head or one for all.

    None stands for the order as trained.
    """
    if isinstance(order, str):
        checks.one_of("order", order, get_args(NamedOrder))
        return None if order == "as_trained" else [_by_frequency(model, layer, fastest=order == "fastest_first")]
    if isinstance(order, Sequence) and order and not isinstance(order[0], Sequence):
        return [list(order)]
    return [list(permutation) for permutation in order] if isinstance(order, Sequence) else order


def _by_frequency(model: PreTrainedModel, layer: AttentionLayer, *, fastest: bool) -> list[int]:
    orders = [rate.argsort(descending=fastest, stable=True).tolist() for rate in rates(model)]
    if not orders or any(order != orders[0] for order in orders):
        raise ValueError(
            f"order by frequency needs one rotary embedding in the model, or several of one order, got {len(orders)} "
            f"at {layer.name}"
        )
    return orders[0]
