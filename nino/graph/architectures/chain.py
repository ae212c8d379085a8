"""MLPs and convnets whose layers form a chain: each layer reads the one before it and nothing else.

The order comes from ``torch.fx``, so nested ``Sequential`` modules and attributes that are applied one after another in
``forward`` are the same thing here. A network with branches, an operation of unknown effect or shapes that
do not join raise :class:`NotAChainError`: nothing is guessed.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from torch import fx, nn

from nino.errors import GraphError
from nino.graph.builder import GraphBuilder
from nino.graph.ir import Axis, EdgeType, NeuronGroup, Slots

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
NORMS = (*BATCH_NORMS, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
# Modules and functions that treat every neuron alike.
NEUTRAL_MODULE_FILES = ("torch.nn.modules.activation", "torch.nn.modules.dropout", "torch.nn.modules.pooling")
NEUTRAL_FUNCTIONS = frozenset(
    [
        "relu",
        "relu_",
        "leaky_relu",
        "gelu",
        "silu",
        "elu",
        "selu",
        "celu",
        "softplus",
        "tanh",
        "sigmoid",
        "hardswish",
        "hardsigmoid",
        "hardtanh",
        "relu6",
        "mish",
        "dropout",
        "dropout2d",
        "softmax",
        "log_softmax",
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "adaptive_max_pool2d",
        "contiguous",
        "sin",
    ]
)
POOLS_THAT_FLATTEN = frozenset({"mean", "amax"})
FLATTENS = frozenset({"flatten", "view", "reshape", "squeeze"})
SHAPE_QUESTIONS = frozenset({"size", "getattr", "getitem", "dim"})


class NotAChainError(GraphError):
    """The model's layers do not form a chain."""


@dataclass
class Stage:
    """One layer with weights and everything that acts on its outputs, up to the next such layer."""

    name: str
    layer: nn.Module
    norms: list[tuple[str, nn.Module]]
    prelus: list[tuple[str, nn.PReLU]]
    reads_flat: bool
    """Whether the input was flattened or globally pooled since the layer before."""


def wire(model: nn.Module, builder: GraphBuilder) -> None:
    """Wire a chain: input neurons, then for every layer its outputs."""
    stages = read_chain(model)
    reads: Slots | None = None
    for stage in stages:
        num_inputs, num_outputs = _widths(stage)
        if reads is None:
            reads = builder.group("input", builder.axis("input", num_inputs, permutable=False)).slots()
        else:
            reads = _joined(builder, stage, reads, num_inputs)
        reads = _wire_stage(builder, stage, reads, num_outputs, is_last=stage is stages[-1]).slots()


def _wire_stage(builder: GraphBuilder, stage: Stage, reads: Slots, num_outputs: int, is_last: bool) -> NeuronGroup:
    bias = f"{stage.name}.bias"
    bias_node = builder.group(f"{bias}.node") if bias in builder else None
    outputs = builder.group(stage.name, *_output_axes(builder, stage, reads, num_outputs, is_last))
    edge_type = EdgeType.LINEAR if isinstance(stage.layer, nn.Linear) else EdgeType.CONV
    if getattr(stage.layer, "groups", 1) > 1:
        builder.diagonal(f"{stage.name}.weight", reads.group.slots(*outputs.axes), outputs, edge_type)
    else:
        builder.dense(f"{stage.name}.weight", reads, outputs, edge_type)
    if bias_node is not None:
        builder.fan_out(bias, outputs, EdgeType.BIAS, node=bias_node)
    for name, _ in stage.norms:
        builder.optional_fan_out(f"{name}.weight", outputs, EdgeType.NORM)
        builder.optional_fan_out(f"{name}.bias", outputs, EdgeType.BIAS)
    for name, prelu in stage.prelus:
        if prelu.num_parameters == 1:
            builder.scalar(f"{name}.weight", outputs)
        else:
            builder.fan_out(f"{name}.weight", outputs, EdgeType.BIAS)
    return outputs


