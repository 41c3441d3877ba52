"""Define `Structure`, the base of every structured matrix.

Shape legend: `...` any batch axes, `H` heads (absent when `heads=None`), `F` = `feature_dim`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, TypedDict, get_args

import torch
from torch import Tensor, nn

from structattn.checks import boolean, one_of, positive_int

if TYPE_CHECKING:
    from typing import Self

    from structattn.structures.mlbtc import MLBTC

Operation = Literal["forward", "adjoint", "left", "right"]
Side = Literal["left", "right"]
Fans = tuple[int, int]


class Factory(TypedDict, total=False):
    """Keyword arguments that make a structure's factors."""

    device: torch.device | str | None
    dtype: torch.dtype | None
    generator: torch.Generator | None


class StructureOptions(Factory, total=False):
    """Keywords of every family's constructor; `Structure` explains them and has their defaults."""

    heads: int | None
    normalize: bool


class Structure(nn.Module, abc.ABC):
    r"""Matrix `M` of `dim_out x dim_in` held as factors, or a stack.

    Every family is a product `M = Φ_Lᵀ Φ_R` of two linear maps onto a common feature space of width `feature_dim`:
    `left(x) = Φ_L x` and `right(y) = Φ_R y`, so that `⟨left(x), right(y)⟩ = xᵀ M y`. Queries and keys of an attention
    layer are exactly these two maps (arXiv 2509.07963).

    With `normalize=True` each factor `W` is used as `W / max(1, rms(W) / rms₀)`, `rms₀ = sqrt(min(fan_in, fan_out)) /
    fan_in` (:meth:`factor`). The root mean square runs over all blocks of a factor of one head: each head is a matrix
    of its own, so a stack of heads equals the same matrices held apart.

    Factors start normal with deviation `1/sqrt(fan_in)`, with the `fan_in` of one block (:meth:`factor_fans`). Where
    each factor feeds the next (BTT, Monarch, Kronecker, Butterfly), an input of unit variance gives entries of `M y` of
    order 1, under both values of `normalize`. Where both factors are applied to an input (LowRank, MLR), the entries of
    `left(x)` and `right(y)` are of order 1, like the queries and keys of standard attention.

    Args:
        dim_out: Rows of each matrix, the width of `x`.
        dim_in: Columns of each matrix, the width of `y`.
        factors: Shape (without heads) and fans of each factor, by parameter name.
        heads: Number of matrices in the stack; None for one matrix without a head axis.
        normalize: Use the factors normalised.
        device: Where the factors live.
        dtype: Their dtype.
        generator: Source of the initial factors.
    """

    def __init__(
        self,
        dim_out: int,
        dim_in: int,
        factors: Mapping[str, tuple[tuple[int, ...], Fans]],
        *,
        heads: int | None = None,
        normalize: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.dim_out = positive_int("dim_out", dim_out)
        self.dim_in = positive_int("dim_in", dim_in)
        self.heads = None if heads is None else positive_int("heads", heads)
        self.normalize = boolean("normalize", normalize)
        self._fans: dict[str, Fans] = {}
        lead = () if self.heads is None else (self.heads,)
        for name, (shape, fans) in factors.items():
            parameter = nn.Parameter(torch.empty(*lead, *shape, device=device, dtype=dtype))
            self.register_parameter(name, parameter)
            self._fans[name] = fans
        self.reset_parameters(generator)

    # ---- factors

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every factor anew, normal with deviation `1/sqrt(fan_in)`."""
        for name, (fan_in, _) in self._fans.items():
            parameter = getattr(self, name)
            device = parameter.device if generator is None else generator.device
            draw = torch.randn(parameter.shape, generator=generator, device=device, dtype=parameter.dtype)
            parameter.copy_(draw / math.sqrt(fan_in))

    def factor_fans(self) -> dict[str, Fans]:
        """Return `(fan_in, fan_out)` of one block of each factor, by parameter name.

        They set the initial deviation, the bound of the weight normalisation, and learning rates under muP.
        """
        return dict(self._fans)

    def factor(self, name: str) -> Tensor:
        """Return a factor as used, normalised unless `normalize=False`.

        That is `W / max(1, rms(W) / rms₀)`. `rms` is taken per head, over all blocks of the factor.
        """
        weight: Tensor = getattr(self, name)
        if not self.normalize:
            return weight
        fan_in, fan_out = self._fans[name]
        bound = math.sqrt(min(fan_in, fan_out)) / fan_in
        lead = 0 if self.heads is None else 1
        size = math.prod(weight.shape[lead:])
        # A norm has a zero gradient at zero weights, where sqrt(mean(W²)) would give NaN.
        rms = torch.linalg.vector_norm(weight, dim=tuple(range(lead, weight.dim())), keepdim=True)
        return weight / (rms / (math.sqrt(size) * bound)).clamp(min=1.0)

    def _stacked_factor(self, name: str) -> Tensor:
        """Return :meth:`factor` with a head axis, of size 1 without heads."""
        weight = self.factor(name)
        return weight.unsqueeze(0) if self.heads is None else weight

    # ---- the matrix

    @abc.abstractmethod
    def dense(self) -> Tensor:
        """Return the matrix `([H,] dim_out, dim_in)`, for tests and inspection."""

    @abc.abstractmethod
    def _features(self, side: Side, rows: Tensor) -> Tensor:
        """Return `Φ_L` or `Φ_R` applied to rows `(N, dim)`: `(N, H, F)`."""

    @abc.abstractmethod
    def _lift(self, side: Side, features: Tensor) -> Tensor:
        """Return `Φ_Lᵀ` or `Φ_Rᵀ` applied to features `(N, H, F)`: `(N, H, dim)`."""

    def forward(self, y: Tensor) -> Tensor:
        """Return `M y` for `y (..., dim_in)`: `(..., [H,] dim_out)`.

        All heads share the input.

        Raises:
            TypeError: `y` is no tensor, or its dtype differs from the factors' (outside autocast).
            ValueError: the last axis of `y` is not `dim_in`, or `y` is on another device.
        """
        rows = self._rows("y", y, self.dim_in)
        return self._unflatten(y, self._lift("left", self._features("right", rows)))

    def adjoint(self, x: Tensor) -> Tensor:
        """Return `Mᵀ x` for `x (..., dim_out)`: `(..., [H,] dim_in)`, checked as `forward` does."""
        rows = self._rows("x", x, self.dim_out)
        return self._unflatten(x, self._lift("right", self._features("left", rows)))

    def left(self, x: Tensor) -> Tensor:
        """Return the features `(..., [H,] feature_dim)` of `x (..., dim_out)`, the queries of attention."""
        return self._unflatten(x, self._features("left", self._rows("x", x, self.dim_out)))

    def right(self, y: Tensor) -> Tensor:
        """Return the features `(..., [H,] feature_dim)` of `y (..., dim_in)`, the keys of attention."""
        return self._unflatten(y, self._features("right", self._rows("y", y, self.dim_in)))

    def bilinear(self, x: Tensor, y: Tensor) -> Tensor:
        """Return `xᵀ M y`, `(..., [H])`, with broadcast batch axes."""
        return (self.left(x) * self.right(y)).sum(-1)

    def project_(self, target: Tensor) -> Self:
        """Become the member nearest to `target` in Frobenius norm; return `self`.

        Where there is a closed form, the result is the global optimum. Otherwise it is a fit whose error only falls;
        each family says which. A target that is a member of the family is recovered. Computed in float64.

        Args:
            target: `([H,] dim_out, dim_in)`, floating.

        Raises:
            ValueError: the shape differs, an entry is not finite, or `normalize` is True.
            TypeError: `target` is no floating tensor.
        """
        if self.normalize:
            raise ValueError(
                "project_ needs normalize=False: weight normalisation bounds the factors, so a target may lie "
                f"outside their reach; make {type(self).__name__}(..., normalize=False) and project that"
            )
        shape = self._dense_shape()
        if not isinstance(target, Tensor) or not target.is_floating_point():
            came = target.dtype if isinstance(target, Tensor) else type(target).__name__
            raise TypeError(f"target must be a floating tensor of shape {shape}, got {came}")
        if tuple(target.shape) != shape:
            raise ValueError(f"target must have shape {shape}, got {tuple(target.shape)}")
        if not bool(target.isfinite().all()):
            raise ValueError("target must be finite, got NaN or infinite entries")
        with torch.no_grad():
            stacked = target.detach().double().reshape(-1, self.dim_out, self.dim_in)
            for name, value in self._nearest(stacked).items():
                parameter = getattr(self, name)
                parameter.copy_(value.reshape(parameter.shape))
        return self

    @abc.abstractmethod
    def _nearest(self, target: Tensor) -> dict[str, Tensor]:
        """Return factors `(H, *shape)` by name of the member near `target (H, dim_out, dim_in)`."""

    @abc.abstractmethod
    def as_mlbtc(self) -> MLBTC:
        """Return the same matrix as an `MLBTC` with `normalize=False` and own factors."""

    # ---- what it costs

    @property
    @abc.abstractmethod
    def feature_dim(self) -> int:
        """Width of `left(x)` and `right(y)`, the dot product of attention."""

    @property
    def level_features(self) -> tuple[int, ...]:
        """Widths of the levels' slices of the features; they sum to `feature_dim`."""
        return (self.feature_dim,)

    @property
    def num_parameters(self) -> int:
        """Number of parameters of all heads."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def rank_bound(self) -> int:
        """Largest rank in the family, which almost every member has."""
        return min(self.dim_out, self.dim_in, self.feature_dim)

    @property
    def flops(self) -> int:
        """FLOPs of `M y` for one vector, all heads."""
        return self.flops_of("forward")

    def flops_of(self, operation: Operation) -> int:
        """Return FLOPs of one call for one vector, all heads.

        Args:
            operation: `"left"`, `"right"`, `"forward"` or `"adjoint"`. The last two both pass through both
                factors, so each costs what `left` and `right` cost together.
        """
        one_of("operation", operation, get_args(Operation))
        if operation == "left" or operation == "right":
            return self._feature_flops(operation)
        return self._feature_flops("left") + self._feature_flops("right")

    @abc.abstractmethod
    def _feature_flops(self, side: Side) -> int:
        """Return FLOPs of one side's features for one vector, all heads."""

    # ---- helpers

    def _dense_shape(self) -> tuple[int, ...]:
        return (*(() if self.heads is None else (self.heads,)), self.dim_out, self.dim_in)

    def _rows(self, name: str, value: Tensor, dim: int) -> Tensor:
        """Return `value (..., dim)` as `(N, dim)`, checked."""
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.dim() == 0 or value.shape[-1] != dim:
            raise ValueError(f"{name} must have shape (..., {dim}), got {tuple(value.shape)}")
        weight: Tensor = getattr(self, next(iter(self._fans)))
        if value.device != weight.device:
            raise ValueError(f"{name} must be on {weight.device} as the factors are, got {value.device}")
        if value.dtype != weight.dtype and not torch.is_autocast_enabled(value.device.type):
            raise TypeError(f"{name} must be {weight.dtype} as the factors are, got {value.dtype}")
        return value.reshape(-1, dim)

    def _unflatten(self, like: Tensor, result: Tensor) -> Tensor:
        """Give `(N, H, width)` the batch axes of `like`, and heads if any."""
        heads = () if self.heads is None else (self.heads,)
        return result.reshape(*like.shape[:-1], *heads, result.shape[-1])

    def _shape_repr(self) -> str:
        """Return the constructor's arguments that set the shape, as text."""
        return f"{self.dim_out}, {self.dim_in}"

    def describe(self) -> str:
        """Return the constructor's call, such as `BTT(256, 256, rank=1, heads=8)`."""
        return f"{type(self).__name__}({self._arguments()})"

    def extra_repr(self) -> str:
        """Return the constructor's arguments, for `repr`."""
        return f"{self._arguments()}, normalize={self.normalize}"

    def _arguments(self) -> str:
        heads = "" if self.heads is None else f", heads={self.heads}"
        return f"{self._shape_repr()}{heads}"
