"""Numbers of comparisons, from curves made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from nino.evaluation.report import format_markdown
from nino.evaluation.tables import (
    Goal,
    at_best_rates,
    best_rate,
    by_budget,
    by_setting,
    decisions,
    loss_rise,
    map_numbers,
    mean_curve,
    paired_p_value,
    percent_undone,
    spread,
    summarise,
)

ACCURACY = Goal("eval_accuracy", True, (0.5, 0.9))
LOSS = Goal("eval_loss", False, (2.0,))


def result(method: str, values: list[float | None], seed: int = 0, **settings: Any) -> dict[str, Any]:
    """A hand-made result: values of both metrics after 10, 20, ... steps."""
    cell = {"task": "t", "method": method, "seed": seed, "learning_rate": 0.1, "schedule": "constant", "steps": 40}
    curve = [{"step": 10 * (i + 1), "eval_accuracy": v, "eval_loss": v} for i, v in enumerate(values)]
    diverged = settings.pop("diverged", False)
    nowcasts = [{"nowcast/outcome": "applied", "nowcast/step": 9, "nowcast/seconds": s} for s in (0.5, 0.25)]
    return {
        "cell": {**cell, **settings},
        "curve": curve,
        "diverged": diverged,
        "seconds": 9.0,
        "cpu_seconds": 8.0,
        "training_losses": [],
        "nowcasts": nowcasts if ":" in method else [],
    }


def summary_of(results: list[dict[str, Any]], goal: Goal) -> dict[str, dict[str, Any]]:
    rows = map_numbers(summarise(by_setting(results), {"t": goal}), str)
    return {row["method"]: row for row in rows}


def test_numbers_of_hand_made_curves() -> None:
    rows = summary_of(
        [
            result("adam", [0.4, 0.5, 0.7, 0.6]),
            result("adam", [0.4, 0.6, 0.7, 0.8], seed=1),
            result("nino:x", [0.3, 0.7, 0.7, 0.9]),
            result("nino:x", [0.3, 0.6, 0.7, 0.75], seed=1),
        ],
        ACCURACY,
    )
    adam, nino = rows["adam"], rows["nino:x"]
    # Adam's best of seed 0 is 0.7 (after 30 steps), of seed 1 0.8 (after 40), which nino:x reaches with seed 0 only.
    assert adam["to baseline's best"] == "35 ± 7.1" and adam["% of baseline's steps"] == "100 ± 0"
    assert nino["to baseline's best"] == "20 (1 of 2)" and nino["% of baseline's steps"] == "66.67 (1 of 2)"
    assert adam["to 0.5"] == "20 ± 0" and adam["to 0.9"] is None and nino["to 0.9"] == "40 (1 of 2)"
    assert nino["final"] == "0.825 ± 0.11" and adam["best"] == "0.75 ± 0.071" and nino["seeds"] == 2
    assert nino["nowcasting s"] == "0.75 ± 0" and (adam["wall s"], adam["CPU s"]) == ("9 ± 0", "8 ± 0")
    assert "| nino:x | 2 | 20 (1 of 2) |" in format_markdown([{k: v for k, v in nino.items()}])


def test_numbers_of_losses_and_divergence() -> None:
    rows = summary_of(
        [result("adam", [3.0, 2.0, 2.5, None], diverged=True), result("linear", [2.5, 2.1, 2.0, 1.5])], LOSS
    )
    assert rows["adam"]["to baseline's best"] == "20" and rows["adam"]["final"] is None and rows["adam"]["best"] == "2"
    assert rows["linear"]["to baseline's best"] == "30" and rows["linear"]["% of baseline's steps"] == "150"
    alone = summary_of([result("linear", [1.0])], LOSS)
    assert alone["linear"]["to baseline's best"] is None and alone["linear"]["to 2"] == "10"


def test_own_best_rates() -> None:
    results = [
        result("adam", [3.0, 2.0], learning_rate=0.1),
        result("adam", [1.5, 1.0], learning_rate=0.3),
        result("adam", [1.0, 0.1], learning_rate=0.9, diverged=True),
        result("nino:x", [2.0, 0.9], learning_rate=0.1),
        result("nino:x", [2.0, 1.2], learning_rate=0.3),
        result("nino:x", [2.0, 0.1], learning_rate=0.9),
        result("nino:x", [None, None], seed=1, learning_rate=0.9, diverged=True),
    ]
    rows = {row["method"]: row for row in map_numbers(at_best_rates(by_setting(results), {"t": LOSS}), str)}
    assert rows["adam"]["best lr"] == 0.3 and rows["nino:x"]["best lr"] == 0.1
    assert rows["nino:x"]["to baseline's best"] == "20"
    assert at_best_rates(by_setting(results[:1]), {"t": LOSS}) == []
    assert best_rate({0.1: {"adam": {0: results[2]}}}, "adam", LOSS) is None


def test_quality_by_budget() -> None:
    results = [result("adam", [3.0, 2.0], steps=20), result("adam", [3.0, 2.0, 1.0, 0.5]), result("lawa", [2.0])]
    adam, lawa = map_numbers(by_budget(by_setting(results), {"t": LOSS}), str)
    assert (adam["q(20)"], adam["q(40)"]) == ("2", "0.5") and (lawa["q(20)"], lawa["q(40)"]) == (None, "2")
    assert by_budget(by_setting(results[1:]), {"t": LOSS}) == []


def test_steps_for_the_quality_that_the_baseline_ends_with() -> None:
    # Adam ends at 1 after 20 steps; linear at 2 after 10 and at 0.5 after 40: two thirds of the way in quality, so
    # two thirds in the logarithm: 10 * 4^(2/3) = 25.
    results = [
        result("adam", [2.0, 1.0]),
        result("linear", [2.0]),
        result("linear", [3.0, 2.0, 1.0, 0.5]),
    ]
    for run, steps in zip(results, (20, 10, 40), strict=True):
        run["cell"]["steps"] = steps
    rows = {row["method"]: row for row in map_numbers(by_budget(by_setting(results), {"t": LOSS}), str)}
    assert rows["linear"]["for baseline's q(20)"] == "25"
    assert rows["linear"]["for baseline's q(40)"] is None and rows["adam"]["for baseline's q(20)"] is None


def test_by_how_much_a_jump_lifts_the_training_loss() -> None:
    run = result("nino:x", [1.0] * 4)
    run["nowcasts"] = [
        {"nowcast/step": 50, "nowcast/outcome": "applied"},
        {"nowcast/step": 60, "nowcast/outcome": "rolled back"},
        {"nowcast/step": 300, "nowcast/outcome": "applied"},
    ]
    run["training_losses"] = [9.0] * 10 + [2.0] * 40 + [4.0, 4.0, 4.0, 4.0, 4.0, 3.0, 3.0] + [2.0] * 113 + [8.0] * 133
    assert loss_rise(run) == 2.0  # of the first; after the third comes too little, and what comes late is not its doing
    run["training_losses"][55] = None
    assert loss_rise(run) is None


def test_steps_that_rollbacks_took_back() -> None:
    run = result("nino:x", [1.0] * 4)
    run["cell"]["plan"] = {"rollback_window": 2}
    run["nowcasts"] = [{"nowcast/steps_undone": 2}, {"nowcast/rolled_back": 0.0}, {"nowcast/steps_undone": 1}]
    assert percent_undone(run) == 100 * 3 / run["cell"]["steps"]
    run["cell"]["plan"] = None
    assert percent_undone(run) is None


def test_sentences_compare_with_adam_and_between_weights() -> None:
    runs = [
        result("adam", [0.4, 0.5, 0.6, 0.6]),
        result("nino:old", [0.4, 0.6, 0.7, 0.7]),
        result("nino:new", [0.7, 0.7, 0.6, 0.6]),
        result("linear", [0.1, 0.2, 0.3, 0.4]),
    ]
    setting = "t, lr 0.1, constant, 40 steps: "
    assert [text.removeprefix(setting) for text in decisions(by_setting(runs), {"t": ACCURACY})] == [
        "adam's best, there after 30 steps, nino:old reached after 20 (67%); final 0.7 against 0.6",
        "adam's best, there after 30 steps, nino:new reached after 10 (33%); final 0.6 against 0.6",
        "adam's best, there after 30 steps, linear reached never; final 0.4 against 0.6",
        "nino:old's best, there after 30 steps, nino:new reached after 10 (33%); final 0.6 against 0.7",
    ]
    without_adam = decisions(by_setting(runs[1:3]), {"t": ACCURACY})
    assert len(without_adam) == 1 and "nino:new reached after 10 (33%)" in without_adam[0]
    two_seeds = [*runs[:2], result("adam", [0.9], seed=1), result("nino:old", [0.1], seed=1)]
    assert "with 1 of 2 seeds, after 20" in decisions(by_setting(two_seeds), {"t": ACCURACY})[0]
    apart = decisions(by_setting([runs[0], result("linear", [1.0], seed=5)]), {"t": ACCURACY})
    assert "no seed in common" in apart[0]


def test_what_is_reached_for_a_moment_is_told_from_what_lasts() -> None:
    adam = result("adam", [0.1, 0.1, 0.5, 0.4, 0.4], steps=50)
    adam["curve"][2]["step"], adam["curve"][3]["step"], adam["curve"][4]["step"] = 200, 250, 300
    nino = result("nino:x", [0.6, 0.2, 0.2, 0.5, 0.6], steps=50)
    for point, step in zip(nino["curve"], (50, 100, 149, 150, 200), strict=True):
        point["step"] = step
    row = summary_of([adam, nino], ACCURACY)["nino:x"]
    assert (row["to baseline's best"], row["again"], row["again, %"]) == ("50", "150", "75")
    nino["curve"] = nino["curve"][:3]
    assert summary_of([adam, nino], ACCURACY)["nino:x"]["again"] in (None, "None")


def test_a_verdict_says_that_no_jump_was_kept() -> None:
    adam, nino = result("adam", [0.4, 0.5]), result("nino:x", [0.4, 0.5])
    assert "without a jump" not in decisions(by_setting([adam, nino]), {"t": ACCURACY})[0]
    nino["nowcasts"] = [{"nowcast/outcome": "refused"}] * 2
    (sentence,) = decisions(by_setting([adam, nino]), {"t": ACCURACY})
    assert "(100%), without a jump, since every nowcast failed or was undone; final" in sentence


def test_mean_curves_and_spreads() -> None:
    curves = [result("adam", [1.0, 2.0, 3.0]), result("adam", [3.0, None, 5.0], seed=1)]
    assert mean_curve(curves, "eval_loss") == [[10, 2.0], [30, 4.0]]
    assert mean_curve([], "eval_loss") == []
    assert spread([None, None]) is None and str(spread([1.0])) == "1"


def test_the_own_optimizer_is_a_baseline_too() -> None:
    runs = [result("own", [0.4, 0.5, 0.6, 0.6]), result("own+nino:x", [0.6, 0.6, 0.7, 0.7])]
    row = summary_of(runs, ACCURACY)["own+nino:x"]
    assert (row["to baseline's best"], row["% of baseline's steps"]) == ("10", "33.33")
    assert decisions(by_setting(runs), {"t": ACCURACY})[0].startswith(
        "t, lr 0.1, constant, 40 steps: own's best, there"
    )


def test_differences_are_tested_in_pairs() -> None:
    # Differences -0.1, -0.3, -0.2 have mean -0.2 and deviation 0.1: t = -0.2 / (0.1 / sqrt 3) = -3.46, 2 degrees.
    assert paired_p_value([[1.0, 2.0, 3.0], [1.1, 2.3, 3.2]]) == pytest.approx(0.0742, abs=1e-4)
    assert paired_p_value([[1.0, 2.0, None], [1.1, 2.3, 3.2]]) is None, "two seeds say nothing"
    assert paired_p_value([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]]) is None, "no spread to compare with"
    runs = [result(m, [v + s / 10], seed=s) for m, v in (("adam", 0.4), ("nino:x", 0.5)) for s in range(3)]
    runs[-1]["curve"][0]["eval_accuracy"] += 0.05
    assert decisions(by_setting(runs), {"t": ACCURACY})[0].endswith("(p = 0.02, paired t-test over 3 seeds)")
