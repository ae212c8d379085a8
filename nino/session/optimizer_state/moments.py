"""What becomes of the optimizer's moments when the weights jump.

Moments are averages of gradients seen on the way to where the weights were. Whether they still fit where the weights
are now is a question of measurement; ``docs/lab-notes.md`` has the answer behind the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from nino.errors import NinoError

Moments = Literal["keep", "scale", "reset"]

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
"""Averages of gradients: of Adam and its kin, of SGD and Muon."""
OTHER_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg", "row_var", "col_var", "variance")
"""Averages of squares, or of what else an optimizer divides by."""
COUNTERS = ("step",)
"""What bias corrections count."""


def check_moments(moments: str) -> Moments:
    """The setting itself.

    Raises:
        NinoError: if it is none of the three.
    """
    for known in get_args(Moments):
        if moments == known:
            return known  # type: ignore[no-any-return]
    raise NinoError(f"moments must be one of {', '.join(map(repr, get_args(Moments)))}, got {moments!r}")


@torch.no_grad()
def settle_moments(
    moments: Moments, optimizer: Optimizer | None, parameters: Mapping[str, Tensor], horizon: int
) -> None:
    """Adapt the optimizer's state after a jump, in place.

    Args:
        moments: ``"keep"`` leaves all as it is. ``"scale"`` divides first moments by ``1 + horizon``: the farther the
            jump, the less the old direction says. ``"reset"`` sets moments to zero and counters to 0, as before the
            first step: of Adam and its kin, SGD, RMSprop, Adafactor and Muon. State under other names stays, as
            NAdam's product of momenta or Adagrad's sum, of which zero is not the beginning.
        optimizer: whose state it is.
        parameters: those that jumped.
        horizon: snapshot intervals that they jumped.
    """
    if moments == "keep" or optimizer is None:
        return
    for parameter in parameters.values():
        state = optimizer.state.get(parameter, {})
        for name, value in state.items():
            if name in FIRST_MOMENTS and isinstance(value, Tensor):
                value.mul_(0.0 if moments == "reset" else 1 / (1 + horizon))
            elif moments == "reset" and name in OTHER_MOMENTS and isinstance(value, Tensor):
                value.zero_()
            elif moments == "reset" and name in COUNTERS:
                state[name] = value.zero_() if isinstance(value, Tensor) else 0
