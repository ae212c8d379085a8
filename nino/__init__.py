"""Nino: nowcast the weights of a training neural network (NiNo, arXiv:2409.04434)."""

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
    "callbacks",
    "check_wiring",
    "load_predictor",
    "plot_run",
    "run_record",
]
