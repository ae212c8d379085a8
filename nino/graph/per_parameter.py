"""The fallback for unknown models: every parameter is a block between neurons of its own.

Nothing is known about how parameters connect, so nothing is claimed: the nowcast of each one depends on that one alone.
"""

from __future__ import annotations

from torch import nn

from nino.graph.builder import GraphBuilder
from nino.graph.ir import EdgeType


def wire(model: nn.Module, builder: GraphBuilder) -> None:
    """Wire each parameter alone: vectors fan out from a node, matrices and kernels join inputs to outputs."""
    del model
    for name in builder.shapes:
        wire_alone(builder, name)


def wire_alone(builder: GraphBuilder, name: str) -> None:
    """Wire one parameter between neurons of its own."""
    shape = builder.shapes[name]
    outputs = builder.group(
        f"{name}.outputs", builder.axis(f"{name}.outputs", shape[0] if shape else 1, permutable=False)
    )
    if len(shape) < 2:
        builder.fan_out(name, outputs, EdgeType.BIAS)
    else:
        inputs = builder.group(f"{name}.inputs", builder.axis(f"{name}.inputs", shape[1], permutable=False))
        builder.dense(name, inputs, outputs, EdgeType.LINEAR if len(shape) == 2 else EdgeType.CONV)
