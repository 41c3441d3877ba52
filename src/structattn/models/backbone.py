"""Define the transformer of all models.

It is a pre-norm encoder or decoder, whose config names the attention.

Shapes: `B` rows, `T` tokens, `D` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from structattn import flops
from structattn.layers import KeyValueCache, build_attention
from structattn.models.configuration import BackboneConfig
from structattn.models.parameters import Description, ParameterRole


class MLP(nn.Module):
    """`W_out GELU(W_in x)`, without biases."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, hidden_dim, bias=False)
        self.contract = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(B, T, D)` for `x (B, T, D)`."""
        return self.contract(F.gelu(self.expand(x)))

    def describe(self) -> dict[str, Description]:
        """Return the description of every parameter by its name."""
        hidden_dim, dim = self.expand.weight.shape
        return {
            "expand.weight": Description(dim, hidden_dim, ParameterRole.HIDDEN),
            "contract.weight": Description(hidden_dim, dim, ParameterRole.RESIDUAL),
        }

    def flops(self, tokens: int) -> flops.Flops:
        """Return the FLOPs of one call on `tokens` vectors."""
        hidden_dim, dim = self.expand.weight.shape
        return 2 * flops.linear(dim, hidden_dim, tokens)


class Block(GradientCheckpointingLayer):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: BackboneConfig, structure: str) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim, bias=False)
        self.attention = build_attention(
            structure,
            config.dim,
            config.heads,
            config.context_length,
            kv_heads=config.kv_heads,
            is_causal=config.is_causal,
            rotary=config.rotary,
            dropout=config.dropout,
            standard_kernel=config.standard_kernel,
        )
        self.mlp_norm = nn.LayerNorm(config.dim, bias=False)
        self.mlp = MLP(config.dim, config.mlp_ratio * config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        key_start: Tensor | None = None,
        key_end: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Return `(B, T, D)` for `x (B, T, D)`."""
        mixed = self.attention(self.attention_norm(x), key_start=key_start, key_end=key_end, cache=cache)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Backbone(nn.Module):
    """Positions, blocks and a final norm over embedded tokens.

    Args:
        config: sizes and the attention structure.

    Raises:
        TypeError, ValueError: as `build_attention` does.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.context_length = config.context_length
        learned = config.positions == "learned"
        self.positions = nn.Embedding(config.context_length, config.dim) if learned else None
        self.blocks = nn.ModuleList(Block(config, config.structure(index)) for index in range(config.layers))
        self.norm = nn.LayerNorm(config.dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        key_start: Tensor | None = None,
        key_end: Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> Tensor:
        """Return the hidden states of embedded tokens.

        Args:
            x: `(B, T, D)`.
            key_start: `(B,)` integers, the first token of each row that is not padding; positions count from it.
            key_end: `(B,)` integers, one past the last.
            caches: one for each block; `x` are then the tokens after those they hold, and are added to them.

        Returns:
            `(B, T, D)`.

        Raises:
            ValueError: there are more tokens than rows of a learned position table.
        """
        if self.positions is not None:
            read = caches[0].length if caches else 0
            x = x + self._learned_positions(self.positions, read, x.shape[1], key_start)
        x = self.dropout(x)
        for index, block in enumerate(self.blocks):
            x = block(x, key_start, key_end, caches[index] if caches else None)
        return self.norm(x)

    def _learned_positions(self, table: nn.Embedding, read: int, length: int, key_start: Tensor | None) -> Tensor:
        """Return vectors `(1 or B, T, D)` of positions after `read` tokens.

        Padding gets the vector of position 0, which is never read.
        """
        longest = read + length - (0 if key_start is None else int(key_start.min()))
        if longest > self.context_length:
            raise ValueError(
                f"the learned position table has {self.context_length} rows (context_length), got {longest} tokens; "
                "positions='rotary' has no such limit"
            )
        index = torch.arange(read, read + length, device=table.weight.device)[None]
        if key_start is not None:
            index = (index - key_start[:, None]).clamp(min=0)
        positions: Tensor = table(index)
        return positions

    @property
    def layers(self) -> list[Block]:
        """Blocks, typed."""
        return cast("list[Block]", list(self.blocks))

    def flops(self, length: int, batch: int = 1) -> flops.Flops:
        """Return the FLOPs of one call on `batch` rows of `length` tokens."""
        total = flops.Flops(0, 0)
        for block in self.layers:
            total += block.attention.flops(length, batch) + block.mlp.flops(batch * length)
        return total
