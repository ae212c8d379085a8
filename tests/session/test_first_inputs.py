"""A model of no known family is traced on its first batch, through every integration, and training is none the
wiser."""

from __future__ import annotations

import copy
import importlib.util
import io
import logging
import pickle
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sessions import through_file, warnings_in
from tiny import PERIOD, assert_same, weights_of, wrapped
from torch import Tensor, nn

import nino
from nino import NowcastOptimizer
from nino.graph.calls import Call, Calls

BATCH = 8


class Branched(nn.Module):
    """Branches, so that it is no chain, drops out, keeps running statistics and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.last: Tensor | None = None
        self.sizes: list[int] = []

    def forward(self, x: Tensor, shift: Tensor | None = None, scale: float = 1.0) -> Tensor:
        self.calls += 1
        hidden = torch.tanh(self.inner(x))
        hidden = self.norm(hidden + self.drop(torch.tanh(self.other(hidden)))) * scale
        self.last = hidden.detach()
        self.sizes.append(len(x))
        return self.head(hidden if shift is None else hidden + shift)


def branched(kind: type[nn.Module] = Branched) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind()


def inputs_of(index: int) -> Tensor:
    return torch.randn(BATCH, 4, generator=torch.Generator().manual_seed(index))


def wrap(model: nn.Module, **settings: Any) -> NowcastOptimizer:
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return wrapped(base, model, **{"rollback_window": 0, **settings})


def update(model: Callable[..., Tensor], optimizer: torch.optim.Optimizer, index: int, **more: Any) -> float:
    inputs = inputs_of(index)
    loss = F.mse_loss(model(inputs, **more), inputs[:, :2].cos())
    optimizer.zero_grad()
    loss.backward()
    if isinstance(optimizer, NowcastOptimizer):
        optimizer.observe(loss)
    optimizer.step()
    return loss.item()


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


# When it happens


def test_an_unknown_model_is_traced_on_the_first_batch(caplog: pytest.LogCaptureFixture) -> None:
    model = branched()
    optimizer = wrap(model)
    with torch.no_grad():
        model(inputs_of(0))  # an evaluation before it: not what is trained
    assert optimizer.session.graph.wiring == "per-parameter"
    assert hooks_of(model) > 0

    update(model, optimizer, 0)

    graph = nino.NeuralGraph.from_model(model, example_inputs=inputs_of(0))
    assert optimizer.session.graph == graph
    assert graph.family == "traced"
    assert hooks_of(model) == 0
    for index in range(1, PERIOD):
        update(model, optimizer, index)
    assert [report.has_moved for report in optimizer.reports] == [True]
    assert warnings_in(caplog) == []


def test_nowcasts_are_predicted_on_the_traced_graph() -> None:
    """A nowcast in training is that of the traced graph, not that of parameters alone."""
    ended = []
    for given in (True, False):
        model = branched()
        graph = nino.NeuralGraph.from_model(model, example_inputs=inputs_of(0)) if given else None
        optimizer = wrap(model, graph=graph)
        torch.manual_seed(0)
        for index in range(PERIOD):
            update(model, optimizer, index)
        ended.append(weights_of(model))
    assert_same(ended[0], ended[1])


def test_a_detached_session_leaves_no_hook() -> None:
    model = branched()
    wrap(model).detach()
    assert hooks_of(model) == 0


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_waits_for_a_batch_of_its_own(clone: Callable[[Any], Any]) -> None:
    model = branched()
    optimizer = wrap(model)
    copied, other = clone((model, optimizer))
    update(copied, other, 0)
    assert (other.session.graph.family, hooks_of(copied)) == ("traced", 0)
    assert optimizer.session.graph.wiring == "per-parameter" and hooks_of(model) > 0


@pytest.mark.parametrize("integration", ["plain", "accelerate", "callback"])
def test_every_integration_traces(integration: str, tmp_path: Path, quick_collections: None) -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    import integrations

    class Net(integrations.Net):
        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            first, middle, last = self.layers
            hidden = first(inputs)
            outputs = last(hidden + middle(hidden))
            return {"loss": F.mse_loss(outputs, labels), "logits": outputs}

    setting = integrations.Setting(build=lambda: Net(nn.Linear(16, 6), nn.Linear(6, 6), nn.Linear(6, 2)))
    trained = {"plain": integrations.plain, **integrations.INTEGRATIONS}[integration](setting, tmp_path)

    assert trained.session.graph.family == "traced"
    assert hooks_of(trained.model) == 0
    expected = integrations.plain(setting, tmp_path)
    assert trained.nowcasts == expected.nowcasts
    assert_same(trained.weights, expected.weights)


class Compiler:
    """A backend of ``torch.compile`` that counts how often what it compiled is called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: Any, example_inputs: Any) -> Any:
        del example_inputs

        def called(*args: Any) -> Any:
            self.calls += 1
            return graph(*args)

        return called


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at it
@pytest.mark.parametrize(
    ("when", "whole"),
    [
        pytest.param(when, whole, marks=pytest.mark.slow if whole is when.startswith("in place") else ())
        for when in ("before", "after", "in place before", "in place after", "in parts")
        for whole in (True, False)
    ],
)
def test_a_compiled_model_is_traced_and_stays_compiled(when: str, whole: bool) -> None:
    torch._dynamo.reset()
    compiler, model = Compiler(), branched()
    how: dict[str, Any] = {"backend": compiler, "fullgraph": whole}
    called: Any = model
    if when == "before":
        called = torch.compile(model, **how)
    if when == "in place before":
        model.compile(**how)
    if when == "in parts":
        for name, part in model.named_children():
            setattr(model, name, torch.compile(part, **how))
    optimizer = wrap(called)
    if when == "after":
        called = torch.compile(model, **how)
    if when == "in place after":
        model.compile(**how)
    counts = []
    for index in range(PERIOD + 1):
        update(called, optimizer, index)
        counts.append(compiler.calls - sum(counts))
    assert optimizer.session.graph.family == "traced"
    assert [report.has_moved for report in optimizer.reports] == [True]
    assert hooks_of(called) == hooks_of(model) == 0
    assert counts[0] > 0 and set(counts) == {counts[0]}, "what is compiled stays compiled"
    torch._dynamo.reset()


