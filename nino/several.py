"""Several optimizers of one model as one: Muon for matrices beside AdamW for the rest, say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from nino.errors import NinoError
from nino.numbers import counted


class SeveralOptimizers(Optimizer):
    """Steps, zeroes, saves and loads several optimizers together; each keeps its groups, state and schedulers.

    Its ``state_dict`` looks like that of one optimizer: parameters are numbered through.

    Args:
        optimizers: at least one; no parameter may belong to two of them.

    Raises:
        NinoError: if one of them is no optimizer, or two share a parameter.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        if not optimizers:
            raise NinoError("expected at least one optimizer to wrap, got an empty list")
        seen: set[int] = set()
        for optimizer in optimizers:
            if not isinstance(optimizer, Optimizer):
                raise NinoError(f"expected torch.optim.Optimizers to wrap, got {type(optimizer).__name__} in the list")
            own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            if seen & own:
                raise NinoError(
                    f"two of the optimizers share {counted(len(seen & own), 'parameter')}; give each to one only"
                )
            seen |= own
        defaults: dict[str, Any] = {}
        # Optimizer.__init__ would make groups and state of its own; __setstate__ sets up hooks and nothing else.
        self.__setstate__({"optimizers": tuple(optimizers), "defaults": defaults})

    optimizers: tuple[Optimizer, ...]
    """The optimizers themselves, in order."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """All groups, in order; each is its optimizer's own."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """The state of every parameter; each entry is its optimizer's own."""
        merged: defaultdict[Tensor, Any] = defaultdict(dict)
        for optimizer in self.optimizers:
            merged.update(optimizer.state)
        return merged

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of each; a closure is called by the first alone."""
        loss = None
        for number, optimizer in enumerate(self.optimizers):
            result = optimizer.step(closure) if closure is not None and number == 0 else optimizer.step()  # type: ignore[arg-type]
            loss = result if number == 0 else loss
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of each."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: it is not clear to which of them it belongs.

        Raises:
            NinoError: always.
        """
        raise NinoError("of several optimizers, add the group to the one that is to train it: optimizer.optimizers[i]")

    def state_dict(self) -> dict[str, Any]:
        """As of one optimizer, with all parameters numbered through."""
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        for optimizer, first in zip(self.optimizers, self._firsts(), strict=True):
            saved = optimizer.state_dict()
            state |= {first + number: value for number, value in saved["state"].items()}
            groups += [{**g, "params": [first + number for number in g["params"]]} for g in saved["param_groups"]]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; nothing is loaded if the groups do not fit.

        Raises:
            ValueError: if the saved groups are of other optimizers.
        """
        groups, expected = list(state_dict["param_groups"]), [len(group["params"]) for group in self.param_groups]
        if [len(group["params"]) for group in groups] != expected:
            raise ValueError("loaded state dict has other parameter groups than these optimizers together")
        begin = 0
        for optimizer, first in zip(self.optimizers, self._firsts(), strict=True):
            own = groups[begin : begin + len(optimizer.param_groups)]
            begin += len(own)
            numbers = {number for group in own for number in group["params"]}
            state = {number - first: value for number, value in state_dict["state"].items() if number in numbers}
            moved = [{**group, "params": [number - first for number in group["params"]]} for group in own]
            optimizer.load_state_dict({"state": state, "param_groups": moved})

    def _firsts(self) -> list[int]:
        """The number of each optimizer's first parameter."""
        sizes = [sum(len(group["params"]) for group in optimizer.param_groups) for optimizer in self.optimizers]
        return [sum(sizes[:number]) for number in range(len(sizes))]

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers, "defaults": self.defaults}

    def __repr__(self) -> str:
        return f"SeveralOptimizers({', '.join(map(repr, self.optimizers))})"
