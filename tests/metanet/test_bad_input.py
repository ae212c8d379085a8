"""What a metanetwork is told wrongly, it says in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_training import zoo
from torch import Tensor, nn

from nino.errors import CheckpointError, NinoError
from nino.metanet import GraphMetanetwork, fit


def small(**settings: object) -> GraphMetanetwork:
    return GraphMetanetwork(hidden=8, layers=1, **settings)  # type: ignore[arg-type]


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("not today")


def test_models_and_graphs() -> None:
    models, graphs, targets = zoo(2)
    net = small()
    with pytest.raises(NinoError, match="zoo is empty"):
        fit(net, [], torch.zeros(0))
    with pytest.raises(NinoError, match="1 graph for 2 models"):
        fit(net, models, targets, graphs=graphs[:1])
    with pytest.raises(NinoError, match=r"0\.weight should be \(6, 3\) and is \(4, 3\)"):
        net(models[1], graphs[0])
    with pytest.raises(NinoError, match="state dicts have no graph"):
        fit(net, [model.state_dict() for model in models], targets)
    with pytest.raises(NinoError, match="give the model's graph"):
        net(models[0])
    with pytest.raises(NinoError, match="takes a list of models, got one Sequential"):
        fit(net, models[0], targets, graphs=graphs)  # type: ignore[arg-type]
    with pytest.raises(
        NinoError, match=r"model 0 of the zoo: a model must be a torch\.nn\.Module or a state dict, got str"
    ):
        fit(net, ["a.pt"], targets[:1], graphs=graphs[:1])  # type: ignore[list-item]
    with pytest.raises(NinoError, match=r"a graph must be a nino\.NeuralGraph, got int"):
        fit(net, models[:1], targets[:1], graphs=[3])  # type: ignore[list-item]
    with pytest.raises(NinoError, match="fit trains a GraphMetanetwork, got Linear"):
        fit(nn.Linear(1, 1), models, targets, graphs=graphs)  # type: ignore[arg-type]
    with pytest.raises(NinoError, match="model 0 of the zoo, Untraceable, cannot be traced"):
        fit(net, [Untraceable()], targets[:1], example_inputs=torch.ones(2, 3))
    with pytest.raises(NinoError, match="give modules, not state dicts"):
        small(variant="probe")(models[0].state_dict(), graphs[0])
    with pytest.raises(NinoError, match="16 features per node and this metanetwork reads 20"):
        net(small(num_positions=4).read(models[0], graphs[0]))


def test_weights_that_are_no_numbers() -> None:
    models, graphs, targets = zoo(2)
    broken = dict(models[0].state_dict())
    broken["2.bias"] = torch.full((2,), torch.nan)
    with pytest.raises(NinoError, match=r"model 1 of the zoo: 2\.bias holds NaN"):
        fit(small(), [models[0], broken], targets, graphs=graphs[:1] * 2)


def test_targets_and_settings_of_training() -> None:
    models, graphs, targets = zoo(2)
    net = small(outputs=2)
    for wrong, said in (
        (targets[:1], "got 1 target for 2 models"),
        (None, "got NoneType for 2 models"),
        (["a", "b"], "targets must be numbers"),
        (targets + 1, "between 0 and 1"),
        (targets * torch.nan, "a target is NaN"),
        (torch.ones(2, 3), r"targets must be \[models\] or \[models, outputs\] with 2 outputs, got \(2, 3\)"),
    ):
        with pytest.raises(NinoError, match=said):
            fit(net, models, wrong, graphs=graphs)
    for classes in ([0, 2], [0.5, 1], [[0], [1]]):
        with pytest.raises(NinoError, match="one whole number from 0 to 1 per model"):
            fit(net, models, classes, graphs=graphs, loss="cross-entropy")
    with pytest.raises(NinoError, match="loss must be one of bce, mse, cross-entropy"):
        fit(net, models, targets, graphs=graphs, loss="hinge")
    with pytest.raises(NinoError, match="must be a function"):
        fit(small(head="equivariant"), models, targets, graphs=graphs)
    for setting in ("steps", "batch"):
        with pytest.raises(NinoError, match=f"{setting} must be a whole number of at least 1, got 0"):
            fit(net, models, targets, graphs=graphs, **{setting: 0})  # type: ignore[arg-type]


def test_settings_and_folders(tmp_path: Path) -> None:
    with pytest.raises(NinoError, match="variant must be one of mpnn, ng-gnn, ng-t, scale, probe, got 'gat'"):
        GraphMetanetwork(variant="gat")
    with pytest.raises(NinoError, match="unexpected keyword argument 'width'"):
        GraphMetanetwork(width=3)
    with pytest.raises(CheckpointError, match="neither a folder nor a repository"):
        GraphMetanetwork.from_pretrained(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no network of this kind"):
        GraphMetanetwork.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"depth": 3}')
    with pytest.raises(CheckpointError, match="unknown setting 'depth'"):
        GraphMetanetwork.from_pretrained(tmp_path)