# What is kept of the batch


def calls_seen(use: Callable[[nn.Module], Any], model: nn.Module | None = None) -> list[Call]:
    from nino.session.first_inputs import FirstInputs

    model = model or branched()
    first = FirstInputs(model)
    first.watch()
    use(model)
    seen = first.take()
    assert not first.is_watching
    assert hooks_of(model) == 0
    return list(seen.each)


def test_the_whole_batch_is_kept_and_copied() -> None:
    x, shift = torch.ones(8, 4), torch.ones(6)
    [call] = calls_seen(lambda model: model(x, shift=shift, scale=2.0).sum().backward())
    x.zero_()
    assert (call.module, len(call.args), list(call.kwargs)) == ("", 1, ["shift", "scale"])
    assert torch.equal(call.args[0], torch.ones(8, 4)) and call.kwargs["scale"] == 2.0


def test_calls_of_another_kind_are_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)  # where it is loaded, the model may be compiled

    def use(model: nn.Module) -> None:
        for rows in (8, 4):
            model(torch.ones(rows, 4))
            model(torch.ones(rows, 4), shift=torch.ones(6))

    assert [len(call.args[0]) for call in calls_seen(use)] == [8, 8]


def test_a_module_around_the_network_is_seen_through() -> None:
    """Its own forward is not called, that of its parts is: of the outermost ones, and not in the backward pass."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.critic = branched(), nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))

        def step(self, x: Tensor) -> Tensor:
            hidden = torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)
            return self.critic(hidden)

    model = Around()
    calls = calls_seen(lambda model: model.step(torch.ones(8, 4)).sum().backward(), model)
    assert [call.module for call in calls] == ["net", "critic"]
    optimizer = wrap(model)
    for index in range(PERIOD):
        model.step(inputs_of(index)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    graph = optimizer.session.graph
    assert graph.family == "traced" and [report.has_moved for report in optimizer.reports] == [True]
    hidden = {axis.name for group in graph.groups for axis in group.axes if axis.permutable}
    assert hidden == {"net.inner", "critic.0"}
    assert graph == nino.NeuralGraph.from_model(model, example_inputs=Calls(tuple(calls)))
    assert nino.check_wiring(model, Calls(tuple(calls)), graph=graph).ok


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_a_model_that_waits_can_be_scripted() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = wrap(model)
    scripted = torch.jit.script(model)
    assert hooks_of(model) == 0 and scripted(torch.ones(2, 3)).shape == (2, 2)
    optimizer.detach()
    assert "__prepare_scriptable__" not in vars(model)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_a_scripted_model_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    optimizer = wrap(model)
    for index in range(PERIOD):
        update(model, optimizer, index)
    assert [report.has_moved for report in optimizer.reports] == [True]
    [message] = warnings_in(caplog)
    assert "cannot be traced on its first batch: it is compiled with torch.jit.script" in message
    assert "each of its parameters is nowcast alone" in message


# What cannot be traced


class OnlyWithGradients(Branched):
    """Insists on gradients, which a trace does without."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward(x)
        torch.autograd.grad(outputs.sum(), self.inner.weight, retain_graph=True)
        return outputs


