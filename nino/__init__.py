"""Nino: nowcast the weights of a training neural network (NiNo, arXiv:2409.04434)."""

from nino import callbacks
from nino.check import WiringReport, check_wiring
from nino.errors import CheckpointError, GraphError, NinoError, SnapshotError, TrajectoryError
from nino.graph import NeuralGraph
from nino.model import NowcasterConfig
from nino.nowcaster import Nowcaster
from nino.optimizer import NowcastOptimizer
from nino.planning import RunPlan, plan
from nino.plotting import plot_run, run_record
from nino.report import NowcastReport
from nino.schedule import ScheduleConfig
from nino.session import NowcastSession

__version__ = "0.1.0"

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
