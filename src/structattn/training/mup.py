"""Choose every tensor's learning rate, equal or by muP.

With muP the best rate does not depend on the width. Source: Yang, Hu et al., *Tensor Programs V*, 2022, table 3
(Adam); for structured factors Qiu et al., *Compute Better Spent*, 2024, and arXiv 2509.07963, section 5.

| tensor                             | initial values                 | rate                             |
|------------------------------------|--------------------------------|----------------------------------|
| embedding, read-in, gain of a norm | fixed deviation, or 1          | `learning_rate`                  |
| hidden matrix, structured factor   | deviation `1/sqrt(fan_in)`     | `learning_rate·base_dim/fan_in`  |
| residual output, read-out          | 0                              | `learning_rate·base_dim/fan_in`  |

The fan-in is that of one block: `D/p_l` for a level of MLR, `d` and `c·s` for the factors of BTT.
Initial values do not depend on muP (`structattn.models.parameters`). At width `base_dim` neither do the rates of a
model of dense matrices, except that of the MLP's second matrix, whose fan-in is larger.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from structattn.models.parameters import ParameterRole
from structattn.training.config import TrainConfig

if TYPE_CHECKING:
    from structattn.models.parameters import Description
    from structattn.models.pretrained import StructuredModel


def rate_multiplier(description: Description, base_dim: int) -> float:
    """Return muP's factor on the learning rate of a tensor."""
    return base_dim / description.fan_in if description.grows else 1.0


def parameter_groups(model: StructuredModel, config: TrainConfig) -> list[dict[str, Any]]:
    """Return AdamW's groups by learning rate and weight decay.

    Every matrix decays by `learning_rate · weight_decay` per step, whatever its own rate, so the decay does not
    depend on the width either. Embeddings and gains do not decay.

    Args:
        model: describes each of its tensors.
        config: `learning_rate`, `norm_rate`, `weight_decay`, `mup` and `base_dim`.

    Returns:
        Dicts of `params`, `names`, `lr`, `peak` (the rate that the schedule scales) and `weight_decay`.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    parameters = dict(model.named_parameters())
    for name, description in model.describe().items():
        multiplier = rate_multiplier(description, config.base_dim) if config.mup else 1.0
        if description.role is ParameterRole.GAIN:
            multiplier *= config.norm_rate
        decay = config.weight_decay / multiplier if description.decays else 0.0
        peak = config.learning_rate * multiplier
        new = {"params": [], "names": [], "lr": peak, "peak": peak, "weight_decay": decay}
        group = groups.setdefault((peak, decay), new)
        group["params"].append(parameters[name])
        group["names"].append(name)
    return list(groups.values())
