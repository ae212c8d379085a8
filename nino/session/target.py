"""The model in training: which of its parameters a nowcast may change, its graph, and whether that still holds."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

from nino.errors import NinoError
from nino.graph import NeuralGraph
from nino.graph.architectures import wire_by_names, wire_each_alone
from nino.graph.builder import check_graph, graph_parameters
from nino.graph.ir import WAITING
from nino.graph.rows import divisible
from nino.numbers import counted
from nino.parallel.shards import compute_device, refuse_unsupported
from nino.predict.predictor import Predictor
from nino.session.changes import describe_changes
from nino.session.first_inputs import FirstInputs

logger = logging.getLogger(__name__)


class TrainingTarget:
    """A model, the optimizer that trains it and the graph on which a nowcaster reads it.

    Args:
        model: wrappers of DDP and ``torch.compile`` are looked through.
        nowcaster: which wires it.
        optimizer: if given, what it does not hold counts as frozen.
        graph: of the model; by default it is wired here, once the model has run on its first batch.

    Raises:
        NinoError: if the model cannot be wired, or nothing of it is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        nowcaster: Predictor,
        optimizer: Optimizer | None,
        graph: NeuralGraph | None = None,
    ) -> None:
        self.module = unwrap(model)
        self.optimizer = optimizer
        self.nowcaster = nowcaster
        self.problem = ""
        """Why the model cannot be wired since it has changed."""
        refuse_unsupported(self.module)
        self._first_inputs = FirstInputs(self.module, model)
        self._waits = False
        """Whether the model has to be run to be wired, and was not yet."""
        self._said_waiting = False
        if graph is not None:
            check_graph(graph, self.module)
        self.graph = graph or self._wire()
        self._divided: tuple[NeuralGraph, NeuralGraph] = self.graph, divisible(self.graph)
        if graph is not None:
            self._say_what_is_missing()
        nowcaster.check_fits(self.graph)
        self._check()
        self._say_what_is_complex()
        self._shapes = graph_parameters(self.module)
        self._first_trained = set(self.trained())
        self._trained: dict[str, nn.Parameter] | None = None
        """The model's parameters, and those that were trained, when last looked at; ``None`` if not looked at yet."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that a nowcast may change, by name: in the graph, not frozen, and in the optimizer."""
        return {name: parameter for name, parameter in self.trained().items() if name in self.graph.shapes}

    def trained(self) -> dict[str, nn.Parameter]:
        """All that the optimizer steps, by name; some may not be in the graph."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        updated = {id(parameter) for group in groups for parameter in group["params"]}
        return {
            name: parameter
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad and (self.optimizer is None or id(parameter) in updated)
        }

    @property
    def divisible_graph(self) -> NeuralGraph:
        """The graph as several processes divide it; see :func:`nino.graph.rows.divisible`."""
        if self._divided[0] is not self.graph:
            self._divided = self.graph, divisible(self.graph)
        return self._divided[1]

    def wired(self) -> dict[str, nn.Parameter]:
        """All parameters of the graph, by name."""
        return {name: parameter for name, parameter in self.module.named_parameters() if name in self.graph.shapes}

    def detach(self) -> None:
        """Leave no trace on the model."""
        self._first_inputs.stop()
        self._waits = False

    @property
    def device(self) -> torch.device:
        """Where nowcasts of it are computed."""
        return compute_device(self.trainable().values())

    def begin(self) -> None:
        """Training begins: frameworks may have sharded or replaced parameters since this object was made.

        Raises:
            NinoError: if nowcasting has become impossible.
        """
        refuse_unsupported(self.module)
        self._check()
        if self._trained is None:
            first = {name: parameter for name, parameter in self.wired().items() if name in self._first_trained}
            self._trained = {**first, **self.trainable()}

    def changes(self) -> str:
        """What has changed since this was last asked; nothing if nothing did. A model that has is wired again."""
        if self._waits:
            self._trace()
        shapes = graph_parameters(self.module)
        trained = self.trained()
        not_held = {n for n, p in self.module.named_parameters() if p.requires_grad and n not in trained}
        change = describe_changes(self._shapes, shapes, self._trained or {}, self.trainable(), not_held)
        if change:
            self._wire_again()
        self.remember()
        return change

    def remember(self) -> None:
        """Take the parameters as they are now for what they should be."""
        self._shapes, self._trained = graph_parameters(self.module), self.trainable()

    def _say_what_is_missing(self) -> None:
        missing = sorted(n for n, p in self.trained().items() if n not in self.graph.shapes and p.is_floating_point())
        if missing:
            message = "%s not in the graph that was given, never nowcast: %s"
            logger.warning(message, counted(len(missing), "trained parameter"), ", ".join(missing[:3]))

    def _say_what_is_complex(self) -> None:
        """No graph holds complex numbers, so a person must know how much of a model that is."""
        trained = self.trained()
        numbers = {name: p.numel() * (2 if p.is_complex() else 1) for name, p in trained.items()}
        left_out = [name for name, p in trained.items() if p.is_complex()]
        if left_out:
            logger.warning(
                "%s complex and never nowcast (%.0f%% of what is trained): %s; kept as "
                "pairs of real numbers (torch.view_as_complex in forward) they would be",
                counted(len(left_out), "trained parameter"),
                100 * sum(numbers[name] for name in left_out) / sum(numbers.values()),
                ", ".join(left_out[:3]),
            )

    def _wire(self) -> NeuralGraph:
        """A model is wired by what it computes on its first batch; until then each parameter is alone.

        Only the published layout, which goes by names, is there at once.
        """
        self._first_inputs.stop()
        self._waits = False
        if getattr(getattr(self.nowcaster, "config", None), "wiring", "exact") == "official":
            graph = self.nowcaster.graph_of(self.module)
            if graph.wiring == "official":
                return graph
        self._waits = True
        self._first_inputs.watch()
        known = wire_by_names(self.module)
        if known is not None:
            self.nowcaster.check_fits(known)  # a vocabulary that is too large is said at once
        return wire_each_alone(self.module, WAITING)

    def _trace(self) -> None:
        """Wire the model on its first batch; where that is impossible, each parameter stays alone."""
        if self._first_inputs.is_watching:
            if not self._said_waiting:
                self._said_waiting = True
                self._wire_unseen()
            return
        self._waits = False
        try:
            inputs = self._first_inputs.take()
        except NinoError as error:
            message = "%s: each of its parameters is nowcast alone; wire it with NeuralGraph.from_model and pass graph="
            logger.warning(message, error)
            self._wire_again(lambda: wire_each_alone(self.module))
            return
        self._wire_again(lambda: self.nowcaster.graph_of(self.module, inputs))

    def _wire_unseen(self) -> None:
        """The model is trained, but not called: all that can be looked at are its names.

        Where its layers are called by something else, even these say nothing of what is computed.
        """
        family = type(self.module).__name__
        known = None if self._first_inputs.saw_layers else wire_by_names(self.module)
        if known is not None:
            logger.info("%s was trained, but its forward was not called: it is wired by its names alone", family)
            self._wire_again(lambda: known)
            return
        logger.warning(
            "%s was trained, but its forward was not called: each of its parameters is nowcast alone; pass the module "
            "whose forward training calls, or wire it with NeuralGraph.from_model(model, example_inputs=...) and pass "
            "graph=",
            family,
        )

    def _wire_again(self, wire: Callable[[], NeuralGraph] | None = None) -> None:
        try:
            graph = (wire or self._wire)()
            self.nowcaster.check_fits(graph)
        except Exception as error:  # every nowcast is then refused, with this reason; the run goes on
            self.problem = str(error) or repr(error)
            return
        self.graph, self.problem = graph, ""

    def _check(self) -> None:
        parameters = self.trainable()
        changed = sorted(name for name, p in parameters.items() if tuple(p.shape) != self.graph.shapes[name])
        if changed:
            raise NinoError(
                f"{changed[:3]} changed shape since nowcasting was set up ({len(changed)} in all); set it up after "
                "the model is complete"
            )
        if not parameters:
            raise NinoError(
                "no parameter of the model is trained: all are frozen, or the optimizer holds others (make it after "
                "fully_shard; DeepSpeed and FSDP1 keep copies of their own, which cannot be nowcast)"
            )


def unwrap(model: nn.Module) -> nn.Module:
    """Look through the wrappers of ``torch.compile`` and of data parallelism."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner
