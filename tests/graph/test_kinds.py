"""Kinds of models that are easy to wire wrong: what must be found of each, known beforehand, and proved.

Of every block the sizes of the axes that may be relabelled (what a person finds by reading its forward) and whether all
its parameters hang together.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check_zoo import pieces
from torch import Tensor, nn

import nino
from nino import NeuralGraph
from nino.graph import architectures
from nino.graph.calls import Calls, outputs_of
from nino.graph.symmetry import permutable_axes
from nino.graph.tracing.neurons import board
from tasks.wired_blocks import BLOCKS

PERMUTABLE: dict[str, tuple[int, ...]] = {
    "GCN": (6,),
    "GAT": (2, 6),
    "GraphSAGE and GIN": (6, 8),
    "EdgeConv": (5, 6),
    "UNet2DConditionModel": (2,) * 8 + (3,) * 4 + (4,) * 4 + (5,) * 2 + (8,) * 3 + (12,),
    "DiT": (2, 4, 4, 8, 8, 8, 12),
    "AutoencoderKL": (2, 3, 6),
    "VQ-VAE": (6, 7),
    "RealNVP": (6, 6),
    "MADE and PixelCNN": (6,),
    "ResNet with padded shortcuts": (2, 2, 4),
    "spectral norm": (),
    "weight norm": (6,),
    "SegNet": (6,),
    "frozen batch norm": (6,),
    "bags of words": (5, 6),
    "FNet": (9,),
    "pooling over features": (2, 6),
    "Fourier neural operator": (6, 6),
    "decoder into prepared memory": (5, 6),
    "experts by masks": (6, 7, 7, 7),
    "masked autoencoder": (8, 8),
    "deep equilibrium": (6,),
    "dynamic kernels": (3, 6),
}
IN_PIECES = {"experts by masks"}
"""An expert that no row of the batch is sent to."""


def sizes(graph: NeuralGraph) -> Counter[int]:
    return Counter(axis.size for axis in permutable_axes(graph))


def test_there_is_a_value_for_every_block() -> None:
    assert PERMUTABLE.keys() == BLOCKS.keys()


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_wired_as_it_computes(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = BLOCKS[name]()
    report = nino.check_wiring(model, inputs)
    assert report.ok, report
    assert report.modes == ("training", "evaluation")
    assert sizes(report.graph) == Counter(PERMUTABLE[name]), report
    assert (len(pieces(report.graph)) > 1) == (name in IN_PIECES)


# Outputs


class TwoHeads(nn.Module):
    """What ``pack`` makes of the outputs of two heads is returned."""

    def __init__(self, pack: Any) -> None:
        super().__init__()
        self.pack = pack
        self.trunk, self.one, self.other = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        hidden = torch.relu(self.trunk(x))
        return self.pack(self.one(hidden), self.other(hidden))


class Slotted:
    __slots__ = ("inner",)

    def __init__(self, inner: Any) -> None:
        self.inner = inner


PACKS = {
    "logits beside boxes": lambda a, b: {"logits": a, "pred_boxes": b},
    "last hidden state beside a head": lambda a, b: {"last_hidden_state": b, "prediction": a},
    "lists of tuples": lambda a, b: [(a, None), {"more": [b, 3]}],
    "an object with slots": lambda a, b: Slotted([Slotted(a), {"b": b}]),
    "a distribution": lambda a, b: (torch.distributions.Normal(a, torch.ones_like(a)), b),
}


@pytest.mark.parametrize("pack", PACKS)
def test_every_output_is_told_apart(pack: str) -> None:
    model = TwoHeads(PACKS[pack])
    report = nino.check_wiring(model, torch.randn(2, 4))
    assert report.ok
    assert sizes(report.graph) == Counter([6])
    reading = {str(b.parameter) for b in report.graph.parameter_blocks if b.source.group.name == "trunk"}
    assert reading == {"one.weight", "other.weight"}


def test_a_wrong_wire_to_the_second_output_shows() -> None:
    """The proof looks at all outputs: with one head left alone, the trunk cannot be relabelled."""
    whole, part = TwoHeads(PACKS["logits beside boxes"]), TwoHeads(lambda a, b: a)
    part.load_state_dict(whole.state_dict())
    graph = NeuralGraph.from_model(part, example_inputs=torch.randn(2, 4))
    assert nino.check_wiring(part, torch.randn(2, 4), graph=graph).ok
    report = nino.check_wiring(whole, torch.randn(2, 4), graph=graph)
    assert not report.ok and "axis 'trunk' (6) changes the output" in str(report.first_failure)


def test_caches_are_no_outputs() -> None:
    class DynamicCache:
        def __init__(self, keys: Tensor) -> None:
            self.keys = keys

    tensors = list(outputs_of({"a": torch.ones(1), "past_key_values": torch.ones(2), "c": DynamicCache(torch.ones(3))}))
    assert [len(tensor) for tensor in tensors] == [1]


# Modes


class Auxiliary(nn.Module):
    """A head that there is in one mode alone."""

    def __init__(self, mode: bool) -> None:
        super().__init__()
        self.mode = mode
        self.trunk, self.head, self.extra = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        hidden = F.dropout(torch.relu(self.trunk(x)), 0.5, self.training)
        return (self.head(hidden), self.extra(hidden)) if self.training == self.mode else self.head(hidden)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("now", [True, False])
def test_heads_of_one_mode_are_seen(mode: bool, now: bool) -> None:
    model = Auxiliary(mode).train(now)
    report = nino.check_wiring(model, torch.randn(2, 4))
    assert report.ok and model.training is now
    reading = {str(b.parameter) for b in report.graph.parameter_blocks if b.source.group.name == "trunk"}
    assert reading == {"head.weight", "extra.weight"}


def test_frozen_norms_stay_in_evaluation_mode() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1))
            self.seen: list[bool] = []

        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.net[1].eval()
            return self

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(self.net[1].training)
            return self.net(x)

    model = Frozen().train()
    seen = model.seen
    assert nino.check_wiring(model, torch.randn(2, 3, 6, 6)).ok
    assert seen == [] and model.training and not model.net[1].training


class Cached(nn.Module):
    """Keeps its prepared weight while it is evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)
        self.cache: Tensor | None = None

    def train(self, mode: bool = True) -> Cached:
        self.cache = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.cache is None:
            weight = torch.tanh(self.first.weight)
            self.cache = None if self.training else weight
        else:
            weight = self.cache
        return self.second(torch.relu(F.linear(x, weight, self.first.bias)))


def test_weights_that_are_cached_in_evaluation_are_prepared_anew() -> None:
    model, x = Cached().eval(), torch.randn(2, 4)
    model(x)
    kept = model.cache
    report = nino.check_wiring(model, x)
    assert report.ok and sizes(report.graph) == Counter([6])
    assert model.cache is kept


# Precision


class InFloat32(nn.Module):
    """Computes in float32 whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(16, 16), nn.Linear(16, 2)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.float())
        for layer in self.layers:
            h = h + torch.tanh(3 * layer(h.float()))
        return self.head(h)


def test_the_precision_is_said_and_rounding_is_no_failure() -> None:
    report = nino.check_wiring(InFloat32(), torch.randn(3, 16))
    assert report.ok and report.precision == "float32" and sizes(report.graph) == Counter([16])
    assert "precision float32" in str(report)
    assert nino.check_wiring(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.ones(2, 4)).precision == "float64"


class ByPosition(InFloat32):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.embed.weight[:2, 0].float()


def test_a_wrong_wire_shows_in_float32() -> None:
    x = torch.randn(3, 16)
    report = nino.check_wiring(ByPosition(), x, graph=NeuralGraph.from_model(InFloat32(), example_inputs=x))
    assert not report.ok and report.precision == "float32"


def test_gains_of_a_millionth_hide_nothing() -> None:
    """Layer scale starts so small that a wrong branch would not be seen but for the noise."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.gamma = nn.Parameter(torch.full((6,), 1e-6))

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.head(h + self.gamma * self.b(h))

    model, x = Scaled(), torch.randn(3, 4)
    graph = NeuralGraph.from_model(model, example_inputs=x)
    assert nino.check_wiring(model, x, graph=graph).ok
    without = NeuralGraph(
        graph.groups, tuple(b for b in graph.blocks if b.parameter != "gamma"), graph.shapes, "exact", ""
    )
    assert not nino.check_wiring(model, x, graph=without).ok


# One odd parameter


def test_one_odd_parameter_costs_that_parameter(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its neighbours lose the axes that they have in common, and nothing else."""
    from nino.graph.tracing import wiring

    join = wiring._Assembler._join

    def refuses(self: Any, wire_: Any) -> None:
        if wire_.parameter == "2.weight":
            raise nino.GraphError("it is stored in a way of its own")
        join(self, wire_)

    monkeypatch.setattr(wiring._Assembler, "_join", refuses)
    model = nn.Sequential(*(nn.Linear(n, n + 1) for n in range(4, 9)))
    model = nn.Sequential(*[one for layer in model for one in (layer, nn.Tanh())])
    report = nino.check_wiring(model, torch.randn(2, 4))
    assert report.ok and report.graph.wiring == "exact"
    assert sizes(report.graph) == Counter([7, 8])
    [record] = caplog.records
    assert record.getMessage() == "Sequential: it is stored in a way of its own; it is wired alone"


# Large batches


def test_a_batch_costs_no_more_than_an_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels take memory for one example of a batch that is followed whole."""
    monkeypatch.setattr(board, "MOST_LABELS", 2000)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2))
    large = NeuralGraph.from_model(model, example_inputs=torch.randn(500, 7, 4))
    assert large == NeuralGraph.from_model(model, example_inputs=torch.randn(2, 7, 4))


class Sorted(nn.Module):
    """Reads every example in an order of its own, so that the labels of no two of them are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        order = torch.arange(x.shape[1]).expand(len(x), -1).flip(1)
        return self.second(h.gather(1, order[..., None].expand(-1, -1, 6)))


def test_what_is_too_large_is_cut_and_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model, x = Sorted(), torch.randn(40, 9, 4)
    whole = NeuralGraph.from_model(model, example_inputs=x)
    monkeypatch.setattr(board, "MOST_LABELS", 1000)
    with caplog.at_level("INFO", "nino.graph"):
        assert NeuralGraph.from_model(model, example_inputs=x) == whole
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith("Sorted is traced on 2 of the 40 examples along dimension 0 of its inputs, since")
    assert message.endswith("on 3 of them its graph is the same")


def test_cuts_that_differ_are_not_used() -> None:
    """An expert that is visited by the last row alone: a cut would not see it."""

    class Rare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.rare = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.first(x))
            out = self.second(h)
            return out + self.rare(h) if len(x) > 2 and float(h.sum()) > -1 else out

    model, x = Rare(), torch.randn(30, 4)
    graph = NeuralGraph.from_model(model, example_inputs=x)
    assert {str(b.parameter) for b in graph.parameter_blocks if b.source.group.name == "first"} >= {"rare.weight"}
    calls = Calls.of(x)
    assert architectures._of_two_cuts(model, calls, "", lambda model, cut: architectures._trace(model, cut)) is None
