"""What nowcasting will cost a run, before it is paid for: bytes per process, from shapes alone."""

from nino.costs.estimate import CostEstimate, estimate_costs

__all__ = ["CostEstimate", "estimate_costs"]
