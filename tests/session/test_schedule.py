"""The rhythm of snapshots and nowcasts, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from nino import NinoError
from nino.session.schedule import Schedule, horizon_at, is_nowcast_step, is_over, is_snapshot_step


def nowcasts(config: Schedule, until: int) -> list[tuple[int, int]]:
    """(update, horizon) of every nowcast in the first ``until`` steps."""
    return [(step, horizon_at(step, config)) for step in range(until + 1) if is_nowcast_step(step, config)]


# sqrt(40) = 6.325. Over N nowcasts: round(linspace(6.325, 1, N) ** 2).
TABLES: dict[str, tuple[dict[str, Any], int, list[tuple[int, int]]]] = {
    # N = 10: 6.325 - 0.5916 i -> 40, 32.9, 26.4, 20.7, 15.7, 11.3, 7.7, 4.8, 2.5, (1 at the very end: not done)
    "published": (
        {"period": 1000, "max_steps": 10_000},
        10_000,
        list(zip(range(1000, 10_000, 1000), [40, 33, 26, 21, 16, 11, 8, 5, 3], strict=True)),
    ),
    # The run ends after the tenth nowcast, which is done then.
    "published, some steps more": (
        {"period": 1000, "max_steps": 10_001},
        10_001,
        list(zip(range(1000, 10_001, 1000), [40, 33, 26, 21, 16, 11, 8, 5, 3, 1], strict=True)),
    ),
    # N = 5: 6.325 - 1.3311 i -> 6.325, 4.993, 3.662, 2.331, 1 -> 40, 24.9, 13.4, 5.4, 1
    "five": ({"period": 10, "max_steps": 55}, 55, [(10, 40), (20, 25), (30, 13), (40, 5), (50, 1)]),
    "one": ({"period": 10, "max_steps": 15}, 15, [(10, 40)]),
    "two": ({"period": 10, "max_steps": 25}, 25, [(10, 40), (20, 1)]),
    # Not at the end itself: nothing would come after the jump.
    "the only one at the very end": ({"period": 10, "max_steps": 10}, 10, []),
    "a run shorter than a period": ({"period": 10, "max_steps": 9}, 9, []),
    "trained on after the announced end": ({"period": 10, "max_steps": 20}, 50, [(10, 40)]),
    # Unknown length: one period, that is 5 intervals, ahead.
    "unknown length": ({"period": 10}, 35, [(10, 5), (20, 5), (30, 5)]),
    "unknown length, short-sighted": ({"period": 10, "max_horizon": 3}, 25, [(10, 3), (20, 3)]),
    # A plan for a part of the run: as if it ended there, and what comes after is left alone. N = 5 as in "five".
    "until before the end": (
        {"period": 10, "max_steps": 100, "stop_after": 55},
        100,
        [(10, 40), (20, 25), (30, 13), (40, 5), (50, 1)],
    ),
    "until of a run of unknown length": ({"period": 10, "stop_after": 25}, 60, [(10, 40), (20, 1)]),
    "until after the end": ({"period": 10, "max_steps": 25, "stop_after": 80}, 80, [(10, 40), (20, 1)]),
    # Linear decay over N = 4: 10, 7, 4, 1.
    "linear": (
        {"period": 10, "max_steps": 45, "max_horizon": 10, "horizon_decay": 1},
        45,
        [(10, 10), (20, 7), (30, 4), (40, 1)],
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_nowcasts_and_their_horizons(case: str) -> None:
    settings, until, expected = TABLES[case]

    assert nowcasts(Schedule(**settings), until) == expected


def test_the_horizon_belongs_to_the_period_that_a_step_lies_in() -> None:
    config = Schedule(period=10, max_steps=25)  # two nowcasts: horizons 40 and 1

    assert [horizon_at(step, config) for step in (0, 1, 9, 10, 11, 20, 25, 99)] == [40, 40, 40, 40, 1, 1, 1, 1]
    with pytest.raises(NinoError, match="step must be at least 0, got -1"):
        horizon_at(-1, config)


def test_snapshots_are_evenly_spaced_and_every_nowcast_follows_one() -> None:
    config = Schedule(period=15, context=5, max_steps=40)

    assert config.interval == 3
    assert [s for s in range(20) if is_snapshot_step(s, config)] == [3, 6, 9, 12, 15, 18]
    assert all(is_snapshot_step(s, config) for s in range(100) if is_nowcast_step(s, config))


@pytest.mark.parametrize(("stop_after", "last_nowcast"), [(25, 20), (31, 30), (30, 20)])
def test_no_snapshot_is_taken_that_no_nowcast_reads(stop_after: int, last_nowcast: int) -> None:
    config = Schedule(period=10, stop_after=stop_after)

    assert max(step for step in range(100) if is_nowcast_step(step, config)) == last_nowcast
    assert max(step for step in range(100) if is_snapshot_step(step, config)) == last_nowcast
    assert not is_over(last_nowcast, config) and is_over(last_nowcast + 1, config)
    assert is_snapshot_step(1000, Schedule(period=10, max_steps=stop_after)), "a longer run may be resumed from it"
