"""Find the self-attention layers of a model of transformers."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

IMPLEMENTATION = "structattn_mlr"
"""Name of the attention implementation, for `model.set_attn_implementation`."""

DECODER, ENCODER = "decoder", "encoder"
_WIDTHS = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")


@dataclass(frozen=True)
class AttentionLayer:
    """One self-attention layer.

    Args:
        name: name of the module in the model.
        module: the module that calls the attention interface.
        stack: `"decoder"` if the layer is causal, `"encoder"` if not.
        index: number of the layer in its stack.
        width: width of a query and key head.
        key_heads: heads of keys and values.
        window: the sliding window that the layer has by its model's config; None without one.
    """

    name: str
    module: nn.Module
    stack: str
    index: int
    width: int
    key_heads: int
    window: int | None = None

    @property
    def config(self) -> Any:
        """Config that the module reads; a stack's is a copy."""
        return self.module.config


def is_attention(module: nn.Module) -> bool:
    """Return True if a module calls the attention interface.

    It then has `layer_idx` and `is_causal`.
    """
    return isinstance(getattr(module, "is_causal", None), bool) and hasattr(module, "layer_idx")


def is_causal(module: nn.Module) -> bool:
    """Return True if a token sees only itself and earlier ones."""
    return bool(module.is_causal)


def is_cross_attention(module: nn.Module) -> bool:
    """Return True if keys come from another stack.

    GPT-2 has a flag for it; in other models it is a decoder's non-causal layer.
    """
    if getattr(module, "is_cross_attention", False):
        return True
    return bool(getattr(module, "is_decoder", False)) and not is_causal(module)


def stack_of(module: nn.Module) -> str:
    """Return `"decoder"` or `"encoder"`."""
    return DECODER if is_causal(module) else ENCODER


def attention_layers(model: nn.Module) -> dict[str, list[AttentionLayer]]:
    """Return a model's self-attention layers by stack, in order.

    Raises:
        ValueError: there are none, or their number or width cannot be found.
    """
    found: dict[str, list[AttentionLayer]] = {}
    for name, module in model.named_modules():
        if is_attention(module) and not is_cross_attention(module):
            layer = describe(name, module)
            found.setdefault(layer.stack, []).append(layer)
    if not found:
        raise ValueError(
            f"model has no self-attention that MLR attention can serve: {type(model).__name__} has no module with "
            "`layer_idx` and `is_causal`, as those that use the attention interface have"
        )
    for stack, layers in found.items():
        layers.sort(key=lambda layer: layer.index)
        if [layer.index for layer in layers] != list(range(len(layers))):
            places = ", ".join(f"{layer.name}: {layer.index}" for layer in layers)
            raise ValueError(
                f"the {stack}'s self-attention layers must be numbered 0, 1, … by `layer_idx`, got {places}; where a "
                "model holds several, call this with one of them"
            )
    return found


def describe(name: str, module: nn.Module) -> AttentionLayer:
    """Return a layer's description; ValueError if an attribute is missing."""
    config = getattr(module, "config", None)
    width = next((getattr(module, field) for field in _WIDTHS if hasattr(module, field)), None)
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(module.layer_idx, int) or not isinstance(width, int) or not isinstance(heads, int):
        raise ValueError(
            f"{name} ({type(module).__name__}) lacks what MLR attention needs: layer_idx is {module.layer_idx}, the "
            f"head width {width}, config.num_attention_heads {heads}"
        )
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return AttentionLayer(name, module, stack_of(module), module.layer_idx, width, key_heads, _native_window(module))


def _native_window(module: nn.Module) -> int | None:
    config: Any = module.config
    types = getattr(config, "layer_types", None)
    if types and types[module.layer_idx] != "sliding_attention":
        return None
    # Mistral and others read the config at each call; in a family without sliding windows its field means nothing.
    family = sys.modules[type(module).__module__]
    by_config = config if hasattr(family, "create_sliding_window_causal_mask") else None
    holder: Any = module if hasattr(module, "sliding_window") else by_config
    window: int | None = getattr(holder, "sliding_window", None)
    return window
