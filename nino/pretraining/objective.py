"""What a nowcaster is trained for, and the rivals it must beat on held-out runs.

The loss is the mean absolute error of standardised weights over the edges that carry parameters and all horizons
(NiNo, section 3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nino.pretraining.windows import Window


def errors_by_horizon(predicted: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Sums of absolute errors over the targets that exist, and their numbers, per horizon: ``[K]`` each.

    Args:
        predicted: ``[O, 9, K]`` movement from the last snapshot.
        window: with targets and mask of that shape.
    """
    errors = (predicted.float() - window.targets).abs() * window.mask
    return errors.sum((0, 1)), window.mask.sum((0, 1))


def absolute_error(predicted: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """The same over all horizons, two numbers."""
    errors, counts = errors_by_horizon(predicted, window)
    return errors.sum(), counts.sum()


def rivals(window: Window) -> dict[str, Tensor]:
    """Predictions that need no learning: nothing moves, or everything goes on as in the last interval."""
    horizons = torch.arange(1, window.targets.shape[-1] + 1, device=window.targets.device)
    return {
        "copy": torch.zeros_like(window.targets),
        "linear": window.last_steps[..., None] * horizons,
    }
