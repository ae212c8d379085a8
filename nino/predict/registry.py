"""Predictors by name: one place for every integration that takes a name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nino.errors import CheckpointError, NinoError, did_you_mean
from nino.predict.confirmed import ConfirmedExtrapolator
from nino.predict.extrapolators import LinearExtrapolator, ReducedRankExtrapolator
from nino.predict.low_rank import AdapterExtrapolator
from nino.predict.nowcaster import Nowcaster
from nino.predict.predictor import Predictor
from nino.predict.straight import StraightExtrapolator

BY_NAME: dict[str, Callable[[], Predictor]] = {
    "confirmed": ConfirmedExtrapolator,
    "linear": LinearExtrapolator,
    "reduced-rank": ReducedRankExtrapolator,
    "straight": StraightExtrapolator,
    "adapters": AdapterExtrapolator,
}
"""Predictors that need no file."""


def load_predictor(name: Predictor | str | Path) -> Predictor:
    """A predictor as it is given, or by its name.

    Args:
        name: a predictor, which is returned; ``"confirmed"``, ``"linear"``, ``"reduced-rank"`` or ``"straight"``; a
            published ``.pt`` file; or what :meth:`nino.Nowcaster.from_pretrained` takes.

    Raises:
        CheckpointError: if there is no predictor of that name.
        NinoError: if a class is given, where one of its objects is wanted.
    """
    if isinstance(name, type):
        raise NinoError(f"a predictor is an object, got the class {name.__name__}; make one: {name.__name__}(...)")
    if isinstance(name, (str, Path)):
        return _load(str(name))
    if isinstance(name, Predictor):
        return name
    return Nowcaster.from_pretrained(name)  # which says what it expects


def _load(name: str) -> Predictor:
    if name in BY_NAME:
        return BY_NAME[name]()
    if name.endswith(".pt"):
        return Nowcaster.from_official(name)
    try:
        return Nowcaster.from_pretrained(name)
    except CheckpointError as error:
        if not str(error).startswith("no nowcaster"):
            raise
        raise CheckpointError(
            f"{error}; and no extrapolation: {', '.join(BY_NAME)}{did_you_mean(name, BY_NAME)}"
        ) from error
