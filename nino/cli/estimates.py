"""What ``nino estimate`` says: the memory of nowcasting, one line a part."""

from __future__ import annotations

from collections.abc import Iterator

from nino.costs import CostEstimate
from nino.numbers import counted, size_of
from nino.plan import NowcastPlan

PLACES = {"cpu": "in host memory", "device": "beside the parameters", "disk": "on disk"}


def lines_of(costs: CostEstimate, plan: NowcastPlan) -> Iterator[str]:
    """An estimate in words and numbers; parts of no size are left out.

    Args:
        costs: of one process.
        plan: of the run, nothing left open.
    """
    place, device = PLACES[plan.snapshots_on or "cpu"], "where the parameters are"
    for what, number, remark in (
        ("parameters, there anyway", costs.parameters, ""),
        ("snapshots", costs.snapshots, f"each {size_of(costs.snapshot)}, {place}"),
        ("on its way to the disk", costs.under_way, "in host memory, one snapshot at a time"),
        ("mean of weights", costs.mean, f"of which a snapshot is made, {device}"),
        ("rest of a jump", costs.ramp, f"for {counted(plan.ramp or 0, 'step')} after it, {device}"),
        ("movement in a nowcast", costs.movement, f"how far weights are to go, {device}"),
        ("rollback copy", costs.rollback_copy, f"for the rollback window, {place}"),
        ("kept in all", costs.kept, place),
        ("during a nowcast", costs.nowcast, f"at most, {device}"),
        ("backup in a nowcast", costs.backup, "snapshots are not exact, and there is no rollback copy"),
        ("at most, all together", costs.peak, "in a nowcast, or while a snapshot is averaged"),
        ("checkpoints grow by", costs.checkpoint, "at most"),
    ):
        if number:
            yield f"  {what:<26}{size_of(number):>12}   {remark}".rstrip()
