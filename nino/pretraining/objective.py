"""What a nowcaster is trained for, and the rivals it must beat on held-out runs.

The published loss is the mean absolute error of standardised weights over the edges that carry parameters and all
horizons (NiNo, section 3.3). It is dominated by what moves most: far horizons, the first updates of a run, high
learning rates. The *relative* error divides by how far the weight's parameter moves in that window up to that horizon:
standing still costs 1 everywhere, and every window, parameter and horizon counts alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nino.pretraining.windows import Window

SMALLEST_MOVEMENT = 1e-3
"""Parameters that move less than this, in standard deviations of their weights, do not count more for it."""


def errors_by_horizon(predicted: Tensor, window: Window, *, relative: bool = False) -> tuple[Tensor, Tensor]:
    """Sums of absolute errors over the targets that exist, and their numbers, per horizon: ``[K]`` each.

    Args:
        predicted: ``[O, 9, K]`` movement from the last snapshot.
        window: with targets and mask of that shape.
        relative: divide by the movement of the parameter.
    """
    errors = (predicted.float() - window.targets).abs() * window.mask
    if relative:
        errors = errors / window.movement.clamp(min=SMALLEST_MOVEMENT)[:, None]
    return errors.sum((0, 1)), window.mask.sum((0, 1))


def total_error(predicted: Tensor, window: Window, *, relative: bool = False) -> tuple[Tensor, Tensor]:
    """The same over all horizons, two numbers."""
    errors, counts = errors_by_horizon(predicted, window, relative=relative)
    return errors.sum(), counts.sum()


def rivals(window: Window) -> dict[str, Tensor]:
    """Predictions that need no learning: nothing moves, or everything goes on as in the last interval."""
    horizons = torch.arange(1, window.targets.shape[-1] + 1, device=window.targets.device)
    return {
        "copy": torch.zeros_like(window.targets),
        "linear": window.last_steps[..., None] * horizons,
    }
