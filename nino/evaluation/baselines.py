"""What people use instead of nowcasting, or with it: other optimizers, slow weights, averages of weights.

A *follower* keeps copies of the weights beside a training. After a jump its copies belong to the past, so it starts
afresh from the new weights.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from nino.errors import NinoError

Tensors = list[Tensor]


class Follower:
    """By default nothing happens."""

    def after_step(self) -> None:
        """Called after every step."""

    def restart(self) -> None:
        """Called after the weights jumped."""

    def arrive(self) -> None:
        """Called after weights that jumped have ramped to where they were to arrive."""
        self.restart()

    def evaluated(self) -> AbstractContextManager[None]:
        """The model with the weights that are to be evaluated, and then as it was."""
        return nullcontext()


@contextmanager
@torch.no_grad()
def swapped(parameters: Tensors, values: Sequence[Tensor]) -> Iterator[None]:
    """Other values in the parameters, for a while."""
    kept = copies(parameters)
    copy_into(parameters, values)
    try:
        yield
    finally:
        with torch.no_grad():
            copy_into(parameters, kept)


def copies(parameters: Tensors) -> Tensors:
    """The values of parameters, in memory of their own."""
    return [parameter.detach().clone() for parameter in parameters]


def copy_into(parameters: Tensors, values: Sequence[Tensor]) -> None:
    """Give parameters other values."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


class SlowWeights(Follower, ABC):
    """Every few steps slow weights follow the fast ones, and those start from there.

    It acts within the optimizer's step, so that snapshots see the weights after it.

    Args:
        optimizer: of the fast weights.
        model: has them.
        every: steps from one time to the next.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, every: int) -> None:
        self.parameters: Tensors = list(model.parameters())
        self.every = every
        self.slow = copies(self.parameters)
        self.steps = 0
        optimizer.register_step_post_hook(lambda *_: self.synchronise())

    @torch.no_grad()
    def synchronise(self) -> None:
        """Count a step, and do what is due."""
        self.steps += 1
        if self.steps % self.every == 0:
            self.follow()
            copy_into(self.parameters, self.slow)

    @abstractmethod
    def follow(self) -> None:
        """Move the slow weights."""

    @torch.no_grad()
    def restart(self) -> None:
        """Slow weights are where the fast ones jumped to."""
        copy_into(self.slow, self.parameters)

    def arrive(self) -> None:
        """To slow weights a ramp is a movement as others are."""


class Lookahead(SlowWeights):
    """Half of the way back every time (arXiv:1907.08610)."""

    def follow(self) -> None:
        """Go half of the way."""
        torch._foreach_lerp_(self.slow, self.parameters, 0.5)


class OuterNesterov(SlowWeights):
    """A step of SGD with Nesterov's momentum, whose gradient is what the fast weights have moved.

    SNOO (arXiv:2510.15830), DiLoCo of one process; without momentum it is :class:`Lookahead`.

    Args:
        rate: learning rate of that step.
        momentum: of that step.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, every: int, rate: float, momentum: float) -> None:
        super().__init__(optimizer, model, every)
        self.outer = torch.optim.SGD(self.slow, lr=rate, momentum=momentum, nesterov=True)

    def follow(self) -> None:
        """Take a step of SGD."""
        for slow, fast in zip(self.slow, self.parameters, strict=True):
            slow.grad = slow - fast
        self.outer.step()

    def restart(self) -> None:
        """Its momentum belongs to the past as well."""
        super().restart()
        self.outer.state.clear()


class ExponentialAverage(Follower):
    """Evaluates an exponential moving average; the decay rises to its value as ``(1 + n) / (10 + n)``."""

    def __init__(self, parameters: Tensors, decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.restart()

    @torch.no_grad()
    def after_step(self) -> None:
        """Count the weights in."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    def restart(self) -> None:
        """Begin with the weights as they are."""
        self.average, self.steps = copies(self.parameters), 0

    def evaluated(self) -> AbstractContextManager[None]:
        """The average in the model."""
        return swapped(self.parameters, self.average)


class LatestAverage(Follower):
    """Evaluates the average of the last few snapshots, the weights themselves before the first (LAWA, 2209.14981)."""

    def __init__(self, parameters: Tensors, count: int, interval: int) -> None:
        self.parameters, self.interval = parameters, interval
        self.snapshots: deque[Tensors] = deque(maxlen=count)
        self.steps = 0

    def after_step(self) -> None:
        """Keep the weights if a snapshot is due."""
        self.steps += 1
        if self.steps % self.interval == 0:
            self.snapshots.append(copies(self.parameters))

    def restart(self) -> None:
        """Forget all snapshots."""
        self.snapshots.clear()

    def evaluated(self) -> AbstractContextManager[None]:
        """The average in the model."""
        if not self.snapshots:
            return nullcontext()
        return swapped(self.parameters, [torch.stack(same).mean(0) for same in zip(*self.snapshots, strict=True)])


class MuonWithAdamW(Optimizer):
    """Muon for hidden matrices, AdamW for embeddings, the last layer, and what is no matrix.

    ``torch.optim.Muon`` takes matrices only, so kernels are flattened to ``[out, rest]`` by views. Its steps are scaled
    to the size of AdamW's, so that both take the same learning rate.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float) -> None:
        matrices = hidden_matrices(model)
        chosen = {id(parameter) for parameter in matrices}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
        groups = [{"params": matrices}, {"params": rest}]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        views = [nn.Parameter(matrix.detach().flatten(1)) for matrix in matrices]
        muon = find_muon()(views, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.inner: tuple[Optimizer, Optimizer] = (muon, AdamW(rest, lr=lr, weight_decay=weight_decay))
        self.pairs = [*zip(matrices, views, strict=True)]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of both."""
        for matrix, view in self.pairs:
            view.grad = None if matrix.grad is None else matrix.grad.flatten(1)
        for optimizer, group in zip(self.inner, self.param_groups, strict=True):
            optimizer.param_groups[0]["lr"] = group["lr"]
            optimizer.step()
            # The same dicts, so that a nowcast that is taken back takes the moments back as well.
            for parameter, inner in zip(group["params"], optimizer.param_groups[0]["params"], strict=True):
                self.state[parameter] = optimizer.state[inner]


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Weights of two and more dimensions, but for embeddings and the last layer."""
    layers = [module for module in model.modules() if getattr(getattr(module, "weight", None), "ndim", 0) >= 2]
    excluded = {id(layer.weight) for layer in layers if isinstance(layer, nn.Embedding)} | {id(layers[-1].weight)}
    return [p for p in model.parameters() if p.ndim >= 2 and id(p) not in excluded]


def find_muon() -> Any:
    """``torch.optim.Muon``.

    Raises:
        NinoError: if this torch has none.
    """
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        raise NinoError(f"method muon needs torch 2.9 or newer, this is {torch.__version__}")
    return muon


def find_schedule_free() -> Any:
    """``schedulefree.AdamWScheduleFree``.

    Raises:
        NinoError: if the package is not installed.
    """
    try:
        return importlib.import_module("schedulefree").AdamWScheduleFree
    except ImportError as error:
        raise NinoError("method schedulefree needs a package: pip install schedulefree") from error


class ScheduleFreeAverage(Follower):
    """Evaluates the average that a schedule-free optimizer keeps (arXiv:2405.15682)."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        optimizer.train()

    @torch.no_grad()
    def restart(self) -> None:
        """The point that gradient steps move is where the weights are."""
        for parameter, state in self.optimizer.state.items():
            if "z" in state:
                state["z"].copy_(parameter)

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """The average in the model."""
        self.optimizer.eval()
        try:
            yield
        finally:
            self.optimizer.train()
