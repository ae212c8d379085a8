"""Nino: nowcast the weights of a training neural network (NiNo, arXiv:2409.04434)."""

from nino.errors import CheckpointError, GraphError, NinoError, SnapshotError, TrajectoryError
from nino.graph import NeuralGraph
from nino.model import NowcasterConfig
from nino.nowcaster import Nowcaster

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "GraphError",
    "NeuralGraph",
    "NinoError",
    "Nowcaster",
    "NowcasterConfig",
    "SnapshotError",
    "TrajectoryError",
    "__version__",
]
