"""MLPs and convnets whose layers form a chain: each layer reads the one before it and nothing else.

The order comes from ``torch.fx``, so nested ``Sequential`` modules and attributes that are applied one after another in
``forward`` are the same thing here. A network with branches, an operation of unknown effect or shapes that
do not join raise :class:`NotAChainError`: nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, fx, nn

from nino.errors import GraphError
from nino.graph.builder import GraphBuilder
from nino.graph.dry_run import left_as_it_was
from nino.graph.ir import Axis, EdgeType, NeuronGroup, Slots

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
NORMS = (*BATCH_NORMS, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
# Modules and functions that treat every neuron alike.
NEUTRAL_MODULE_FILES = ("torch.nn.modules.activation", "torch.nn.modules.dropout")
POOLING_FILE = "torch.nn.modules.pooling"
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
        "contiguous",
        "sin",
    ]
)
POOLS_THAT_FLATTEN = frozenset({"mean", "amax"})
RESHAPES = frozenset({"view", "reshape", "squeeze"})
FLATTENS = RESHAPES | {"flatten"}
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
    inputs = f"{stages[0].name}.input"  # no layer has this name: those with weights have no children
    reads = builder.group(inputs, builder.axis(inputs, _widths(stages[0])[0], permutable=False)).slots()
    previous: Stage | None = None
    for stage in stages:
        num_inputs, num_outputs = _widths(stage)
        if previous is not None:
            reads = _joined(builder, previous, stage, reads, num_inputs)
        reads = _wire_stage(builder, stage, reads, num_outputs, is_last=stage is stages[-1]).slots()
        previous = stage


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
    group_counts = {norm.num_groups for _, norm in stage.norms if isinstance(norm, nn.GroupNorm)} - {1, width}
    if getattr(stage.layer, "groups", 1) > 1:  # depthwise: the channels are those that it reads
        if is_last or group_counts:
            where = "ends the network" if is_last else "feeds a group normalisation"
            raise NotAChainError(f"{stage.name} is a depthwise convolution that {where}")
        repeats = width // reads.group.size
        return (
            reads.group.axes
            if repeats == 1
            else (*reads.group.axes, builder.axis(f"{stage.name}.multiplier", repeats, permutable=False))
        )
    if len(group_counts) > 1:
        raise NotAChainError(f"{stage.name} feeds group normalisations with {sorted(group_counts)} groups")
    permutable = not is_last
    if not group_counts:
        return (builder.axis(stage.name, width, permutable=permutable),)
    num_groups = group_counts.pop()
    outer = builder.axis(f"{stage.name}.groups", num_groups, permutable=permutable)
    return outer, builder.axis(stage.name, width // num_groups, permutable=permutable, within=outer)


def _joined(builder: GraphBuilder, previous: Stage, stage: Stage, reads: Slots, num_inputs: int) -> Slots:
    """The neurons that a layer reads; flattening repeats each of them once per place.

    A convolution's places follow its channels, in a sequence the neurons of a linear layer follow their place.
    """
    width = reads.group.size
    if num_inputs == width:
        return reads
    if not stage.reads_flat or num_inputs % width:
        raise NotAChainError(f"{stage.name} reads {num_inputs} features but {reads.group.name!r} gives {width}")
    place = builder.axis(f"{stage.name}.place", num_inputs // width, permutable=False)
    if isinstance(previous.layer, CONVOLUTIONS):
        return reads.group.slots(*reads.group.axes, place)
    return reads.group.slots(place, *reads.group.axes)


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
        function = _function_name(node) if module is None else ""
        name = function or str(node.target)
        last = stages[-1] if stages else None
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            if last is not None and isinstance(module, nn.Linear) != isinstance(last.layer, nn.Linear) and not flat:
                raise NotAChainError(f"{name} reads the outputs of {last.name} along another dimension")
            if name in {stage.name for stage in stages}:
                raise NotAChainError(f"{name} is applied twice")
            stages.append(Stage(name, module, [], [], flat))
            flat = False
        elif isinstance(module, (*NORMS, nn.PReLU)):
            if list(module.parameters()) or isinstance(module, nn.GroupNorm):
                if last is None or flat:
                    raise NotAChainError(f"{name} acts on inputs or on flattened features")
                _attach(last, name, module)
        elif isinstance(module, nn.Flatten) or function in FLATTENS | POOLS_THAT_FLATTEN:
            if last is not None and function not in RESHAPES:
                _check_dims(last, node, module, flat)
            flat = True
        elif "_pool" in function or _class_of(module).__module__ == POOLING_FILE:
            if last is not None and (flat or not isinstance(last.layer, CONVOLUTIONS)):
                raise NotAChainError(f"{name} pools the neurons of {last.name}")
        elif module is None and function not in NEUTRAL_FUNCTIONS:
            raise NotAChainError(f"it applies {function!r} ({node.name})")
        elif module is not None and not _is_neutral(module):
            raise NotAChainError(f"{name} is a {type(module).__name__}")
    if not stages:
        raise NotAChainError("it applies no linear layer and no convolution")
    return stages


def _attach(stage: Stage, name: str, module: nn.Module) -> None:
    if isinstance(module, nn.PReLU):
        stage.prelus.append((name, module))
        return
    width = _widths(stage)[1]
    if isinstance(module, nn.GroupNorm):
        shape: tuple[int, ...] = (module.num_channels,)
    else:
        shape = tuple(next(module.parameters()).shape)
    over_places = isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and isinstance(stage.layer, CONVOLUTIONS)
    num_dims = cast(Tensor, stage.layer.weight).dim() - 1 if over_places else 1  # a layer norm's last ones
    if shape[0] != width or len(shape) != num_dims:
        raise NotAChainError(f"{name} over {shape} does not normalise the {width} neurons of {stage.name}")
    stage.norms.append((name, module))


def _is_neutral(module: nn.Module) -> bool:
    if isinstance(module, (nn.GLU, nn.MultiheadAttention)):  # they live in the file of the activations
        return False
    return _class_of(module).__module__ in NEUTRAL_MODULE_FILES or isinstance(module, nn.Identity)


def _function_name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))


def _check_dims(stage: Stage, node: fx.Node, module: nn.Module | None, flat: bool) -> None:
    """A flattening must join places with neurons and keep the batch apart; a mean must run over places only."""
    num_places = cast(Tensor, stage.layer.weight).dim() - 2  # 0 after a linear layer, whose places precede the neurons
    if isinstance(module, nn.Flatten):
        dims: Any = (module.start_dim, module.end_dim)
        is_right = dims == (1, -1)
    elif _function_name(node) == "flatten":
        dims = (_argument(node, 1, "start_dim", 0), _argument(node, 2, "end_dim", -1))
        is_right = dims == (1, -1)
    else:
        dims = _argument(node, 1, "dim", None)
        dims = (dims,) if isinstance(dims, int) else dims
        places = {*range(2, 2 + num_places), *range(-num_places, 0)} if num_places else {1}
        if flat:  # by a view or another mean: [batch, neuron, place]
            places = {2, -1} if num_places else set()
        is_right = bool(dims) and set(dims) <= places
    if not is_right:
        raise NotAChainError(f"{node.name} over dimensions {dims} does not keep the neurons of {stage.name} apart")


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


class _Tracer(fx.Tracer):
    """Follows the forward methods alone: hooks, such as those by which ``fully_shard`` gathers weights, are not run."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_of_torch = _class_of(m).__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential)
        return is_of_torch or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return super().call_module(m, m.forward, args, kwargs)


def _class_of(module: nn.Module | None) -> type:
    """A module's class; ``fully_shard`` puts one of its own in front."""
    own = type(module)
    return own.__bases__[-1] if any(base.__name__ == "FSDPModule" for base in own.__bases__) else own


def _trace(model: nn.Module) -> list[fx.Node]:
    """The nodes that compute, in order, each reading only the one before."""
    try:
        with left_as_it_was(model):
            graph = _Tracer().trace(model)
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
