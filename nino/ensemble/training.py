"""Ensembles: models of one architecture with weights of their own, trained side by side in one program.

A small model keeps no GPU busy. With the parameters of M models stacked and the loss mapped over them
(``torch.func``), an update of all takes hardly longer than one of a single model, and as its kernels are always the
same, a GPU records them once and replays them. AdamW works element by element: every model is trained as it would be
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from nino.errors import NinoError

Batch = tuple[Tensor, ...]
Stacked = dict[str, Tensor]
"""Parameters of M models by name, ``[M, *shape]`` each."""
Loss = Callable[[Any, Batch], Tensor]
"""Of a model, or what can be called like one, on a batch."""
WARMUP_UPDATES = 3
"""Before a step is recorded on a GPU."""


class Ensemble:
    """M models that are trained side by side by AdamW at a constant rate.

    Args:
        models: of one architecture, with the weights to begin with; they stay as they are.
        loss: of one model on one batch.
        device: where to train.
        lr: learning rate.
        weight_decay: of AdamW.
        mapped: whether losses are mapped over the models or computed one after another; ``None`` for what is faster
            on the device.

    Raises:
        NinoError: if a parameter is frozen, or buffers are not the same in all models and all the time, as those of
            batch norm and of spectral norm.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        loss: Loss,
        device: torch.device,
        lr: float,
        weight_decay: float = 0.0,
        mapped: bool | None = None,
    ) -> None:
        _check(models)
        self.size, self.loss, self.device = len(models), loss, device
        self._mapped = device.type == "cuda" if mapped is None else mapped
        self._model = deepcopy(models[0]).to(device)
        named = [dict(model.named_parameters()) for model in models]
        self.parameters: Stacked = {
            name: torch.stack([model[name].detach().to(device) for model in named]).requires_grad_()
            for name in named[0]
        }
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=lr, weight_decay=weight_decay, capturable=device.type == "cuda"
        )
        self._recorded: torch.cuda.CUDAGraph | None = None
        self._batch: Batch = ()
        self._losses = torch.zeros(self.size, device=device)

    def update(self, batch: Batch) -> Tensor:
        """One step of every model on its own batch.

        Args:
            batch: tensors of ``[M, ...]``, always of the same shapes, on the device.

        Returns:
            The losses before the step: ``[M]``, on a GPU overwritten by the next one.
        """
        if self.device.type != "cuda":
            return self._update(batch)
        if self._recorded is None:
            self._recorded = self._record(batch)
        for static, value in zip(self._batch, batch, strict=True):
            static.copy_(value)
        self._recorded.replay()
        return self._losses

    @torch.no_grad()
    def as_model(self, index: int) -> nn.Module:
        """A module with a copy of the parameters of one model, until the next call."""
        for name, parameter in self._model.named_parameters():
            parameter.copy_(self.parameters[name][index])
        return self._model

    @torch.no_grad()
    def move_to(self, weights: Mapping[str, Tensor]) -> None:
        """Give every model other weights, ``[M, *shape]``; what AdamW remembers stays."""
        for name, stacked in self.parameters.items():
            stacked.copy_(weights[name])

    def _update(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad()
        losses = self._each_loss(batch)
        losses.sum().backward()
        self.optimizer.step()
        return losses.detach()

    def _each_loss(self, batch: Batch) -> Tensor:
        buffers = dict(self._model.named_buffers())

        def loss(weights: Stacked, part: Batch) -> Tensor:
            def model(*args: Any, **kwargs: Any) -> Any:
                return functional_call(self._model, (weights, buffers), args, kwargs)

            return self.loss(model, part)

        if self._mapped:
            with sdpa_kernel(SDPBackend.MATH):  # the other kernels cannot be mapped
                return vmap(loss, randomness="different")(self.parameters, batch)
        rows = [dict(zip(self.parameters, row, strict=True)) for row in zip(*self.parameters.values(), strict=True)]
        return torch.stack([loss(row, part) for row, part in zip(rows, zip(*batch, strict=True), strict=True)])

    def _record(self, batch: Batch) -> torch.cuda.CUDAGraph:
        """Record the kernels of a step; the ensemble is afterwards as it was before."""
        self._batch = tuple(part.clone() for part in batch)
        before = {name: value.detach().clone() for name, value in self.parameters.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_UPDATES):
                self._update(self._batch)
        torch.cuda.current_stream().wait_stream(stream)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            self._losses = self._update(self._batch)
        self.move_to(before)
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        return recorded


def _check(models: Sequence[nn.Module]) -> None:
    """Refuse what the models have beside weights of their own that are trained."""
    if frozen := [name for name, parameter in models[0].named_parameters() if not parameter.requires_grad]:
        raise NinoError(f"an ensemble trains all parameters, and {frozen[0]} is frozen; train such a model alone")
    for name, module in models[0].named_modules():
        if getattr(module, "running_mean", None) is not None or hasattr(module, "parametrizations"):
            raise NinoError(f"an ensemble's models have parameters alone, and {name} keeps statistics; train it alone")
    others = [dict(model.named_buffers()) for model in models[1:]]
    for name, buffer in models[0].named_buffers():
        if not all(torch.equal(buffer, other[name]) for other in others):
            raise NinoError(f"an ensemble's models share their buffers, and {name} is not the same in all")
