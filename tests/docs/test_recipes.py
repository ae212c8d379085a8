"""What docs/recipes shows runs as it stands, and a run that was interrupted ends with the same bits."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from snippets import ROOT, run_snippets, snippets_of

from tasks.wired_zoo import import_timm

NEEDS = {"lightning": "lightning", "timm": "timm", "titan": "torch", "trl": "trl"}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Lightning warns of few workers and of data that it cannot fast-forward; that is not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.getLogger("lightning").handlers.clear()


def run_page(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that a page's Python leaves."""
    if find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    if name == "timm":
        import_timm()
    return run_snippets(snippets_of(ROOT / "docs" / "recipes" / f"{name}.md"), folder, monkeypatch)


def test_every_recipe_is_run() -> None:
    assert {page.stem for page in (ROOT / "docs" / "recipes").glob("*.md")} == {*NEEDS}


@pytest.mark.parametrize("name", ["timm", "titan"])
def test_a_page_runs_and_resumes_exactly(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The page itself resumes a run and compares the weights; here what the optimizer keeps is compared as well."""
    names = run_page(name, tmp_path, monkeypatch)
    whole, resumed = names["training" if name == "timm" else "run"], names["resumed"]
    mine, its = (one.optimizer.optimizer.state_dict()["state"] for one in (whole, resumed))
    assert mine.keys() == its.keys() and mine
    assert not any("observe(loss) came after step()" in message for message in caplog.messages)
    assert all(torch.equal(mine[key][entry], its[key][entry]) for key in mine for entry in mine[key])
    assert [report.outcome for report in resumed.optimizer.reports] == [
        report.outcome for report in whole.optimizer.reports
    ][-len(resumed.optimizer.reports) :]


@pytest.mark.slow
def test_trl_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page compares the weights; here what the nowcasts did is compared as well."""
    pytest.importorskip("peft")
    names = run_page("trl", tmp_path, monkeypatch)
    whole, resumed = (
        next(one for one in names[name].callback_handler.callbacks if isinstance(one, names["NowcastCallback"])).reports
        for name in ("whole", "resumed")
    )
    assert [report.step for report in whole] == [20, 40]
    assert [(report.step, report.outcome) for report in resumed] == [(40, whole[1].outcome)]


def saver(path: Path, epoch: int) -> Any:
    """Saves a checkpoint at the end of an epoch."""
    from lightning.pytorch import Callback

    class Saver(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch + 1 == epoch:
                trainer.save_checkpoint(path)

    return Saver()


@pytest.mark.parametrize("kind", ["callback", "wrapper"])
def test_lightning_resumes_exactly(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run_page("lightning", tmp_path, monkeypatch)
    whole, expected = names["module"], names["nowcasts"].reports
    made = [names["Wrapped" if kind == "wrapper" else "Sines"]() for _ in range(2)]
    made[0].load_state_dict(beginning := names["Sines"]().state_dict())
    attached = [names["LightningNowcastCallback"]("nino-base", period=20) for _ in range(2)]
    beside = [[one] if kind == "callback" else [] for one in attached]
    first = names["train"](made[0], [*beside[0], saver(tmp_path / "4.ckpt", 4)], epochs=8)
    again = names["train"](made[1], beside[1], epochs=8, ckpt_path=str(tmp_path / "4.ckpt"))
    assert all(torch.equal(a, b) for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True))
    one, two = (
        (attached[i].reports if kind == "callback" else trainer.optimizers[0].reports)
        for i, trainer in enumerate((first, again))
    )
    assert [report.step for report in one] == [report.step for report in expected] and beginning
    assert [(r.step, r.outcome, r.loss_after) for r in two] == [(r.step, r.outcome, r.loss_after) for r in one][
        -len(two) :
    ]
    assert any(not torch.equal(a, b) for a, b in zip(whole.parameters(), made[0].parameters(), strict=True))


def test_lightning_hears_the_loss_of_whole_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held against a loop that spells it out: the mean over four micro-batches, of the same weights."""
    names = run_page("lightning", tmp_path, monkeypatch)
    torch.manual_seed(0)
    module = names["Sines"]()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=64)
    losses: list[float] = []
    batches = [*names["batches"]()]
    for step in range(20):
        own = []
        for inputs, targets in batches[4 * (step % 8) : 4 * (step % 8) + 4]:
            loss = torch.nn.functional.mse_loss(module.network(inputs).squeeze(1), targets)
            (loss / 4).backward()
            own.append(loss.item())
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(sum(own) / 4)
    before = len(names["nowcasts"].session.monitor.losses)
    report = names["nowcasts"].reports[0]
    window = names["nowcasts"].session.monitor.config.losses_before
    assert report.loss_before == pytest.approx(sum(losses[-window:]) / min(window, 20), rel=1e-5) and before >= 0


def test_lightning_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run_page("lightning", tmp_path, monkeypatch)
    with pytest.raises(names["nino"].NinoError, match="use that or LightningNowcastCallback, not both"):
        names["train"](names["Wrapped"](), [names["LightningNowcastCallback"](period=20)], epochs=1)

    class Layers(names["Sines"]):  # type: ignore[misc]
        """Calls single layers alone."""

        def training_step(self, batch: Any, index: int) -> Any:
            x = batch[0]
            for layer in self.network:
                x = layer(x)
            return torch.nn.functional.mse_loss(x.squeeze(1), batch[1])

    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("nino").addHandler(handler)
    names["train"](Layers(), [names["LightningNowcastCallback"]("nino-base", period=20)], epochs=4)
    assert sum("pass the module whose forward training calls" in line for line in heard) == 1
