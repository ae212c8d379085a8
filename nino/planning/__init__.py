"""What nowcasting will cost a run, before it is paid for: memory, work, traffic, seconds and overhead per rank."""

from nino.planning.rates import Rates, default_rates, estimate_update_seconds
from nino.planning.run import RunPlan, plan
from nino.planning.settings import Settings
from nino.planning.work import exchange_per_nowcast, summed_per_nowcast, traffic_per_nowcast

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
