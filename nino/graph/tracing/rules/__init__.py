"""One rule per kind of operation: the indices of its outputs, and which of its inputs' must be the same.

A rule may unify, factor, cut and pin indices. Afterwards the operation must commute with relabelling every axis that is
not pinned; see :mod:`nino.graph.tracing` for what that takes. An operation without a rule pins all that it touches.
"""

from nino.graph.tracing.rules import contractions, elementwise, losses, norms, places, reductions, tables, views
from nino.graph.tracing.rules.common import RULES

__all__ = ["RULES", "contractions", "elementwise", "losses", "norms", "places", "reductions", "tables", "views"]
