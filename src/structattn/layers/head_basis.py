"""Map queries and keys so that useful dimensions come first.

Far pairs of MLR attention see the first dimensions alone.

Shapes: Hkv key heads, r head rank. Moments are `(Hkv, r, r)`: `E[q qᵀ]` over the queries that read a key head, and the
covariance of its keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from structattn import flops
from structattn.flops import Flops

_FLOOR = 1e-6
"""Smallest eigenvalue of a moment, as a share of the mean one: moments stay invertible in unseen directions."""


class HeadBasis(nn.Module):
    """Fixed linear maps of queries and keys that keep whole scores' softmax.

    `q' = A q` and `k' = B (k - μ)` with `Aᵀ B = I`, so that `q'·k' = q·k - q·μ`: `q·μ` is the same for all keys of a
    query, and softmax does not see it. The maps come after norm and rotary embedding. They start as the identity.

    Args:
        kv_heads: `Hkv`; query heads share the maps of the key head they read.
        rank: `r`.
    """

    query: Tensor
    key: Tensor
    mean: Tensor

    def __init__(
        self, kv_heads: int, rank: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        eye = torch.eye(rank, device=device, dtype=dtype).repeat(kv_heads, 1, 1)
        self.register_buffer("query", eye)
        self.register_buffer("key", eye.clone())
        self.register_buffer("mean", torch.zeros(kv_heads, rank, device=device, dtype=dtype))

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return `q'` and `k'`.

        Args:
            query: `(B, Hq, T, r)`.
            key: `(B, Hkv, T, r)`.
        """
        maps = self.query.repeat_interleave(query.shape[1] // len(self.query), dim=0)
        return query @ maps.transpose(-2, -1), (key - self.mean[:, None]) @ self.key.transpose(-2, -1)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set both maps to the identity."""
        eye = torch.eye(self.query.shape[-1], device=self.query.device, dtype=self.query.dtype)
        self.set_(eye, eye, torch.zeros_like(self.mean))

    @torch.no_grad()
    def set_(self, query: Tensor, key: Tensor, mean: Tensor) -> None:
        """Set `A`, `B` and `μ`."""
        self.query.copy_(query)
        self.key.copy_(key)
        self.mean.copy_(mean)

    def flops(self, heads: int, tokens: int) -> Flops:
        """Return the FLOPs on `tokens` tokens; the maps have no gradient."""
        kv_heads, rank, _ = self.query.shape
        forward = (heads + kv_heads) * flops.linear(rank, rank, tokens).forward
        return Flops(forward, forward)


@dataclass(frozen=True)
class Moments:
    """Second moments of one layer's queries and keys, float64 on CPU.

    Attributes:
        query: `C_q (Hkv, r, r)`, `E[q qᵀ]` over the queries that read a key head.
        key: `C_k (Hkv, r, r)`, the covariance of its keys.
        mean: `μ (Hkv, r)`, their mean.
    """

    query: Tensor
    key: Tensor
    mean: Tensor


class MomentSums:
    """Sums of one layer's moments over batches, in float64."""

    def __init__(self) -> None:
        self._query, self._key, self._mean = torch.zeros(3, 1, dtype=torch.float64)
        self._queries, self._keys = torch.zeros(2, dtype=torch.float64)

    def add(self, query: Tensor, key: Tensor, query_weight: Tensor, key_weight: Tensor) -> None:
        """Add a batch.

        Args:
            query: `(B, Hq, T, r)`.
            key: `(B, Hkv, T, r)`.
            query_weight: `(B, T)`, how often to count each position as a query.
            key_weight: `(B, T)`, how often to count it as a key.
        """
        query = query.double().unflatten(1, (key.shape[1], -1))  # query heads by the key head they read
        key, of_query, of_key = key.double(), query_weight.double(), key_weight.double()
        self._query = (
            self._query + torch.einsum("bhgti,bhgtj->hij", query * of_query[:, None, None, :, None], query).cpu()
        )
        weighted = key * of_key[:, None, :, None]
        self._key = self._key + torch.einsum("bhti,bhtj->hij", weighted, key).cpu()
        self._mean = self._mean + weighted.sum((0, 2)).cpu()
        self._queries = self._queries + query.shape[2] * of_query.sum().cpu()
        self._keys = self._keys + of_key.sum().cpu()

    def moments(self) -> Moments:
        """Return the moments of all batches.

        Raises:
            ValueError: all weights are zero.
        """
        if not (self._queries > 0 and self._keys > 0):
            raise ValueError("batches must hold pairs of tokens to measure, far enough apart; got none")
        mean = self._mean / self._keys
        key = self._key / self._keys - mean[:, :, None] * mean[:, None, :]
        return Moments(self._query / self._queries, key, mean)


def balancing_maps(query_moment: Tensor, key_covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the maps that order dimensions by score energy, largest first.

    With `C_q^{1/2} C_k^{1/2} = U Σ Vᵀ`::

        A = Σ^{1/2} Uᵀ C_q^{-1/2}        B = Σ^{1/2} Vᵀ C_k^{-1/2}

    make both moments `Σ`, largest first (a balanced realisation): keeping `R` dimensions drops the least energy
    `E[(q·k)²]` of independent pairs, `Σ_{d >= R} σ_d²`.

    Args:
        query_moment: `C_q (…, r, r)`.
        key_covariance: `C_k (…, r, r)`.

    Returns:
        `A`, `B`, and `σ (…, r)`, descending.
    """
    query_root, query_inverse = _roots(query_moment)
    key_root, key_inverse = _roots(key_covariance)
    u, sigma, vt = torch.linalg.svd(query_root @ key_root)
    root = sigma.sqrt().unsqueeze(-1)
    return root * (u.transpose(-2, -1) @ query_inverse), root * (vt @ key_inverse), sigma


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square root of a symmetric matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=_FLOOR * values.mean(-1, keepdim=True)).sqrt().unsqueeze(-2)
    return (vectors * values) @ vectors.transpose(-2, -1), (vectors / values) @ vectors.transpose(-2, -1)


def order_pairs_by_energy(query_moment: Tensor, key_covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the permutation that sorts rotary pairs by score energy.

    The largest comes first. Under a rotary embedding only maps that commute with the rotations leave scores unchanged:
    scaling and rotation within a pair, which truncation does not see, and the order of pairs. The energy of pair `p`
    over independent queries and keys is `tr(C_q[p] C_k[p])`, over its 2 x 2 blocks.

    Args:
        query_moment: `C_q (…, r, r)`, of rotated queries whose pairs are neighbours.
        key_covariance: `C_k (…, r, r)`.

    Returns:
        The permutation matrix, twice, and the energies `(…, r/2)`, descending.
    """
    product = (query_moment * key_covariance.transpose(-2, -1)).unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
    energy = product.sum((-3, -1)).diagonal(dim1=-2, dim2=-1)
    energy, order = energy.sort(dim=-1, descending=True)
    dimensions = torch.stack([2 * order, 2 * order + 1], dim=-1).flatten(-2)
    permutation = torch.nn.functional.one_hot(dimensions, query_moment.shape[-1]).to(query_moment.dtype)
    return permutation, permutation, energy
