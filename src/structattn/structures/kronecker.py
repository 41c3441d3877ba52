"""Define Kronecker products of any number of small matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from structattn.checks import positive_ints
from structattn.structures.base import Side, Structure
from structattn.structures.contraction import Level, multiply_per_head, multiply_shared
from structattn.structures.mlbtc import MLBTC
from structattn.structures.projection import truncated_svd

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from structattn.structures.base import StructureOptions


class Kronecker(Structure):
    r"""`M = A_1 ⊗ A_2 ⊗ … ⊗ A_q` with `A_i (m_i, n_i)`.

    `D_out = Π m_i`, `D_in = Π n_i`. Parameters per matrix: `Σ m_i n_i`; rank bound and feature width `Π min(m_i, n_i)`:
    a factor that widens goes to the left features, transposed, the others to the right ones. Square factors all go
    right, so then `left(x)` is `x` itself. The factors are the parameters `factor_i ([H,] m_i, n_i)`.

    `project_` rearranges the target into a tensor of shape `(m_1 n_1, …, m_q n_q)`, on which the product is of rank one
    (Van Loan and Pitsianis 1993): for two factors an SVD gives the optimum, for more a fit by alternating least squares
    from successive SVDs, whose error only falls.

    Args:
        factor_shapes: `((m_1, n_1), …, (m_q, n_q))`.
        options: See :class:`Structure`.

    Raises:
        TypeError, ValueError: `factor_shapes` is empty or not pairs of positive integers.
    """

    def __init__(
        self,
        factor_shapes: Sequence[tuple[int, int]],
        **options: Unpack[StructureOptions],
    ) -> None:
        shapes = self._check_shapes(factor_shapes)
        factors = {f"factor_{i}": ((m, n), (n, m)) for i, (m, n) in enumerate(shapes, start=1)}
        super().__init__(math.prod(m for m, _ in shapes), math.prod(n for _, n in shapes), factors, **options)
        self.factor_shapes = shapes
        # Of two factors applied one after the other, the cheaper to go first is that of smaller 1/n - 1/m.
        order = sorted(range(len(shapes)), key=lambda i: 1 / shapes[i][1] - 1 / shapes[i][0])
        self._order: dict[Side, list[int]] = {
            "right": [i for i in order if shapes[i][0] <= shapes[i][1]],
            "left": [i for i in reversed(order) if shapes[i][0] > shapes[i][1]],
        }

    @staticmethod
    def _check_shapes(factor_shapes: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        if not isinstance(factor_shapes, Sequence):
            raise TypeError(f"factor_shapes must be pairs (rows, columns), got {factor_shapes!r}")
        if not factor_shapes:
            raise ValueError("factor_shapes must hold at least one pair (rows, columns), got none")
        pairs = [positive_ints(f"factor_shapes[{i}]", pair) for i, pair in enumerate(factor_shapes)]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"factor_shapes must be pairs (rows, columns), got {factor_shapes!r}")
        return tuple((m, n) for m, n in pairs)

    def _weight(self, index: int) -> Tensor:
        """Return factor `index` with a head axis: `(H, m, n)`."""
        return self._stacked_factor(f"factor_{index + 1}")

    def dense(self) -> Tensor:
        """Return the matrix itself, `([H,] dim_out, dim_in)`."""
        return self._product(range(len(self.factor_shapes))).reshape(self._dense_shape())

    def _product(self, indices: Sequence[int]) -> Tensor:
        """Return the Kronecker product of some of the factors, `(H, rows, columns)`."""
        product = self._weight(0).new_ones(self.heads or 1, 1, 1)
        for index in indices:
            product = torch.einsum("hij,hkl->hikjl", product, self._weight(index)).flatten(3).flatten(1, 2)
        return product

    def _features(self, side: Side, rows: Tensor) -> Tensor:
        axis = 0 if side == "left" else 1
        state = rows.reshape(1, -1, *(shape[axis] for shape in self.factor_shapes))
        for index in self._order[side]:
            state = self._contract(state, index, axis)
        return state.expand(self.heads or 1, *state.shape[1:]).transpose(0, 1).flatten(2)

    def _lift(self, side: Side, features: Tensor) -> Tensor:
        axis = 1 if side == "left" else 0
        state = features.transpose(0, 1).unflatten(-1, [min(shape) for shape in self.factor_shapes])
        for index in reversed(self._order[side]):
            state = self._contract(state, index, axis)
        return state.transpose(0, 1).flatten(2)

    def _contract(self, state: Tensor, index: int, axis: int) -> Tensor:
        """Contract an axis of `state (H or 1, N, k_1, …, k_q)` with its factor's `axis`.

        Return `(H, N, …)`. A leading axis of 1 is an input that all heads share.
        """
        weight = self._weight(index)
        weight = (weight.mT if axis == 1 else weight).unsqueeze(1)  # (H, 1, contracted, kept)
        state = state.movedim(index + 2, -1)
        vectors = state.flatten(1, -2)  # (H or 1, N·others, contracted)
        if state.shape[0] == 1:
            product = multiply_shared(vectors, weight)[0].transpose(0, 1)
        else:
            product = multiply_per_head(vectors.unsqueeze(1), weight)[:, 0]
        return product.unflatten(1, state.shape[1:-1]).movedim(-1, index + 2)

    def _nearest(self, target: Tensor) -> dict[str, Tensor]:
        rows, columns = zip(*self.factor_shapes, strict=True)
        count = len(rows)
        pairs = [axis for i in range(count) for axis in (i, count + i)]
        sizes = [m * n for m, n in self.factor_shapes]
        fits = [nearest_rank_one(matrix.reshape(*rows, *columns).permute(pairs).reshape(sizes)) for matrix in target]
        return {f"factor_{i + 1}": torch.stack([fit[i] for fit in fits]) for i in range(count)}

    @torch.no_grad()
    def as_mlbtc(self) -> MLBTC:
        """Return the same matrix as a BTT of rank one, with `normalize=False`.

        `A ⊗ B` has left blocks `A`, one for each row of `B`, and right blocks `Bᵀ`, one for each column of `A`.
        The factors are split in two where that takes the fewest numbers.
        """
        count = len(self.factor_shapes)

        def level_of(split: int) -> Level:
            first, second = self.factor_shapes[:split], self.factor_shapes[split:]
            a, c = (math.prod(shape[axis] for shape in first) for axis in (0, 1))
            b, d = (math.prod(shape[axis] for shape in second) for axis in (0, 1))
            return Level(a, b, c, d)

        split = min(range(1, count + 1), key=lambda i: level_of(i).num_parameters)
        level = level_of(split)
        first, second = self._product(range(split)), self._product(range(split, count))
        left = first[:, None].expand(-1, level.b, -1, -1)
        right = second.mT[:, None].expand(-1, level.c, -1, -1)
        return MLBTC.from_factors([level], [left], [right], heads=self.heads)

    @property
    def feature_dim(self) -> int:
        """`Π min(m_i, n_i)`."""
        return math.prod(min(shape) for shape in self.factor_shapes)

    def _feature_flops(self, side: Side) -> int:
        axis = 0 if side == "left" else 1
        sizes = [shape[axis] for shape in self.factor_shapes]
        total = 0
        for index in self._order[side]:
            kept = self.factor_shapes[index][1 - axis]
            total += 2 * math.prod(sizes) * kept
            sizes[index] = kept
        return (self.heads or 1) * total

    def _shape_repr(self) -> str:
        return f"{self.factor_shapes}"


def nearest_rank_one(tensor: Tensor, *, max_sweeps: int = 100, tolerance: float = 1e-10) -> list[Tensor]:
    """Return vectors whose outer product is near `tensor (k_1, …, k_q)`.

    They have equal norm. For one or two axes they are the optimum. For more, alternating least squares starts from
    successive truncated SVDs; each step is the optimum for one vector, so the error only falls. It ends when a sweep
    moves the norm by less than `tolerance` of itself.
    """
    vectors: list[Tensor] = []
    rest = tensor
    while rest.dim() > 1:
        left, right = truncated_svd(rest.flatten(1), 1)
        vectors.append(left[:, 0])
        rest = right[:, 0].reshape(rest.shape[1:])
    vectors.append(rest)
    scale = _outer_norm(vectors)
    for _ in range(max_sweeps if tensor.dim() > 2 and scale > 0 else 0):
        before = scale
        for i in range(len(vectors)):
            others = [v / v.norm() for v in vectors]
            vectors[i] = _contract_others(tensor, others, i)
            vectors = [v if j == i else others[j] for j, v in enumerate(vectors)]
        scale = _outer_norm(vectors)
        if scale - before <= tolerance * scale:
            break
    size = scale ** (1 / len(vectors))
    return [v * (size / v.norm()) if scale > 0 else torch.zeros_like(v) for v in vectors]


def _outer_norm(vectors: Sequence[Tensor]) -> float:
    """Return the norm of the outer product."""
    return math.prod(v.norm().item() for v in vectors)


def _contract_others(tensor: Tensor, vectors: Sequence[Tensor], kept: int) -> Tensor:
    """Return `tensor` contracted with every vector but that of axis `kept`."""
    for axis in reversed(range(len(vectors))):
        if axis != kept:
            tensor = torch.tensordot(tensor, vectors[axis], dims=([axis], [0]))
    return tensor
