"""Recorded training runs: how they are stored, described and read."""

from nino.data.architecture import build_model, describe_sequential, describe_transformers
from nino.data.trajectory import Trajectory, TrajectoryWriter

__all__ = ["Trajectory", "TrajectoryWriter", "build_model", "describe_sequential", "describe_transformers"]
