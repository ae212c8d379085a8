"""Resume is exact: saved and resumed anywhere, through any integration, a training equals one in one go to the last
bit."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same

if importlib.util.find_spec("transformers") is None:  # an optional package
    pytest.skip("transformers is not installed", allow_module_level=True)

import integrations
from integrations import Net, Outcome, Setting, adafactor, chained, far_away, llama_with_adapters, nearby
from torch import nn
from torch.optim import SGD

R = 3
"""Updates of rollback_window."""


pytestmark = pytest.mark.usefixtures("quick_collections")


def with_buffers() -> nn.Module:
    return Net(nn.Linear(16, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))


def adapters_of_the_same_model() -> nn.Module:
    """The Trainer saves adapters without the model that they are of."""
    torch.manual_seed(0)
    return llama_with_adapters()


# Snapshots after 3 6 9 | 12 15 18 steps, nowcasts after 9 and 18, which are judged after 12 and 21. The learning rate
# falls, so that horizons depend on the rates that are saved with the snapshots, but not so low that one is left out.
FALLING = {"scheduler": "cosine_with_min_lr", "scheduler_settings": {"min_lr_rate": 0.5}}
ALWAYS = Setting(build=with_buffers, period=9, calls=22, **FALLING)
KEPT = replace(ALWAYS, nowcaster=nearby, attach={"rollback_window": R})
UNDONE = replace(ALWAYS, nowcaster=far_away, attach={"rollback_window": R})
SETTINGS: dict[str, Setting] = {
    "no rollback_window": ALWAYS,
    "kept": KEPT,
    "undone": UNDONE,
    "averaged": replace(ALWAYS, attach={"average_over": 2}),
    "ramping": replace(KEPT, calls=26, attach={"rollback_window": R, "ramp": 2}),
    "undone, SGD": replace(UNDONE, base=lambda model: SGD(model.parameters(), lr=1e-2, momentum=0.9)),
    "undone, Adafactor": replace(UNDONE, base=adafactor),
    "undone, a user's own": replace(UNDONE, base=chained),
    "undone, on the device": replace(UNDONE, attach={"rollback_window": R, "snapshots_on": "device"}),
    "undone, on disk": replace(UNDONE, attach={"rollback_window": R, "snapshots_on": "disk"}),
    "no rollback_window, on disk": replace(ALWAYS, attach={"snapshots_on": "disk"}),
    "accumulation": replace(ALWAYS, accumulation=4),
    "LoRA": replace(ALWAYS, build=adapters_of_the_same_model, counts_tokens=True),
}
BETWEEN_SNAPSHOTS, AT_A_SNAPSHOT, AFTER_A_NOWCAST, IN_WINDOW, AFTER_A_VERDICT = 5, 6, 9, 10, 12
POINTS = (BETWEEN_SNAPSHOTS, AT_A_SNAPSHOT, AFTER_A_NOWCAST, IN_WINDOW, AFTER_A_VERDICT)
INTEGRATIONS = {
    "plain": integrations.plain,
    "callback": integrations.callback,
    "trainer-optimizers": integrations.trainer_optimizers,
    "accelerate": integrations.accelerate,
}


def cells() -> Iterator[tuple[str, str, int]]:
    """All points of the first five settings through every integration, and the hardest one of the others."""
    for number, name in enumerate(SETTINGS):
        for integration in INTEGRATIONS:
            if integration == "trainer-optimizers" and "rollback_window" in SETTINGS[name].attach:
                continue  # nobody tells the wrapper a loss there, so that nothing is ever in its rollback window
            for point in POINTS if number < 5 else (IN_WINDOW,):
                yield name, integration, point


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Setting, Path, Outcome]]:
    """An uninterrupted training, which saved at all points: its setting, folder and outcome."""

    @functools.cache
    def train(name: str, integration: str) -> tuple[Setting, Path, Outcome]:
        folder = tmp_path_factory.mktemp("whole")
        setting = SETTINGS[name]
        if setting.attach.get("snapshots_on") == "disk":
            setting = replace(setting, attach={**setting.attach, "snapshot_folder": folder / "snapshots"})
        return setting, folder, INTEGRATIONS[integration](setting, folder, save=POINTS)

    return train


@pytest.mark.parametrize(("name", "integration", "point"), [*cells()])
def test_resume_is_exact(name: str, integration: str, point: int, whole: Any) -> None:
    setting, folder, expected = whole(name, integration)

    resumed = INTEGRATIONS[integration](setting, folder, start=point)

    assert_same(resumed.model.state_dict(), expected.model.state_dict())
    assert resumed.rates == expected.rates[point // expected.session.schedule.interval :]
    assert resumed.session.step == expected.session.step
    assert resumed.session.monitor.backoff == expected.session.monitor.backoff
    assert resumed.nowcasts == expected.nowcasts[-len(resumed.nowcasts) :]
    assert resumed.losses == pytest.approx(expected.losses[-len(resumed.losses) :], nan_ok=True)
    complete = AFTER_A_NOWCAST + setting.attach.get("ramp", 0) + setting.attach.get("rollback_window", 1)
    assert len(resumed.nowcasts) == (1 if point >= complete else 2)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_what_they_say(name: str, whole: Any) -> None:
    setting, folder, outcome = whole(name, "plain")

    assert [(r.step, r.has_moved, (r.outcome == "rolled back")) for r in outcome.reports] == [
        (9, True, name.startswith("undone")),
        (18, True, name.startswith("undone")),
    ]
    saved = torch.load(folder / f"{IN_WINDOW}.pt", weights_only=True)["optimizer"]["nowcast"]
    assert (saved["rollback_copy"] is not None) == ("rollback_window" in setting.attach)


# Checkpoints without nowcasting state


def _drop_file(folder: Path) -> None:
    (folder / f"checkpoint-{IN_WINDOW}" / "nowcast.pt").unlink()


def _drop_key(path: str) -> Callable[[Path], None]:
    def drop(folder: Path) -> None:
        state = torch.load(folder / path, weights_only=True)
        del state.get("optimizer", state)["nowcast"]
        torch.save(state, folder / path)

    return drop


WITHOUT_STATE: dict[str, Callable[[Path], None]] = {
    "plain": _drop_key(f"{IN_WINDOW}.pt"),
    "callback": _drop_file,
    "trainer-optimizers": _drop_key(f"checkpoint-{IN_WINDOW}/optimizer.pt"),
    "accelerate": _drop_key(f"{IN_WINDOW}/optimizer.bin"),
}


@pytest.mark.parametrize("integration", INTEGRATIONS)
def test_without_nowcasting_state_a_fresh_history_begins(
    integration: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Snapshots after 12 15 18: the nowcast after 18 takes place, of the same horizon as if nothing had happened.
    whole = INTEGRATIONS[integration](ALWAYS, tmp_path, save=[IN_WINDOW])
    WITHOUT_STATE[integration](tmp_path)
    caplog.clear()

    resumed = INTEGRATIONS[integration](ALWAYS, tmp_path, start=IN_WINDOW)

    lines = [r.getMessage() for r in caplog.records if r.name in ("nino.optimizer", "nino.callbacks.trainer")]
    assert len(lines) == 1
    assert "goes on with a fresh history" in lines[0]
    assert resumed.nowcasts == whole.nowcasts[1:]
    assert_same(resumed.weights, whole.weights)


def test_a_callback_joins_a_training_that_began_without_it(tmp_path: Path) -> None:
    # What callbacks put into trainer_state.json makes the Trainer fail at the next save, if the file has no entry of
    # theirs. Ours puts nothing there.
    model = ALWAYS.model()
    arguments = {"restore_callback_states_from_checkpoint": True}
    bare = integrations.trainer(
        ALWAYS, tmp_path, model, save=[4], optimizers=(ALWAYS.base(model), None), arguments=arguments
    )
    bare.train()

    joined = integrations.callback(ALWAYS, tmp_path, start=4, save=[10], arguments=arguments)
    again = integrations.callback(ALWAYS, tmp_path, start=10, arguments=arguments)

    assert [(report.step, report.has_moved) for report in joined.reports] == [(9, False), (18, True)]
    assert_same(again.weights, joined.weights)
