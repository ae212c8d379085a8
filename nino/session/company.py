"""A second session on the same model: noticed when the two take turns, and said once.

Each would take the other's jumps for training, and add its own to them.
"""

from __future__ import annotations

import logging

from torch import nn

from nino.parallel.collectives import is_main_process

logger = logging.getLogger("nino.session")

MARK = "_nowcast_by"
"""Attribute of a model in training: which session stepped last, and whether it was said that it is not alone."""


class Company:
    """Notices a session that steps in turns with another one; one that only took over is no company."""

    def __init__(self) -> None:
        self._has_stepped = False

    def after_step(self, model: nn.Module) -> None:
        """Tell that this session has counted a step of ``model``."""
        attributes = vars(model)
        last, was_said = attributes.get(MARK, (None, False))
        if last == id(self):
            return
        is_in_turns = last is not None and self._has_stepped
        if is_in_turns and not was_said and is_main_process():
            logger.warning(
                "this model is nowcast by two optimizers or callbacks, which take each other's jumps for training: "
                "keep one; several optimizers of a model go into one NowcastOptimizer([first, second], model)"
            )
        attributes[MARK] = (id(self), was_said or is_in_turns)
        self._has_stepped = True

    def leave(self, model: nn.Module) -> None:
        """Leave no trace."""
        if vars(model).get(MARK, (None,))[0] == id(self):
            del vars(model)[MARK]

    def __getstate__(self) -> dict[str, bool]:
        return {"_has_stepped": False}  # a copy has not met anybody