class Nameless(Branched):
    """Its arguments have no names."""

    def forward(self, *inputs: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(*inputs, scale=scale)


def test_a_model_that_cannot_be_traced_trains_on_per_parameter(caplog: pytest.LogCaptureFixture) -> None:
    model = branched(OnlyWithGradients)
    optimizer = wrap(model)
    for index in range(2 * PERIOD):
        update(model, optimizer, index)
    assert optimizer.session.graph.wiring == "per-parameter"
    assert [report.has_moved for report in optimizer.reports] == [True, True]
    [message] = warnings_in(caplog)
    assert "OnlyWithGradients cannot be traced: test_first_inputs.py:" in message
    assert "raised RuntimeError: element 0 of tensors does not require grad" in message
    assert "each of its parameters becomes a block of its own" in message
    assert "\n" not in message


def test_arguments_need_no_names(caplog: pytest.LogCaptureFixture) -> None:
    model = branched(Nameless)
    optimizer = wrap(model)
    for index in range(PERIOD):
        update(model, optimizer, index, scale=2.0)
    assert optimizer.session.graph.family == "traced"
    assert warnings_in(caplog) == []


def test_a_model_whose_forward_is_never_called_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = branched()
    optimizer = wrap(model)
    for index in range(PERIOD):
        update(model.forward, optimizer, index)
    assert [report.has_moved for report in optimizer.reports] == [True]
    [message] = warnings_in(caplog)
    assert message.startswith("Branched was trained, but its forward was not called")


# Training is none the wiser


def test_until_the_first_jump_training_is_the_same() -> None:
    """Losses, random numbers, weights, buffers and all that the model keeps."""
    trained = []
    for attached in (True, False):
        model = branched()
        optimizer = wrap(model) if attached else torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(0)
        losses = [update(model, optimizer, index) for index in range(PERIOD - 1)]
        trained.append((losses, model.sizes, torch.rand(()).item(), model.state_dict(), model.last))
        if isinstance(optimizer, NowcastOptimizer):
            assert optimizer.session.graph.family == "traced"
    (*numbers, state, last), (*expected, expected_state, expected_last) = trained
    assert numbers == expected
    assert_same(state, expected_state)
    assert torch.equal(last, expected_last)


def test_tracing_leaves_the_model_as_it_was() -> None:
    """Also one that fails half way, on stand-ins for the weights and on the weights themselves."""

    class Fails(Branched):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            self.stray = self.head(x @ torch.rand(4, 6))
            raise RuntimeError("out of order")

    for kind in (Branched, Fails):
        model = branched(kind)
        F.mse_loss(Branched.forward(model, inputs_of(0)), torch.zeros(BATCH, 2)).backward()
        model.drop.eval()
        parameters, gradients = list(model.parameters()), [p.grad for p in model.parameters()]
        before, values = dict(vars(model)), {n: v.clone() for n, v in model.state_dict().items()}
        copies = [gradient.clone() for gradient in gradients if gradient is not None]
        modes, state = [module.training for module in model.modules()], torch.get_rng_state()

        logging.disable()
        nino.NeuralGraph.from_model(model, example_inputs=inputs_of(0))
        logging.disable(logging.NOTSET)

        assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
        assert all(p.grad is gradient for p, gradient in zip(parameters, gradients, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(gradients, copies, strict=True) if a is not None)
        assert vars(model).keys() == before.keys()
        assert all(vars(model)[name] is value for name, value in before.items())
        assert model.sizes == [BATCH]
        assert_same(model.state_dict(), values)
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), state)


class Meter:
    """A plain object in which a model counts, as people write them; it holds another one, itself and one of slots."""

    class Slots:
        __slots__ = ("inner",)

    def __init__(self, depth: int = 1) -> None:
        self.sum, self.number = 0.0, 0
        self.seen: list[int] = []
        self.recent: deque[int] = deque(maxlen=2)
        self.lengths: set[int] = set()
        self.inner = Meter(depth - 1) if depth else None
        self.itself, self.slots = self, self.Slots()

    def update(self, hidden: Tensor) -> None:
        self.sum += hidden.detach().abs().mean().item()
        self.number += 1
        self.seen.append(hidden.shape[0])
        self.recent.append(self.number)
        self.lengths.add(self.number)
        if self.inner is not None:
            self.inner.update(hidden)

    def read(self) -> list[Any]:
        own = [self.sum, self.number, *self.seen, *self.recent, *self.lengths]
        return own if self.inner is None else own + self.inner.read()


