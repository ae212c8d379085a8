"""Which predictor a training gets that was given none."""

from __future__ import annotations

from typing import Literal

from nino.numbers import counted
from nino.predict.confirmed import ConfirmedExtrapolator
from nino.predict.predictor import Predictor
from nino.predict.straight import CAUTIOUS_ERROR, StraightExtrapolator

SHORT_RUN = 200
"""Steps below which runs are too short for ``"confirmed"``, which first jumps after three periods."""
Goal = Literal["loss", "margins", "rewards"]
"""What a training follows; margins are of preferences over a reference: their loss can fall while answers get worse."""


def default_predictor(max_steps: int | None, goal: Goal = "loss") -> tuple[Predictor, str]:
    """The predictor, and in words why it is not the usual one.

    Args:
        max_steps: optimizer steps of the whole run, if known.
        goal: what the training follows.

    Returns:
        The words are empty for the usual one.

    Example:
        >>> default_predictor(1000)[1], default_predictor(100)[1]
        ('', '"straight" predicts: only 100 steps')
        >>> [default_predictor(100, goal)[0].error for goal in ("loss", "margins", "rewards")]
        [0.2, 0.1, 0.2]
    """
    if goal == "rewards":
        return StraightExtrapolator(), '"straight" predicts: rewards are followed, which are noisy'
    if max_steps is not None and 0 < max_steps < SHORT_RUN:
        predictor = StraightExtrapolator(CAUTIOUS_ERROR) if goal == "margins" else StraightExtrapolator()
        return predictor, f'"straight" predicts: only {counted(max_steps, "step")}'
    return ConfirmedExtrapolator(), ""
