"""Nino: nowcast the weights of a training neural network (NiNo, arXiv:2409.04434)."""

from nino import callbacks
from nino.costs import RunPlan, plan
from nino.errors import CheckpointError, GraphError, NinoError, SnapshotError, TrajectoryError
from nino.graph import NeuralGraph
from nino.graph.check import WiringReport, check_wiring
from nino.optimizer import NowcastOptimizer
from nino.plots import plot_run, run_record
from nino.predict.model import NowcasterConfig
from nino.predict.nowcaster import Nowcaster
from nino.session import NowcastSession
from nino.session.report import NowcastReport
from nino.session.schedule import ScheduleConfig

__version__ = "0.2.0"

__all__ = [
    "CheckpointError",
    "GraphError",
    "NeuralGraph",
    "NinoError",
    "NowcastOptimizer",
    "NowcastReport",
    "NowcastSession",
    "Nowcaster",
    "NowcasterConfig",
    "RunPlan",
    "ScheduleConfig",
    "SnapshotError",
    "TrajectoryError",
    "WiringReport",
    "__version__",
    "callbacks",
    "check_wiring",
    "plan",
    "plot_run",
    "run_record",
]