class Measured(nn.Module):
    """Follows its activations with objects that it holds directly, in a list and in a tuple of a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.meter, self.listed, self.named = Meter(), [Meter(0)], {"of": (Meter(0), SimpleNamespace(calls=0))}

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        for meter in (self.meter, *self.listed, self.named["of"][0]):
            meter.update(hidden)  # type: ignore[union-attr]
        self.named["of"][1].calls += 1  # type: ignore[union-attr]
        return self.last(hidden)

    def read(self) -> list[Any]:
        objects = self.meter, self.listed[0], self.named["of"][0]
        return [number for meter in objects for number in meter.read()] + [self.named["of"][1].calls]  # type: ignore[union-attr]


def test_objects_that_a_model_holds_count_only_what_is_trained() -> None:
    """Not when layers are followed as it is wrapped, nor on its first batch."""
    plain, model = Measured(), Measured()
    model.load_state_dict(plain.state_dict())
    optimizer = wrap(model)
    assert model.read() == Measured().read()
    adam = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for index in range(3):
        update(plain, adam, index)
        update(model, optimizer, index)
    assert model.read() == plain.read() and model.meter.number == 3
    assert optimizer.session.graph.family == "traced"


def test_what_a_model_holds_never_keeps_it_from_being_traced() -> None:
    class Odd(dict[str, int]):
        def items(self) -> Any:
            raise RuntimeError("not to be read")

    class Closed:
        def __getattribute__(self, name: str) -> Any:
            raise RuntimeError("not to be looked at")

    class Stiff(list[int]):
        def clear(self) -> None:
            raise RuntimeError("not to be changed")

    class Holds(Branched):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            self.stiff.append(1)
            return super().forward(x)

    model = branched(Holds)
    deep: list[Any] = []
    for _ in range(3000):
        deep = [deep]
    model.odd, model.closed, model.stiff, model.deep = Odd(), [Closed()], Stiff(), deep
    model.many = [(str(number), [number]) for number in range(200_000)]
    assert nino.NeuralGraph.from_model(model, example_inputs=inputs_of(0)).family == "traced"
    assert model.sizes == [] and model.last is None


def test_forward_hooks_see_only_what_is_trained() -> None:
    """One that keeps activations would keep those of stand-ins; hooks before a call compute weights, and are needed."""
    model, seen, prepared = branched(), dict[str, Tensor](), list[bool]()
    noted = io.StringIO()  # what is written is not put back
    kept = model.inner.register_forward_hook(lambda module, inputs, output: seen.update(act=output.detach()))
    model.other.register_forward_hook(lambda module, inputs, kwargs, output: seen.update(k=output), with_kwargs=True)
    model.head.register_forward_pre_hook(lambda module, inputs: prepared.append(module.weight.is_meta))
    model.head.register_forward_pre_hook(lambda module, inputs: noted.write(f"{module.weight.is_meta} ") and None)
    before = [list(module._forward_hooks.items()) for module in model.modules()]
    optimizer = wrap(model)
    update(model, optimizer, 0)
    assert optimizer.session.graph.family == "traced" and prepared == [False]
    assert noted.getvalue() == "False True True "
    assert seen["act"].shape == (BATCH, 6) and seen["act"].mean().item() and not seen["k"].is_meta
    assert [list(module._forward_hooks.items()) for module in model.modules()] == before
    kept.remove()
    assert not model.inner._forward_hooks


def test_weights_are_looked_at_only_if_they_must_be() -> None:
    """Stand-ins for them have no values, and so nothing of a batch's size is computed."""
    stood_in: list[bool] = []

    class Notes(Branched):
        def forward(self, x: Tensor) -> Tensor:
            stood_in.append(self.inner.weight.is_meta)
            return super().forward(x)

    class Looks(Notes):
        def forward(self, x: Tensor) -> Tensor:
            outputs = super().forward(x)
            return outputs if bool(outputs.isfinite().all()) else outputs * 0

    graphs = []
    for kind, expected in ((Notes, [True] * 2), (Looks, [True, False, False])):
        stood_in.clear()
        graphs.append(nino.NeuralGraph.from_model(branched(kind), example_inputs=inputs_of(0)))
        assert stood_in == expected
    assert graphs[0] == graphs[1]


# Resumed


@pytest.mark.parametrize("saved_after", [3, PERIOD, PERIOD + 1])
def test_a_resumed_run_is_the_same_to_the_last_bit(saved_after: int) -> None:
    def train(model: Any, optimizer: NowcastOptimizer, first: int, last: int) -> None:
        for index in range(first, last):
            torch.manual_seed(index)
            update(model, optimizer, index)

    settings, end = {"rollback_window": 3, "max_steps": 40}, 2 * PERIOD + 2
    model = branched()
    optimizer = wrap(model, **settings)
    train(model, optimizer, 0, saved_after)
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, saved_after, end)

    resumed = branched()
    other = wrap(resumed, **settings)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, saved_after, end)

    assert optimizer.session.graph == other.session.graph
    assert other.session.graph.family == "traced"
    assert [r.step for r in optimizer.reports] == [PERIOD, 2 * PERIOD]
    assert_same(resumed.state_dict(), model.state_dict())
