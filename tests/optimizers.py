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


class Codes(Tensor):
    """A state in 8 bits: codes and a scale, which looks like float32 and knows hardly any operation, as torchao's."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Codes:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined]

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def of(cls, values: Tensor) -> Codes:
        scale = values.abs().max() / 127 + 1e-12
        return cls((values / scale).round().to(torch.int8), scale)

    def values(self) -> Tensor:
        return self.codes * self.scale

    def write(self, values: Tensor) -> None:
        new = Codes.of(values)
        self.codes.copy_(new.codes)
        self.scale.copy_(new.scale)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[()]]:
        return ["codes", "scale"], ()

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> Codes:
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"Codes knows no {function}")

    def __repr__(self) -> str:  # type: ignore[override]
        return "Codes()"


class InCodes(Optimizer):
    """Adam whose moments are :class:`Codes`; it may keep them to itself, and show them in its ``state_dict`` alone."""

    def __init__(self, parameters: Any, is_hidden: bool = False) -> None:
        super().__init__(parameters, {"lr": 1e-2})
        self.hidden: dict[Tensor, Any] | None = {} if is_hidden else None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter] if self.hidden is None else self.hidden.setdefault(parameter, {})
                if not state:
                    state |= {name: Codes.of(torch.zeros_like(parameter)) for name in ("exp_avg", "exp_avg_sq")}
                mean = state["exp_avg"].values().lerp(parameter.grad, 0.1)
                square = state["exp_avg_sq"].values().lerp(parameter.grad.square(), 0.01)
                state["exp_avg"].write(mean)
                state["exp_avg_sq"].write(square)
                parameter.sub_(group["lr"] * mean / (square.sqrt() + 1e-3))

    def moments(self) -> list[Tensor]:
        """What the moments consist of."""
        states = (self.state if self.hidden is None else self.hidden).values()
        return [part for state in states for codes in state.values() for part in (codes.codes, codes.scale)]

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() if self.hidden is None else {"moments": [*self.hidden.values()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.hidden is None:
            super().load_state_dict(state_dict)
        else:
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
            self.hidden = dict(zip(parameters, state_dict["moments"], strict=True))


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
