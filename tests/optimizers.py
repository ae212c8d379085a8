"""Optimizers that people write themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Mastered(torch.optim.Optimizer):
    """SGD with momentum on float32 copies of the weights, which it writes over the weights at every step."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state |= {"master": parameter.float().clone(), "momentum_buffer": torch.zeros_like(parameter)}
                state["momentum_buffer"].mul_(0.9).add_(parameter.grad)
                state["master"].sub_(group["lr"] * state["momentum_buffer"].float())
                parameter.copy_(state["master"])


class Chained(Optimizer):
    """What people write who train some parameters with another optimizer: not a line of it knows of nowcasting."""

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        self.defaults: dict[str, Any] = {}
        self.__setstate__({})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:
        return {parameter: state for part in self.parts for parameter, state in part.state.items()}

    def step(self, closure: None = None) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, saved in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(saved)
