"""Methods of the fair table: a base optimizer, with what is put on top of it.

On top may stand a method of ``nino.evaluation`` (``nino:nino-base@...``, ``snoo``, ``linear@...``), EMA-Nesterov, GPA
or an average over the tail of the run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nino import NowcastOptimizer
from nino.evaluation.baselines import Follower, copies, copy_into, swapped
from tasks.fair_tasks import WARMUP

Factory = Callable[[Optimizer, nn.Module, int], Follower]
"""Called with the base optimizer, the model, and the steps of the run."""


class EmaNesterov(Follower):
    """Every step begins from weights that went on along the running mean of their movements (arXiv:2605.25395).

    The mean is of whole movements, those that it added included: in the long run a constant movement becomes
    ``1 / (1 - scale)`` times as fast.

    Args:
        scale: part of the mean movement that is added before each step.
        decay: of the mean.
        start: step after which it is added.
        end: step after which it no longer is.
    """

    def __init__(
        self, optimizer: Optimizer, model: nn.Module, scale: float, decay: float, start: int, end: int
    ) -> None:
        self.parameters: list[Tensor] = list(model.parameters())
        self.scale, self.decay, self.start, self.end = scale, decay, start, end
        self.before, self.mean = copies(self.parameters), [torch.zeros_like(p) for p in self.parameters]
        self.steps = 0
        optimizer.register_step_post_hook(lambda *_: self.move())

    @torch.no_grad()
    def move(self) -> None:
        """Count the step into the mean, and go on along it."""
        self.steps += 1
        movements = torch._foreach_sub(self.parameters, self.before)
        torch._foreach_lerp_(self.mean, list(movements), 1 - self.decay)
        copy_into(self.before, self.parameters)
        if self.start <= self.steps < self.end:
            torch._foreach_add_(self.parameters, self.mean, alpha=self.scale)


class PrimalAveraging(Follower):
    """Generalised primal averaging (GPA, arXiv:2512.17131) around any optimizer.

    The optimizer moves ``z``; ``x = keep x + (1 - keep) z`` is evaluated; gradients are taken at
    ``y = mix x + (1 - mix) z``.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, mix: float, keep: float) -> None:
        self.parameters: list[Tensor] = list(model.parameters())
        self.mix, self.keep = mix, keep
        self.z, self.x = copies(self.parameters), copies(self.parameters)
        optimizer.register_step_pre_hook(lambda *_: self.enter())
        optimizer.register_step_post_hook(lambda *_: self.leave())

    @torch.no_grad()
    def enter(self) -> None:
        """The optimizer's own weights."""
        copy_into(self.parameters, self.z)

    @torch.no_grad()
    def leave(self) -> None:
        """Average, and go where the next gradient is taken."""
        copy_into(self.z, self.parameters)
        torch._foreach_lerp_(self.x, self.z, 1 - self.keep)
        torch._foreach_lerp_(self.parameters, self.x, self.mix)

    def evaluated(self) -> Any:
        return swapped(self.parameters, self.x)


class TailAverage(Follower):
    """Evaluates the mean of the weights over the last part of the run."""

    def __init__(self, model: nn.Module, start: int) -> None:
        self.parameters: list[Tensor] = list(model.parameters())
        self.start, self.steps, self.mean = start, 0, copies(self.parameters)

    @torch.no_grad()
    def after_step(self) -> None:
        self.steps += 1
        count = max(self.steps - self.start, 1)
        torch._foreach_lerp_(self.mean, self.parameters, 1 / count)

    def evaluated(self) -> Any:
        return swapped(self.parameters, self.mean)


@dataclass(frozen=True)
class FairMethod:
    """What is put on top of a base optimizer."""

    text: str = ""
    """A method of ``nino.evaluation.methods`` without its optimizer; ``{period}`` stands for a tenth of the run."""
    follower: Factory | None = None


def ema_nesterov(scale: float, decay: float) -> FairMethod:
    """EMA-Nesterov from the end of the warm-up to nine tenths of the run."""

    def make(optimizer: Optimizer, model: nn.Module, steps: int) -> Follower:
        return EmaNesterov(optimizer, model, scale, decay, start=WARMUP, end=round(0.9 * steps))

    return FairMethod(follower=make)


def primal_averaging(mix: float, keep: float) -> FairMethod:
    """GPA."""
    return FairMethod(follower=lambda optimizer, model, steps: PrimalAveraging(optimizer, model, mix, keep))


def tail_average(part: float) -> FairMethod:
    """The mean over the last part of the run."""
    return FairMethod(follower=lambda optimizer, model, steps: TailAverage(model, round((1 - part) * steps)))


def default_nowcaster() -> str:
    """What ``NowcastOptimizer`` takes by itself."""
    return str(inspect.signature(NowcastOptimizer).parameters["nowcaster"].default)


def fair_methods(published: str) -> dict[str, FairMethod]:
    """All methods by name.

    Args:
        published: file of published weights.
    """
    as_published = "period=1000,stop_after=1.0,horizon_decay=2.0,average_over=1,ramp=0,preserve_norms=no"
    return {
        "base": FairMethod(),
        "default": FairMethod(f"nino:{default_nowcaster()}"),
        "confirmed": FairMethod("nino:confirmed"),
        "nino-base": FairMethod("nino:nino-base"),
        "nino-base-1000": FairMethod(f"nino:nino-base@{as_published}"),
        "published": FairMethod(f"nino:{published}"),
        "linear": FairMethod("linear@max_horizon_steps={period}"),
        "rre": FairMethod("rre"),
        "snoo": FairMethod("snoo"),
        "gpa": primal_averaging(0.7, 0.9967),
        "ema-nesterov": ema_nesterov(0.3, 0.99),
        "ema-nesterov-0.5": ema_nesterov(0.5, 0.99),
        "ema": FairMethod("ema:0.99"),
        "tail-average": tail_average(0.05),
    }


def method_text(method: FairMethod, base: str, steps: int) -> str:
    """What ``nino.evaluation.methods`` reads, for a run of so many steps."""
    filled = method.text.format(period=max(steps // 50, 1) * 5)
    return f"{base}+{filled}" if filled else base
