"""What nowcasting will cost a run, before it is paid for: memory, work, traffic, seconds and overhead per rank."""

from nino.costs.rates import Rates, default_rates, estimate_update_seconds
from nino.costs.run import RunPlan, plan
from nino.costs.settings import Settings
from nino.costs.work import exchange_per_nowcast, summed_per_nowcast, traffic_per_nowcast

__all__ = [
    "Rates",
    "RunPlan",
    "Settings",
    "default_rates",
    "estimate_update_seconds",
    "exchange_per_nowcast",
    "plan",
    "summed_per_nowcast",
    "traffic_per_nowcast",
]
