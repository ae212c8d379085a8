"""Align models of one architecture neuron by neuron, and merge them."""

from nino.alignment.align import Alignment, align
from nino.alignment.barrier import BarrierCurve, barrier_curve, reestimate_batch_norm
from nino.alignment.merge import merge
from nino.alignment.permutations import Permutations

__all__ = ["Alignment", "BarrierCurve", "Permutations", "align", "barrier_curve", "merge", "reestimate_batch_norm"]
