"""Compare training methods on a training of one's own: trainings, baselines, numbers, tables and pictures."""

from nino.evaluation.comparison import Comparison, compare
from nino.evaluation.training import Task

__all__ = ["Comparison", "Task", "compare"]
