"""Small models of no family, wired by hand: what only the general blocks of the graph can say."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from models import Case, images, sequences, vectors
from torch import Tensor, nn

from nino.graph import BlockKind, EdgeType, NeuronGroup
from nino.graph.builder import GraphBuilder


def fixed_group(builder: GraphBuilder, name: str, size: int) -> NeuronGroup:
    """Inputs or outputs: neurons that cannot be relabelled."""
    return builder.group(name, builder.axis(name, size, permutable=False))


def wire_linear(builder: GraphBuilder, name: str, source: NeuronGroup, target: NeuronGroup) -> None:
    builder.dense(f"{name}.weight", source, target)
    builder.fan_out(f"{name}.bias", target, EdgeType.BIAS)


class Recurrent(nn.Module):
    """Hidden neurons that read themselves, through four gates stored one below the other."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        assert state is not None
        return self.head(state[0])


def wire_recurrent(builder: GraphBuilder) -> None:
    inputs, outputs = fixed_group(builder, "inputs", 5), fixed_group(builder, "outputs", 3)
    hidden = builder.group("hidden", builder.axis("hidden", 4))
    for gate in range(4):
        rows = (0, 4 * gate, 4)
        builder.dense("cell.weight_ih", inputs, hidden, narrow=rows)
        builder.dense("cell.weight_hh", hidden, hidden, narrow=rows)
        for bias in ("cell.bias_ih", "cell.bias_hh"):
            builder.fan_out(bias, hidden, EdgeType.BIAS, node=builder.group(f"{bias}.{gate}"), narrow=rows)
    wire_linear(builder, "head", hidden, outputs)


