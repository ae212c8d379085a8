"""What a jump was worth, on synthetic curves of which that is known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest

from nino.session.judge.worth import (
    MIN_LOSSES,
    UNKNOWN,
    Pace,
    Stretch,
    Worth,
    sum_of,
    summarise,
    worth_of,
)

PERIOD, SETTLING = 500, 150


def stretches(
    loss: Callable[[float], float], saved: Sequence[float], noise: float, seed: int, bump: float = 0.0
) -> list[Stretch]:
    """Of a run that jumps at the end of every period but the first two, ahead by so many steps each.

    Args:
        loss: by steps of training alone.
        saved: of every jump.
        noise: standard deviation of single losses.
        seed: of the noise.
        bump: by how much the loss rises at a jump; it comes back within some 50 steps.
    """
    draw, ahead, found = random.Random(seed), 0.0, []
    for period in range(len(saved) + 2):
        begin = period * PERIOD
        if period >= 2:
            ahead += saved[period - 2]
        left_out = SETTLING if period >= 2 else 0
        losses = [
            loss(step + ahead) + (bump * math.exp(-(step - begin) / 50) if period >= 2 else 0) + draw.gauss(0, noise)
            for step in range(begin + left_out + 1, begin + PERIOD + 1)
        ]
        stretch = summarise(begin + left_out + 1, losses)
        assert stretch is not None
        found.append(stretch)
    return found


def estimated(found: Sequence[Stretch], rate_changes: Sequence[float] = ()) -> list[Worth]:
    """What the jumps between stretches were worth."""
    pace, worths = Pace.of(found[0]), []
    for number, stretch in enumerate(found[1:], start=1):
        change = rate_changes[number] if rate_changes else 0.0
        if number >= 2:
            worths.append(worth_of(pace, stretch, rate_change=change))
        pace = pace.after(stretch, has_jumped=number >= 2, rate_change=change)
    return worths


def logarithm(step: float) -> float:
    return 6 - 0.5 * math.log(step)


def test_without_noise_saved_steps_are_found() -> None:
    # The first is exact. After it the loss falls as of a training that is ahead, on no exact line in its own steps.
    saved = [200.0, 0.0, -300.0, 400.0]
    for worth, truth in zip(estimated(stretches(logarithm, saved, 0.0, 0)), saved, strict=True):
        assert worth.steps == pytest.approx(truth, abs=1 if truth == 200 else 0.2 * PERIOD)
        assert worth.noise == pytest.approx(0, abs=1)
        assert worth.low <= truth <= worth.high


@pytest.mark.parametrize("saved", [400.0, 0.0, -400.0])
def test_intervals_hold_what_was_saved(saved: float) -> None:
    held = 0
    for seed in range(20):
        worths = estimated(stretches(logarithm, [saved] * 5, 0.05, seed))
        held += sum(worth.low <= saved <= worth.high for worth in worths)
    assert held >= 85  # of 100


@pytest.mark.parametrize(("saved", "says"), [(2000.0, 1), (-1000.0, -1)])
def test_what_is_large_is_clear_and_has_its_sign(saved: float, says: int) -> None:
    *others, last = estimated(stretches(logarithm, [0.0] * 5 + [saved], 0.005, 0))
    assert last.is_clear(PERIOD) and min(last.low * says, last.high * says) > 0
    assert last.low <= saved <= last.high
    assert all(other.low <= 0 <= other.high for other in others)


def test_noise_is_unclear() -> None:
    for seed in range(10):
        for worth in estimated(stretches(logarithm, [200.0] * 3, 1.0, seed)):
            assert not worth.is_clear(PERIOD) or worth.low <= 200 <= worth.high
    clear = [w.is_clear(PERIOD) for seed in range(10) for w in estimated(stretches(logarithm, [200.0] * 3, 1.0, seed))]
    assert sum(clear) <= 2  # of 30


def test_a_loss_that_does_not_fall_says_nothing() -> None:
    assert estimated(stretches(lambda step: 3.0, [100.0], 0.1, 0)) == [UNKNOWN]
    assert not UNKNOWN.is_clear(math.inf)
    assert UNKNOWN.in_words(100) == "steps saved: unclear"


@pytest.mark.parametrize("last_rate", [0.05, 0.3])
def test_the_decay_of_the_learning_rate_is_no_jump(last_rate: float) -> None:
    """A loss that falls faster as the rate decays, from which no jump saved anything."""
    end = 7 * PERIOD
    rates = [1 - (1 - last_rate) * period * PERIOD / end for period in range(1, 8)]

    def loss(step: float) -> float:
        return logarithm(step) - 0.3 * (1 - last_rate) * min(step / end, 1.0)

    changes = [0.0, *(math.log(after / before) for before, after in pairwise(rates))]
    for seed in range(5):
        worths = estimated(stretches(loss, [0.0] * 5, 0.02, seed), changes)
        assert not any(worth.low > 0 or worth.high < 0 for worth in worths)


def test_a_loss_that_still_comes_back_from_jumps_says_less() -> None:
    plain, bumped = (stretches(logarithm, [0.0] * 3, 0.001, 0, bump) for bump in (0.0, 0.5))
    assert all(bent.bend > 0.01 > line.bend for bent, line in zip(bumped[2:], plain[2:], strict=True))
    for worth, other in zip(estimated(bumped)[1:], estimated(plain)[1:], strict=True):  # the first has none behind
        assert worth.low <= 0 <= worth.high
        assert worth.steps - worth.low > other.steps - other.low


def test_the_line_of_a_stretch() -> None:
    # Losses at steps 10 to 29 on 4 - 2 ln(step), the NaN and the missing one left out.
    losses: list[float | None] = [4 - 2 * math.log(step) for step in range(10, 30)]
    losses[3], losses[7] = math.nan, None
    stretch = summarise(10, losses)
    assert stretch is not None and (stretch.count, stretch.last) == (18, 29)
    assert stretch.fall == pytest.approx(2, rel=1e-12) and stretch.bend == pytest.approx(0, abs=1e-6)
    assert stretch.level == pytest.approx(4 - 2 * stretch.centre, rel=1e-12)


def test_too_few_losses_say_nothing() -> None:
    assert summarise(1, [1.0] * (MIN_LOSSES - 1)) is None
    assert summarise(1, [1.0] * (MIN_LOSSES - 1) + [math.inf, math.nan, None]) is None
    assert summarise(1, [1.0] * MIN_LOSSES) is not None


def test_a_stretch_without_a_jump_tells_the_fall_by_its_level() -> None:
    first, second = stretches(logarithm, [], 0.05, 3)
    plain, jumped = (Pace.of(first).after(second, has_jumped=has_jumped) for has_jumped in (False, True))
    assert plain.variance < jumped.variance
    assert abs(plain.fall - 0.5) < 0.05


def test_a_trend_goes_through_its_state() -> None:
    pace = Pace.of(stretches(logarithm, [], 0.05, 3)[0])
    assert Pace.parse(pace.as_dict()) == pace
    for spoil in ({"count": 3}, {"spread": 0.0}, {"unheard": 1}):
        with pytest.raises((TypeError, ValueError)):
            Pace.parse({**pace.as_dict(), "stretch": {**pace.as_dict()["stretch"], **spoil}})


def test_errors_of_the_trend_do_not_average_out() -> None:
    # Half-widths of 10 by the pace alone: four jumps 40; by noise alone: 20.
    assert sum_of([Worth(5, -5, 15)] * 4) == Worth(20, -20, 60)
    noisy = sum_of([Worth(5, -5, 15, noise=10)] * 4)
    assert (noisy.low, noisy.high) == (pytest.approx(0), pytest.approx(40))
    assert not sum_of([Worth(5, -5, 15), UNKNOWN]).is_known
    assert sum_of([]) == Worth(0, 0, 0)
