"""The loss curves of runs with their nowcasts marked, from whatever the runs left behind."""

from nino.plots.picture import plot_run
from nino.plots.record import run_record

__all__ = ["plot_run", "run_record"]
