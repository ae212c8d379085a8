"""What a training loop of one's own writes down of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from nino.errors import NinoError
from nino.session.report import NowcastReport


def run_record(
    losses: Sequence[Tensor | float], reports: Iterable[NowcastReport], steps: Sequence[int] | None = None
) -> dict[str, Any]:
    """What a training loop writes down of a run, for :func:`plot_run`; goes into JSON as it is.

    Args:
        losses: training losses, oldest first.
        reports: of the run's nowcasts, such as ``optimizer.reports``.
        steps: the update of each loss; by default 1, 2, 3, ...

    Returns:
        ``{"losses": [...], "steps": [...], "nowcasts": [report.as_record(), ...]}``; losses that are not finite are
        ``None``.

    Raises:
        NinoError: if there are not as many steps as losses, or they are no numbers.

    Example:
        >>> run_record([2.0, float("nan")], [])
        {'losses': [2.0, None], 'steps': [1, 2], 'nowcasts': []}
    """
    try:
        values = [float(loss.detach() if isinstance(loss, Tensor) else loss) for loss in losses]
        numbers = list(range(1, len(values) + 1)) if steps is None else [int(step) for step in steps]
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise NinoError(f"losses must be numbers (NaN where unknown) and steps whole numbers: {reason}") from error
    if len(numbers) != len(values):
        raise NinoError(f"expected the update of every loss, got {len(numbers)} steps for {len(values)} losses")
    return {
        "losses": [value if math.isfinite(value) else None for value in values],
        "steps": numbers,
        "nowcasts": [_as_record(report) for report in reports],
    }


def _as_record(report: object) -> dict[str, Any]:
    if not isinstance(report, NowcastReport):
        raise NinoError(f"reports must be NowcastReports, such as optimizer.reports, got a {type(report).__name__}")
    return report.as_record()
