"""A drop-in optimizer wrapper: any ``torch.optim`` optimizer, with nowcasts after its steps.

The wrapper *is* a ``torch.optim.Optimizer``: learning-rate schedulers, GradScaler, hooks, pickling and
``accelerator.prepare`` treat it as one. It shares the wrapped optimizer's ``param_groups`` and ``state`` instead of
copying them, and adds one key, ``"nowcast"``, to its ``state_dict``.
"""

from __future__ import annotations

import functools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from nino.errors import NinoError
from nino.graph import NeuralGraph
from nino.numbers import every
from nino.parallel.shards import local_tensor
from nino.plan import NowcastPlan, plan_of
from nino.predict.predictor import Predictor
from nino.session import NowcastSession
from nino.session.horizon import learning_rate_of
from nino.session.report import NowcastReport
from nino.session.saving import load_session, save_session
from nino.several import SeveralOptimizers

logger = logging.getLogger(__name__)

STATE_KEY = "nowcast"
STEPS_OF_OTHERS = ("second_step",)
"""Methods by which other optimizers complete a step: SAM's second half."""


class NowcastOptimizer(Optimizer):
    """Wrap an optimizer so that the model's weights are nowcast every ``period`` steps.

    Args:
        optimizer: built on parameters of ``model``; or several, each for parameters of its own (Muon and AdamW).
        model: the model in training.
        nowcaster: a predictor or its name: ``"confirmed"`` (:class:`nino.predict.confirmed.ConfirmedExtrapolator`,
            which needs no network), ``"nino-base"``, or as in :meth:`nino.Nowcaster.from_pretrained`.
        period: optimizer steps between nowcasts; goes before the plan's. By default it is chosen for the run.
        max_steps: optimizer steps of the whole run; horizons shrink towards its end. ``None`` if unknown.
        plan: all other settings, see :class:`nino.NowcastPlan`; what it leaves open is chosen for the run.
        graph: of the model, if it was wired before (:meth:`nino.NeuralGraph.from_model`; needed for a model of no known
            family that is sharded). By default it is wired here, and a model of no known family by tracing it on the
            first batch.
        others: earlier names of settings; any other keyword is refused, saying where it belongs.
        on_report: called with every :class:`NowcastReport` when it is complete: one step after the nowcast, or after
            its ramp, or at the end of its rollback window. An error that it raises is logged and ends nothing.

    Raises:
        NinoError: if the optimizer holds parameters that are not the model's or was prepared by accelerate before, or a
            setting is out of range.

    Example:
        >>> optimizer = nino.NowcastOptimizer(                                          # doctest: +SKIP
        ...     torch.optim.AdamW(model.parameters(), lr=1e-3), model, max_steps=10_000)
    """

    optimizer: Optimizer
    """The wrapped optimizer."""
    session: NowcastSession
    """Snapshots and nowcasts of this run."""
    _steps: int
    _has_observed: bool

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        model: nn.Module,
        nowcaster: Predictor | str | Path = "confirmed",
        *,
        period: int | None = None,
        max_steps: int | None = None,
        plan: NowcastPlan | None = None,
        graph: NeuralGraph | None = None,
        on_report: Callable[[NowcastReport], None] | None = None,
        **others: Any,
    ) -> None:
        if isinstance(optimizer, (list, tuple)):
            optimizer = SeveralOptimizers(optimizer)
        if not isinstance(optimizer, Optimizer):
            raise NinoError(f"expected a torch.optim.Optimizer to wrap, got {type(optimizer).__name__}")
        if not isinstance(model, nn.Module):
            raise NinoError(f"expected the model in training as second argument, got {type(model).__name__}")
        _refuse_wrapped(optimizer)
        _check_parameters(optimizer.param_groups, model)
        session = NowcastSession(
            model,
            nowcaster,
            period=period,
            max_steps=max_steps,
            plan=plan_of(plan, None, others),
            optimizer=optimizer,
            graph=graph,
            on_report=on_report,
        )
        # Optimizer.__init__ would make groups and state of its own; __setstate__ sets up hooks and nothing else.
        self.__setstate__({"optimizer": optimizer, "session": session, "defaults": optimizer.defaults})

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, param_groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = param_groups

    @property  # type: ignore[override]
    def state(self) -> defaultdict[Tensor, Any]:
        """The wrapped optimizer's."""
        return self.optimizer.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.optimizer.state = state

    def __getattr__(self, name: str) -> Any:
        """What the wrapped optimizer has beside: ``train()`` of schedule-free, ``first_step()`` of SAM, ..."""
        wrapped = self.__dict__.get("optimizer")
        if wrapped is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = getattr(wrapped, name)
        if name not in STEPS_OF_OTHERS or not callable(value):
            return value

        @functools.wraps(value)
        def counted(*arguments: Any, **keywords: Any) -> Any:
            with self._stepping():
                result = value(*arguments, **keywords)
            self._steps += 1
            self.session.after_step()
            return result

        return counted

    @property
    def reports(self) -> list[NowcastReport]:
        """What every nowcast of this process did so far."""
        return self.session.reports

    def observe(self, loss: Tensor | float) -> None:
        """Tell the training loss before each step: nowcasts are judged by it, and reports say what they did."""
        if self._steps and not self._has_observed:
            logger.warning(
                "observe(loss) came after step() for the first time: call it before, or it counts a step late"
            )
        self._has_observed = True
        self.session.observe(loss)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of the wrapped optimizer; then a snapshot or a nowcast if it is time."""
        is_rehearsal = self._is_rehearsal()
        with self._stepping():
            loss = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        if is_rehearsal:
            return loss
        self._steps += 1
        is_number = isinstance(loss, (int, float)) or (isinstance(loss, Tensor) and loss.numel() == 1)
        if is_number and not self.session.has_observed:  # else it was told: with accumulation the closure knows a part
            self.observe(loss)  # type: ignore[arg-type]
        self.session.after_step()
        return loss

    def _watch(self) -> None:
        """Notice steps of the wrapped optimizer that do not come from here, and losses that come late."""
        self._steps, self._has_observed, self._is_stepping, self._said_bare = 0, False, False, False
        wrapped = getattr(self.optimizer, "optimizers", (self.optimizer,))
        self._handles = [one.register_step_post_hook(self._notice_step) for one in wrapped]

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        self._is_stepping = True
        try:
            yield
        finally:
            self._is_stepping = False

    def _notice_step(self, *_: Any) -> None:
        if self._is_stepping or self._said_bare:
            return
        self._said_bare = True
        logger.warning(
            "the wrapped optimizer was stepped by itself: such steps are not counted and never nowcast; call step() of "
            "the NowcastOptimizer"
        )

    def _is_rehearsal(self) -> bool:
        """Whether the coming step is no update but only makes the optimizer's state, as DCP does before loading it.

        It calls ``step()`` on an optimizer without state, with a learning rate of 0 and gradients of 0. The first
        update of a warm-up that starts at 0 has gradients, and counts.
        """
        if self.state or learning_rate_of(self.optimizer) != 0:
            return False
        gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        return not any(bool(local_tensor(gradient).any()) for gradient in gradients if gradient is not None)

    def save_history(self, folder: str | Path) -> None:
        """Save counters and snapshots in a folder of their own; every process calls this.

        For runs with sharded parameters, whose optimizer state is saved with ``torch.distributed.checkpoint``: that
        drops the part of :meth:`state_dict` that is not the wrapped optimizer's.
        """
        save_session(self.session, folder)

    def load_history(self, folder: str | Path) -> None:
        """Restore :meth:`save_history`; every process calls this, after the optimizer's own state was loaded.

        Raises:
            NinoError: if the folder is damaged, or of another model or rhythm.
        """
        load_session(self.session, folder)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the wrapped optimizer."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the wrapped optimizer; the parameters must be the model's."""
        group = dict(param_group)
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        _check_parameters([group], self.session.model)
        self.optimizer.add_param_group(group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state and, under ``"nowcast"``, counters and snapshots."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = {**self.optimizer.state_dict(), STATE_KEY: self.session.state_dict()}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; one of the wrapped optimizer alone starts a fresh history.

        Raises:
            NinoError: if the nowcasting state is damaged or of another model; nothing is loaded then.
            ValueError: if the wrapped optimizer refuses its part; the nowcasting state is not loaded then.
        """
        rest = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            rest = pre_hook(self, rest) or rest
        nowcast = rest.pop(STATE_KEY, None)
        before = self.session.state_dict()
        if nowcast is not None:
            try:
                self.session.load_state_dict(nowcast)
            except NinoError as error:
                raise NinoError(f"{error} (to start a fresh history, remove {STATE_KEY!r} from the state)") from error
        try:
            self.optimizer.load_state_dict(rest)
        except Exception:
            self.session.load_state_dict(before)
            raise
        if nowcast is None:
            self._start_afresh()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def detach(self) -> Optimizer:
        """Nowcast no more, leave no trace on the model, and return the wrapped optimizer."""
        self.session.detach()
        for handle in self._handles:
            handle.remove()
        return self.optimizer

    def _start_afresh(self) -> None:
        self.session.reset()
        steps, end = _updates_of(self.optimizer), self.session.schedule.max_steps
        self.session.step = steps if end is None or steps < end else 0
        logger.warning(
            "the loaded optimizer state is without nowcasting: that goes on with a fresh history from update %d",
            self.session.step,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "_handles") and "session" in state:
            self._watch()

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "session": self.session, "defaults": self.defaults}

    def __repr__(self) -> str:
        return f"NowcastOptimizer({every(self.session.schedule.period, 'step')}, {self.optimizer!r})"


def _refuse_wrapped(optimizer: Optimizer) -> None:
    if isinstance(optimizer, NowcastOptimizer):
        raise NinoError("the optimizer is a NowcastOptimizer already: it needs no second one")
    if any(kind.__name__ == "AcceleratedOptimizer" for kind in type(optimizer).__mro__):
        raise NinoError(
            "the optimizer went through accelerator.prepare already, which would neither save nor load its nowcasting "
            "state; wrap it first and prepare the NowcastOptimizer"
        )


def _updates_of(optimizer: Optimizer) -> int:
    """The steps that an optimizer counted by itself; 0 if it does not count."""
    states = [state for state in optimizer.state.values() if isinstance(state, Mapping)]
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def _check_parameters(param_groups: list[dict[str, Any]], model: nn.Module) -> None:
    known = {id(parameter) for parameter in model.parameters()}
    entries = [entry for group in param_groups for entry in group["params"]]  # PyTorch takes pairs with names as well
    foreign = sum(id(entry[1] if isinstance(entry, tuple) else entry) not in known for entry in entries)
    if foreign:
        raise NinoError(
            f"{foreign} of the optimizer's parameters are not the model's; build the optimizer on model.parameters()"
        )
