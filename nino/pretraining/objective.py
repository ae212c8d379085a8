"""What a nowcaster is trained for, and the baselines it must beat on held-out runs.

*absolute*, the published loss: the mean absolute error of standardised weights over the edges that carry parameters and
all horizons (NiNo, section 3.3). It is dominated by what moves most (far horizons, the first steps of a run, high
learning rates), and its best answer is the median of the paths that a weight may take.

*levelled*: the same, divided at horizon h by the square root of h, as a random walk grows, so that near horizons count
about as much as far ones. Meant for nowcasters that read movements, for which windows and parameters are level already.

*squared* is no loss but a measure: the squared error as a part of the mean square of how far the weight's parameter
moves in that window up to that horizon. Standing still costs 1 everywhere. A network that is trained on it falls short:
where it cannot know whether a parameter will go far, the windows where it does not go far weigh most.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from nino.pretraining.windows import Window

Loss = Literal["absolute", "levelled"]
LOSSES: tuple[Loss, ...] = get_args(Loss)
Measure = Literal["absolute", "levelled", "squared"]
SMALLEST_MOVEMENT = 1e-3
"""Parameters that move less than this, in standard deviations of their weights, do not count more for it."""


def errors_by_horizon(predicted: Tensor, window: Window, measure: Measure = "absolute") -> tuple[Tensor, Tensor]:
    """Sums of errors over the targets that exist, and their numbers, per horizon: ``[K]`` each.

    Args:
        predicted: ``[O, 9, K]`` movement from the last snapshot.
        window: with targets and mask of that shape.
        measure: which errors.
    """
    errors = predicted.float() - window.targets
    if measure == "squared":
        errors = (errors / window.movement.clamp(min=SMALLEST_MOVEMENT)[:, None]).square()
    if measure == "levelled":
        errors = errors / window.horizons.sqrt()
    errors = errors.abs() * window.mask
    return errors.sum((0, 1)), window.mask.sum((0, 1))


def total_error(predicted: Tensor, window: Window, loss: Loss = "absolute") -> tuple[Tensor, Tensor]:
    """The same over all horizons, two numbers."""
    errors, counts = errors_by_horizon(predicted, window, loss)
    return errors.sum(), counts.sum()


def baselines(window: Window) -> dict[str, Tensor]:
    """Predictions that need no learning: nothing moves, or everything goes on as in the last interval."""
    return {
        "copy": torch.zeros_like(window.targets),
        "linear": window.last_steps[..., None] * window.horizons,
    }
