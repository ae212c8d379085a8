"""How models are wired: by tracing where example inputs are given, else by what their names and configs tell.

:mod:`nino.graph.tracing` wires any model that runs, and that is what training, the proof and whatever has inputs use.
Where there is nothing to run a model on (checkpoints on disk, models on many devices), family files do: each has a
function ``wire(model, builder)`` that names groups and connects them in the order of the forward pass. Models are
recognised by the adapters that sit in them, or by the ``model_type`` of their transformers config; anything else is
tried as a chain of layers, and what is no chain falls back to one block per parameter, with a warning. Tests hold
families and traces together: on every model that both cover, the graphs are the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from nino.errors import GraphError, NinoError
from nino.graph import per_parameter
from nino.graph.architectures import adapters, chain, gpt2, llama, published
from nino.graph.builder import GraphBuilder
from nino.graph.calls import Calls
from nino.graph.dry_run import TooLargeError, is_sharded, left_as_it_was, without_weights
from nino.graph.ir import NeuralGraph

logger = logging.getLogger(__name__)

CUTS = (2, 3)
"""Examples of a batch that is too large to be traced whole."""
MOST_REAL_ROWS = 8
"""Examples on which a model is run with its own weights at once."""

Wire = Callable[[nn.Module, GraphBuilder], None]

FAMILIES: dict[str, tuple[str, Wire]] = {
    "gpt2": ("gpt2", gpt2.wire),
    "llama": ("llama", llama.wire),
    "mistral": ("llama", llama.wire),
    "qwen2": ("llama", llama.wire),
    "qwen3": ("llama", llama.wire),
}
"""transformers model type -> (family file, wiring)."""

OFFICIAL_FAMILIES: dict[str, Wire] = {"gpt2": published.wire_gpt2, "chain": published.wire_chain}


def wire(model: nn.Module, wiring: str, example_inputs: Any = None) -> NeuralGraph:
    """Build a model's graph; see :meth:`NeuralGraph.from_model`."""
    if wiring not in ("exact", "official"):
        raise GraphError(f"wiring must be 'exact' or 'official', got {wiring!r}")
    if not isinstance(model, nn.Module):
        raise GraphError(f"only a torch.nn.Module can be wired, got {type(model).__name__}")
    if not GraphBuilder(model).shapes:
        raise GraphError(f"{type(model).__name__} has no floating point parameters: there is nothing to wire")
    if wiring == "official":
        return _wire_as_published(model)
    if example_inputs is not None and not _is_sharded(model):
        try:
            return _wire_by_tracing(model, example_inputs)
        except GraphError as error:
            logger.warning(
                "%s: each of its parameters becomes a block of its own, so a nowcast does not see how they are "
                "connected",
                error,
            )
            return wire_each_alone(model)
    try:
        return _wire_by_family(model)
    except chain.NotAChainError as error:
        logger.warning(
            "%s is of no family that Nino knows (%s): each of its parameters becomes a block of its own, so a nowcast "
            "does not see how they are connected; give example_inputs, and it is wired by tracing",
            type(model).__name__,
            error,
        )
        return wire_each_alone(model)


def _is_sharded(model: nn.Module) -> bool:
    return any(is_sharded(parameter) for parameter in model.parameters())


def wire_by_names(model: nn.Module) -> NeuralGraph | None:
    """The graph that names, shapes and config suggest, which nothing proves; ``None`` if they suggest none."""
    try:
        return _wire_by_family(model)
    except Exception:  # a family file goes by names, and what has these may be anything
        return None


def wire_each_alone(model: nn.Module, family: str = "per_parameter") -> NeuralGraph:
    """The graph of a model of which nothing is known: a block per parameter."""
    builder = GraphBuilder(model)
    per_parameter.wire(model, builder)
    return builder.finish(family, "per-parameter")


def _wire_by_tracing(model: nn.Module, example_inputs: Any) -> NeuralGraph:
    calls = Calls.of(example_inputs)
    with left_as_it_was(model, calls.watchers):
        try:
            return _trace_without_weights(model, calls)
        except TooLargeError as error:
            graph = _of_two_cuts(model, calls, str(error), _trace_without_weights)
            if graph is None:
                raise
            return graph
        except Exception:  # it looks at values, or has an operation that the meta device does not
            rows = calls.rows()
            if rows is not None and rows > MOST_REAL_ROWS:  # all of it is computed now
                graph = _of_two_cuts(model, calls, "it looks at its own numbers", _trace)
                if graph is not None:
                    return graph
            return _trace(model, calls)


def _trace_without_weights(model: nn.Module, calls: Calls) -> NeuralGraph:
    with without_weights(model) as real:
        return _trace(model, calls, real)


def _of_two_cuts(
    model: nn.Module, calls: Calls, reason: str, trace: Callable[[nn.Module, Calls], NeuralGraph]
) -> NeuralGraph | None:
    """The graph of some examples of a batch, if it is that of some more as well; else nothing."""
    rows = calls.rows()
    if rows is None or rows <= max(CUTS):
        return None
    try:
        graphs = [trace(model, calls.cut(cut)) for cut in CUTS]
    except Exception:  # it does not take fewer
        return None
    if any(graph != graphs[0] for graph in graphs):
        return None
    logger.info(
        "%s is traced on %d of the %d examples along dimension 0 of its inputs, since %s; on %d of them its graph is "
        "the same",
        type(model).__name__,
        CUTS[0],
        rows,
        reason,
        CUTS[1],
    )
    return graphs[0]


def _trace(model: nn.Module, example_inputs: Any, real: Mapping[int, Sequence[str]] | None = None) -> NeuralGraph:
    from nino.graph.tracing import wiring as tracing

    builder = GraphBuilder(model)
    if adapters.has_adapters(builder):
        adapters.leave_out_frozen(model, builder)
    try:
        tracing.wire(model, builder, example_inputs, real)
        return builder.finish("traced", "exact")
    except (NinoError, TooLargeError):
        raise
    except Exception as error:  # a defect of the tracing's must not end a training
        raise GraphError(
            f"{type(model).__name__} cannot be traced ({type(error).__name__}: {error}); please report this with the "
            "model's code"
        ) from error


def _wire_by_family(model: nn.Module) -> NeuralGraph:
    builder = GraphBuilder(model)
    family, wire_family = _family_of(model, builder)
    try:
        wire_family(model, builder)
        return builder.finish(family, "exact")
    except GraphError as error:
        if family == "chain":  # what was tried, not what it was known to be
            raise chain.NotAChainError(str(error)) from error
        raise


def _family_of(model: nn.Module, builder: GraphBuilder) -> tuple[str, Wire]:
    if adapters.has_adapters(builder):
        return "adapters", adapters.wire
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return FAMILIES.get(str(model_type), ("chain", chain.wire))


def _wire_as_published(model: nn.Module) -> NeuralGraph:
    builder = GraphBuilder(model)
    family, _ = _family_of(model, builder)
    if family not in OFFICIAL_FAMILIES:
        raise GraphError(
            f"wiring='official' exists for convnets, MLPs and GPT-2 only: wire {type(model).__name__} exactly"
        )
    try:
        OFFICIAL_FAMILIES[family](model, builder)
        return builder.finish(family, "official")
    except GraphError as error:
        if family != "chain":
            raise
        raise GraphError(f"wiring='official' is not possible: {error}") from error
