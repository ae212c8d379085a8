"""Nino: nowcast the weights of a training neural network (NiNo, arXiv:2409.04434)."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if find_spec("nino.callbacks") is None:  # in a clone this folder hides the installed package: its parts lie beside it
    __path__.append(str(Path(__file__).parents[1]))

from nino import callbacks
from nino.errors import CheckpointError, GraphError, NinoError, SnapshotError, TrajectoryError
from nino.graph import NeuralGraph
from nino.graph.check import WiringReport, check_wiring
from nino.optimizer import NowcastOptimizer
from nino.plan import NowcastPlan
from nino.plots import plot_run, run_record
from nino.predict.model import NowcasterConfig
from nino.predict.movement import Movement
from nino.predict.nowcaster import Nowcaster
from nino.predict.predictor import Predictor
from nino.predict.registry import load_predictor
from nino.session import NowcastSession
from nino.session.report import NowcastReport

if TYPE_CHECKING:
    from nino import metanet
    from nino.alignment import align, merge

__version__ = "0.2.0"

__all__ = [
    "CheckpointError",
    "GraphError",
    "Movement",
    "NeuralGraph",
    "NinoError",
    "NowcastOptimizer",
    "NowcastPlan",
    "NowcastReport",
    "NowcastSession",
    "Nowcaster",
    "NowcasterConfig",
    "Predictor",
    "SnapshotError",
    "TrajectoryError",
    "WiringReport",
    "__version__",
    "align",
    "callbacks",
    "check_wiring",
    "load_predictor",
    "merge",
    "metanet",
    "plot_run",
    "run_record",
]

_ON_DEMAND = {"align": "nino.alignment", "merge": "nino.alignment", "metanet": ""}
"""Names that are imported when they are first asked for, and from where."""


def __getattr__(name: str) -> Any:
    """Import what most programs do not need when it is asked for."""
    if name not in _ON_DEMAND:
        raise AttributeError(f"module 'nino' has no attribute {name!r}")
    home = _ON_DEMAND[name]
    return getattr(import_module(home), name) if home else import_module(f"nino.{name}")
