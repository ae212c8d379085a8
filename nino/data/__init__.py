"""Recorded training runs: how they are recorded, stored, described and read."""

from nino.data.architecture import build_model, describe_sequential, describe_transformers
from nino.data.memmap import read_memmap
from nino.data.recording import Recorder, record
from nino.data.resampled import ResampledRun
from nino.data.trajectory import Trajectory
from nino.data.writer import TrajectoryWriter

__all__ = [
    "Recorder",
    "ResampledRun",
    "Trajectory",
    "TrajectoryWriter",
    "build_model",
    "describe_sequential",
    "describe_transformers",
    "read_memmap",
    "record",
]