class Stream(nn.Module):
    """A layer from the residual stream to the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + torch.tanh(self.layer(x)))


def wire_stream(builder: GraphBuilder) -> None:
    inputs, outputs = fixed_group(builder, "inputs", 5), fixed_group(builder, "outputs", 3)
    stream = builder.axis("stream", 6)
    before, after = builder.group("stream.0", stream), builder.group("stream.1", stream)
    wire_linear(builder, "embed", inputs, before)
    wire_linear(builder, "layer", before, after)
    builder.connect("residual", before, after, EdgeType.RESIDUAL)
    wire_linear(builder, "head", after, outputs)


class Grouped(nn.Module):
    """Convolutions in two groups: around a residual, with gates beside the channels of each group, and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.mixing = nn.Conv2d(6, 6, 1, groups=2, bias=False)
        self.gated = nn.Conv2d(6, 16, 4, groups=2)  # more positions than an edge can carry
        self.transposed = nn.ConvTranspose2d(8, 6, 2, groups=2, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        gates, values = self.gated(x + self.mixing(x)).unflatten(1, (2, 2, 4)).unbind(2)
        x = (torch.sigmoid(gates) * values).flatten(1, 2)
        return self.head(F.relu(self.transposed(x)).mean((2, 3)))


def wire_grouped(builder: GraphBuilder) -> None:
    inputs, outputs = fixed_group(builder, "inputs", 3), fixed_group(builder, "outputs", 3)
    g = builder.axis("g", 2)
    a, b, c = (
        builder.group(name, g, builder.axis(name, size, within=g)) for name, size in (("a", 3), ("b", 4), ("c", 3))
    )
    builder.dense("first.weight", inputs, a, EdgeType.CONV)
    builder.fan_out("first.bias", a, EdgeType.BIAS)
    mixed = builder.group("mixed", *a.axes)
    builder.connect("residual", a, mixed, EdgeType.RESIDUAL)
    nodes = [builder.group(f"gated.bias.{part}") for part in ("gates", "values")]
    for j in range(2):
        part_of_a, mixed_part, part_of_b, part_of_c = (group.slots(fixed={g: j}) for group in (a, mixed, b, c))
        builder.dense("mixing.weight", part_of_a, mixed_part, EdgeType.CONV, narrow=(0, 3 * j, 3))
        for part, node in enumerate(nodes):
            rows = (0, 8 * j + 4 * part, 4)
            builder.dense("gated.weight", mixed_part, part_of_b, EdgeType.CONV, narrow=rows)
            builder.fan_out("gated.bias", part_of_b, EdgeType.BIAS, node=node, narrow=rows)
        rows = (0, 4 * j, 4)
        builder.dense("transposed.weight", part_of_b, part_of_c, EdgeType.CONV, source_first=True, narrow=rows)
    wire_linear(builder, "head", c, outputs)


HEADS, DIM = 3, 2


class FusedByHead(nn.Module):
    """GPT-NeoX: queries, keys and values of a head are stored one below the other, head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.fused, self.output = nn.Linear(6, HEADS * 3 * DIM), nn.Linear(HEADS * DIM, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        queries, keys, values = self.fused(x).unflatten(-1, (HEADS, 3 * DIM)).transpose(1, 2).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(queries, keys, values)
        return self.head(x + self.output(attended.transpose(1, 2).flatten(2)))


def rows_by_head(head: int, part: int) -> int:
    """Which of the pieces of DIM rows is a part (queries, keys, values) of a head."""
    return 3 * head + part


def wire_fused_by_head(builder: GraphBuilder, piece: Callable[[int, int], int] = rows_by_head) -> None:
    inputs, outputs = fixed_group(builder, "inputs", 5), fixed_group(builder, "outputs", 3)
    stream, head = builder.axis("stream", 6), builder.axis("head", HEADS)
    dim, value_dim = builder.axis("dim", DIM, within=head), builder.axis("value_dim", DIM, within=head)
    before, after = builder.group("stream.0", stream), builder.group("stream.1", stream)
    parts = [builder.group("queries", head, dim), builder.group("keys", head, dim)]
    parts.append(builder.group("values", head, value_dim))
    nodes = [builder.group(f"fused.bias.{part.name}") for part in parts]
    wire_linear(builder, "embed", inputs, before)
    for h in range(HEADS):
        for index, edge_type in enumerate((EdgeType.QUERY, EdgeType.KEY, EdgeType.VALUE)):
            target, rows = parts[index].slots(fixed={head: h}), (0, piece(h, index) * DIM, DIM)
            builder.dense("fused.weight", before, target, edge_type, narrow=rows)
            builder.fan_out("fused.bias", target, EdgeType.BIAS, node=nodes[index], narrow=rows)
    builder.dense("output.weight", parts[2], after)
    builder.connect("residual", before, after, EdgeType.RESIDUAL)
    wire_linear(builder, "head", after, outputs)


class Quarters(nn.Module):
    """One parameter from two groups to two others, stored ``[outputs, kernel, inputs]``: its quarters are blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 2, 1), nn.Conv1d(3, 4, 1)
        self.weight = nn.Parameter(torch.ones(3 + 5, 2, 2 + 4))
        self.c, self.d = nn.Linear(3, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([torch.tanh(self.a(x)), torch.sigmoid(self.b(x))], dim=1)
        c, d = F.conv1d(x, self.weight.transpose(1, 2)).mean(2).split([3, 5], dim=1)
        return self.c(torch.tanh(c)) + self.d(torch.sigmoid(d))


def wire_quarters(builder: GraphBuilder) -> None:
    inputs, outputs = fixed_group(builder, "inputs", 3), fixed_group(builder, "outputs", 3)
    a, b, c, d = (
        builder.group(name, builder.axis(name, size)) for name, size in (("a", 2), ("b", 4), ("c", 3), ("d", 5))
    )
    kernel = builder.axis("kernel", 2, permutable=False)
    wire_linear(builder, "a", inputs, a)
    wire_linear(builder, "b", inputs, b)
    for target, rows in ((c, (0, 0, 3)), (d, (0, 3, 5))):
        for source, columns in ((a, (2, 0, 2)), (b, (2, 2, 4))):
            layout = (*target.axes, kernel, *source.axes)
            ends = source.slots(), target.slots()
            builder.block("weight", BlockKind.DENSE, EdgeType.CONV, *ends, layout=layout, narrow=(columns, rows))
    wire_linear(builder, "c", c, outputs)
    wire_linear(builder, "d", d, outputs)


WIRED = [
    Case("recurrent", Recurrent, sequences, ("hidden",), wire=wire_recurrent),
    Case("stream", Stream, vectors, ("stream",), wire=wire_stream),
    Case("grouped", Grouped, images, ("g", "a", "b", "c"), wire=wire_grouped),
    Case("fused_by_head", FusedByHead, sequences, ("stream", "head", "dim", "value_dim"), wire=wire_fused_by_head),
    Case("quarters", Quarters, sequences, ("a", "b", "c", "d"), wire=wire_quarters),
]


def wired_case(name: str) -> Case:
    (case,) = (case for case in WIRED if case.name == name)
    return case