def _output_axes(builder: GraphBuilder, stage: Stage, reads: Slots, width: int, is_last: bool) -> tuple[Axis, ...]:
    """The axes of a layer's neurons; group normalisation only lets channels move within, and with, their group."""
    if getattr(stage.layer, "groups", 1) > 1:  # depthwise: the channels are those that it reads
        repeats = width // reads.group.size
        return (
            reads.group.axes
            if repeats == 1
            else (*reads.group.axes, builder.axis(f"{stage.name}.multiplier", repeats, permutable=False))
        )
    group_counts = {norm.num_groups for _, norm in stage.norms if isinstance(norm, nn.GroupNorm)} - {1, width}
    if len(group_counts) > 1:
        raise NotAChainError(f"{stage.name} feeds group normalisations with {sorted(group_counts)} groups")
    permutable = not is_last
    if not group_counts:
        return (builder.axis(stage.name, width, permutable=permutable),)
    num_groups = group_counts.pop()
    outer = builder.axis(f"{stage.name}.groups", num_groups, permutable=permutable)
    return outer, builder.axis(stage.name, width // num_groups, permutable=permutable, within=outer)


def _joined(builder: GraphBuilder, stage: Stage, reads: Slots, num_inputs: int) -> Slots:
    """The neurons that a layer reads; a flattened feature map repeats each channel once per position."""
    width = reads.group.size
    if num_inputs == width:
        return reads
    if not stage.reads_flat or num_inputs % width:
        raise NotAChainError(f"{stage.name} reads {num_inputs} features but {reads.group.name!r} gives {width}")
    place = builder.axis(f"{stage.name}.place", num_inputs // width, permutable=False)
    return reads.group.slots(*reads.group.axes, place)


def _widths(stage: Stage) -> tuple[int, int]:
    layer: Any = stage.layer
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if layer.groups not in (1, layer.in_channels):
        raise NotAChainError(f"{stage.name} is a convolution in {layer.groups} groups")
    return layer.in_channels, layer.out_channels


def read_chain(model: nn.Module) -> list[Stage]:
    """The layers of a model in the order in which they are applied.

    Raises:
        NotAChainError: if they do not form a chain.
    """
    modules = dict(model.named_modules())
    stages: list[Stage] = []
    flat = False
    for node in _trace(model):
        module = modules[str(node.target)] if node.op == "call_module" else None
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            if isinstance(module, nn.Linear) and stages and isinstance(stages[-1].layer, CONVOLUTIONS) and not flat:
                raise NotAChainError(f"{node.target} reads a feature map that is not flattened")
            if str(node.target) in {stage.name for stage in stages}:
                raise NotAChainError(f"{node.target} is applied twice")
            stages.append(Stage(str(node.target), module, [], [], flat))
            flat = False
        elif isinstance(module, (*NORMS, nn.PReLU)) and list(module.parameters()):
            if not stages or flat:
                raise NotAChainError(f"{node.target} acts on inputs or on flattened features")
            _attach(stages[-1], str(node.target), module)
        elif isinstance(module, nn.Flatten):
            flat = True
        elif module is not None and not (_is_neutral(module) or isinstance(module, NORMS)):
            raise NotAChainError(f"{node.target} is a {type(module).__name__}")
        elif module is None:
            flat = flat or _flattens(node)
    if not stages:
        raise NotAChainError("it applies no linear layer and no convolution")
    return stages


def _attach(stage: Stage, name: str, module: nn.Module) -> None:
    if isinstance(module, nn.PReLU):
        stage.prelus.append((name, module))
        return
    shape = tuple(next(module.parameters()).shape)
    width = _widths(stage)[1]
    if width not in (shape[0], prod(shape)):
        raise NotAChainError(f"{name} normalises {shape} but {stage.name} gives {width} neurons")
    stage.norms.append((name, module))


def _is_neutral(module: nn.Module) -> bool:
    return type(module).__module__ in NEUTRAL_MODULE_FILES or isinstance(module, nn.Identity)


def _flattens(node: fx.Node) -> bool:
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))
    if name in FLATTENS or name in POOLS_THAT_FLATTEN:
        return True
    if node.op in ("call_function", "call_method") and name in NEUTRAL_FUNCTIONS:
        return False
    raise NotAChainError(f"it applies {name!r} ({node.name})")


def _trace(model: nn.Module) -> list[fx.Node]:
    """The nodes that compute, in order, each reading only the one before."""
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception as error:  # a forward that fx cannot follow may fail in any way
        raise NotAChainError(
            f"torch.fx cannot follow its forward: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error
    asks_shape = {node for node in graph.nodes if _asks_shape(node)}
    chain: list[fx.Node] = []
    for node in graph.nodes:
        if node.op == "output" or node in asks_shape:
            continue
        inputs = [value for value in node.all_input_nodes if value not in asks_shape]
        if node.op == "get_attr" or inputs != chain[-1:]:
            raise NotAChainError(f"its layers branch at {node.name}")
        chain.append(node)
    return chain[1:]


def _asks_shape(node: fx.Node) -> bool:
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op in ("call_method", "call_function") and name in SHAPE_QUESTIONS
