"""Solve linear regression in context: predict `wᵀx_i` from earlier points.

A model reads `x_1, y_1, …, x_i` with `y_i = wᵀ x_i` and predicts `y_i`, for every `i` at once.

Shapes: `B` prompts, `N = 2d` points of `d` dimensions, `2N` tokens: a point's `x` and then its `y`.

A model that solves it finds the least-squares solution of the points before `i`, with zero error from point `d + 1` on.
It must compare `d`-dimensional inputs, which a score of rank below `d` cannot.

Source: Garg, Tsipras, Liang, Valiant, *What Can Transformers Learn In-Context?*, 2022; sizes and curriculum as in arXiv
2509.07963, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from structattn import checks
from structattn.tasks.profiles.regression import RegressionConfig
from structattn.tasks.randomness import Stream, generator
from structattn.tasks.task import Batch, Task, Totals

FIRST_DIMENSION = 4
"""Dimensions at the start of the curriculum; it starts with twice as many points."""


class RegressionTask(Task):
    """Prompts with `x_i, w ~ N(0, I_d)`, and the squared error over `d`.

    A batch has `inputs (B, 2N, d)` float32, rows `x_1, y_1, x_2, y_2, …` with `y_i` in coordinate 0 and zeros in
    the others, and `targets (B, N)` float32, the `y_i`. A model returns one number per token, `(B, 2N)`. The number at
    the token of `x_i` is its prediction of `y_i`, made without seeing later tokens. The numbers at `y_i` are not used.

    *Curriculum.* For the first `curriculum * total_steps` steps a prompt has `c` dimensions and `2c` points: the
    coordinates of `x` from `c` on are zero and the prompt ends after `2c` points. `c` grows from 4 to `d` by one at a
    time, at equal intervals (by more if there are fewer steps than dimensions to add), and stays at `d`. For `d` of 4
    or less there is no curriculum.

    *Loss.* The mean of `(prediction - y)² / d` over all points and prompts, with the full `d` at every step. At full
    size a model that answers 0 has loss 1, since `y` has variance `d`, and a bound on the gradient's norm means the
    same at every `d`.

    Args:
        config: sizes.
        seed: selects the training prompts.
        total_steps: training steps of the run; `config.curriculum` is a share of them.

    Raises:
        ValueError: `seed` is negative or `total_steps` is not positive.
    """

    name: ClassVar[str] = "regression"
    units: ClassVar[Mapping[str, str]] = {
        "last_error": "squared error / d at the last point",
        "mean_error": "squared error / d, mean over all points",
        "error_by_position": "squared error / d at each point",
    }

    def __init__(self, config: RegressionConfig, *, seed: int = 0, total_steps: int) -> None:
        super().__init__(seed)
        self.config = config
        self.curriculum_steps = round(config.curriculum * checks.positive_int("total_steps", total_steps))

    @property
    def context_length(self) -> int:
        """Tokens `2N = 4d` of a full prompt."""
        return self.config.context_length

    @property
    def evaluation_size(self) -> int:
        """Prompts of the held-out set."""
        return self.config.evaluation_prompts

    def sequence_length(self, step: int) -> int:
        """Return the tokens of a prompt: four per dimension in use."""
        return 4 * self.dimension(step)

    def dimension(self, step: int) -> int:
        """Return the dimensions in use at `step`, by the curriculum."""
        target = self.config.input_dim
        if step >= self.curriculum_steps or target <= FIRST_DIMENSION:
            return target
        return FIRST_DIMENSION + (target - FIRST_DIMENSION) * step // self.curriculum_steps

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean of `(prediction - y)² / d` over prompts and points."""
        return self._squared_errors(outputs, batch).mean() / self.config.input_dim

    @torch.no_grad()
    def totals(self, outputs: Tensor, batch: Batch) -> Totals:
        """Return `squared_error (N,)` summed over prompts, and their number `prompts ()`."""
        errors = self._squared_errors(outputs, batch).double().sum(dim=0)
        return {"squared_error": errors, "prompts": errors.new_tensor(len(batch["targets"]))}

    def metrics(self, totals: Totals) -> dict[str, float | list[float]]:
        """Return the last, mean and each point's error over `d`."""
        errors = totals["squared_error"] / totals["prompts"] / self.config.input_dim
        return {
            "last_error": errors[-1].item(),
            "mean_error": errors.mean().item(),
            "error_by_position": errors.tolist(),
        }

    @property
    def data_summary(self) -> str:
        """Distribution, dimensions and points."""
        return f"x, w ~ N(0, I) in {self.config.input_dim} dimensions, {self.config.num_points} points in a prompt"

    def _squared_errors(self, outputs: Tensor, batch: Batch) -> Tensor:
        expected = batch["inputs"].shape[:2]
        if outputs.shape != expected:
            raise ValueError(f"outputs must have one number per token, {tuple(expected)}, got {tuple(outputs.shape)}")
        return (outputs[:, 0::2].float() - batch["targets"]).square()

    def _training_rows(self, step: int, batch_size: int, rows: range) -> Batch:
        return self._prompts(self.seed, Stream.TRAINING_PROMPT, step, rows, self.dimension(step))

    def _evaluation_rows(self, rows: range) -> Batch:
        return self._prompts(0, Stream.EVALUATION_PROMPT, 0, rows, self.config.input_dim)

    def _prompts(self, seed: int, stream: Stream, step: int, rows: range, dimension: int) -> Batch:
        """Return prompts that use `dimension` dimensions, with twice as many points."""
        width, points = self.config.input_dim, 2 * dimension
        draws = np.empty((len(rows), points + 1, dimension), dtype=np.float32)
        for index, row in enumerate(rows):
            generator(seed, stream, step, row).standard_normal(dtype=np.float32, out=draws[index])
        weights, x = draws[:, 0, :, None], draws[:, 1:]
        with np.errstate(invalid="ignore"):  # BLAS may compute on lanes past the data, which raise the flag
            targets = (x @ weights)[..., 0]
        tokens = np.zeros((len(rows), points, 2, width), dtype=np.float32)
        tokens[:, :, 0, :dimension] = x
        tokens[:, :, 1, 0] = targets
        inputs = torch.from_numpy(tokens.reshape(len(rows), 2 * points, width))
        return {"inputs": inputs, "targets": torch.from_numpy(targets)}
