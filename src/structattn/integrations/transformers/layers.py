"""The self-attention layers of a model of transformers, found by what every user of the attention interface has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

IMPLEMENTATION = "structattn_mlr"
"""The name of the attention implementation, as `model.set_attn_implementation` takes it."""

DECODER, ENCODER = "decoder", "encoder"
_WIDTHS = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")


@dataclass(frozen=True)
class AttentionLayer:
    """One self-attention layer.

    Args:
        name: of the module inside the model.
        module: hands queries, keys and values to the attention interface.
        stack: `"decoder"` where a token sees those before it, `"encoder"` where it sees all.
        index: of the layer in its stack.
        width: of a query and key head.
        key_heads: heads of keys and values.
    """

    name: str
    module: nn.Module
    stack: str
    index: int
    width: int
    key_heads: int

    @property
    def config(self) -> Any:
        """The config that the module reads at each call; an encoder's and a decoder's are copies of the model's."""
        return self.module.config


def is_attention(module: nn.Module) -> bool:
    """Whether a module hands queries and keys to the attention interface: it says where it is and what it sees."""
    return isinstance(getattr(module, "is_causal", None), bool) and hasattr(module, "layer_idx")


def is_causal(module: nn.Module) -> bool:
    """Whether a token sees only those before it."""
    return bool(module.is_causal)


def is_cross_attention(module: nn.Module) -> bool:
    """Whether keys come from another stack: GPT-2 says so; elsewhere a decoder's layer without a causal mask is one."""
    if getattr(module, "is_cross_attention", False):
        return True
    return bool(getattr(module, "is_decoder", False)) and not is_causal(module)


def stack_of(module: nn.Module) -> str:
    """`"decoder"` or `"encoder"`."""
    return DECODER if is_causal(module) else ENCODER


def attention_layers(model: nn.Module) -> dict[str, list[AttentionLayer]]:
    """Self-attention layers by stack, in order.

    Raises:
        ValueError: there are none, or their place or width cannot be known.
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
    """What is known of one layer; ValueError where it does not say."""
    config = getattr(module, "config", None)
    width = next((getattr(module, field) for field in _WIDTHS if hasattr(module, field)), None)
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(module.layer_idx, int) or not isinstance(width, int) or not isinstance(heads, int):
        raise ValueError(
            f"{name} ({type(module).__name__}) does not say what MLR attention must know: layer_idx is "
            f"{module.layer_idx}, the head width {width}, config.num_attention_heads {heads}"
        )
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return AttentionLayer(name, module, stack_of(module), module.layer_idx, width, key_heads)
