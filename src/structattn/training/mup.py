"""Learning rates of every tensor: one rate for all, or muP's, which stay good as the width grows.

Source: Yang, Hu et al., *Tensor Programs V*, 2022, table 3 (Adam); for structured factors Qiu et al., *Compute
Better Spent*, 2024, and arXiv 2509.07963, section 5.

| part                               | start                          | rate                         |
|------------------------------------|--------------------------------|------------------------------|
| embedding, read-in, gain of a norm | deviation fixed, or 1          | `learning_rate`              |
| hidden matrix, structured factor   | deviation `1/sqrt(fan_in)`     | `learning_rate·base/fan_in`  |
| residual output, read-out          | 0                              | `learning_rate·base/fan_in`  |

The fan-in is that of one block: `D/p_l` for a level of MLR, `d` and `c·s` for the factors of BTT.
Starts are the same with and without muP (`structattn.models.parameters`); so is everything at width `base_dim`
in a model of dense matrices, but for the MLP's second one, whose fan-in is wider.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from structattn.training.config import TrainConfig

if TYPE_CHECKING:
    from structattn.models.parameters import Description
    from structattn.models.pretrained import StructuredModel


def rate_multiplier(description: Description, base_dim: int) -> float:
    """muP's factor on the learning rate of a tensor."""
    return base_dim / description.fan_in if description.grows else 1.0


def parameter_groups(model: StructuredModel, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups for AdamW: one for each pair of learning rate and weight decay.

    Matrices decay by `learning_rate · weight_decay` per step whatever their own rate is, so that decay too does not
    depend on the width; embeddings and gains do not decay.

    Args:
        model: says of every tensor what it is.
        config: the base rate, the decay, and whether to scale.

    Returns:
        Dicts of `params`, `names`, `lr`, `peak` (the rate that the schedule scales) and `weight_decay`.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    parameters = dict(model.named_parameters())
    for name, description in model.describe().items():
        multiplier = rate_multiplier(description, config.base_dim) if config.mup else 1.0
        decay = config.weight_decay / multiplier if description.decays else 0.0
        peak = config.learning_rate * multiplier
        fresh = {"params": [], "names": [], "lr": peak, "peak": peak, "weight_decay": decay}
        group = groups.setdefault((peak, decay), fresh)
        group["params"].append(parameters[name])
        group["names"].append(name)
    return list(groups.values())
