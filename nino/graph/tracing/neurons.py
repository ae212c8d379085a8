"""Which neurons every parameter joins: the forward pass once more, on labels instead of numbers.

Every value gets a tensor of its own shape with, at each position, the number of the neuron group that sits there. Views,
slices and concatenations act on labels exactly as they act on numbers, so PyTorch itself carries them. A weight makes a
new group at its outputs; element-wise operations join groups that nothing has read yet (gate and up, the parts of a
sum) and otherwise leave a residual connection behind. Parameters are followed as strided views of themselves, so that
it is known which of their elements meets which neuron.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import product as combinations
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from nino.graph.ir import EdgeType
from nino.graph.tracing.axes import Axes, contracted_pair, names
from nino.graph.tracing.indices import Index, axes_of, find, is_pinned, segments
from nino.graph.tracing.recorder import Call, Trace, Value

STRUCTURAL = names(
    "view _unsafe_view reshape _reshape_alias permute transpose t expand broadcast_to repeat tile unsqueeze squeeze as_strided select "
    "slice split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unbind movedim flip roll tril triu diagonal "
    "unfold constant_pad_nd gather index_select index _unsafe_index copy select_scatter slice_scatter index_copy im2col channel_shuffle "
    "native_channel_shuffle "
    "pixel_shuffle alias detach clone contiguous _to_copy lift_fresh"
)
"""They move elements about and compute nothing."""
IDENTITIES = names("alias detach clone contiguous _to_copy lift_fresh")
RESHAPES = names("view _unsafe_view reshape _reshape_alias as_strided squeeze unsqueeze")
CONCATENATIONS = names("cat concat stack")
WRITES = names("scatter scatter_add scatter_reduce index_add index_put")
PRODUCTS = names("mm bmm mv dot addmm baddbmm addmv addbmm linear matmul")
CONVOLUTIONS = names("convolution _convolution convolution_overrideable")
NORMS = names(
    "native_layer_norm _fused_rms_norm rms_norm layer_norm native_group_norm group_norm native_batch_norm "
    "_native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm _batch_norm_no_update "
    "_batch_norm_with_update miopen_batch_norm batch_norm"
)
LAYER_NORMS = names("native_layer_norm _fused_rms_norm rms_norm layer_norm")
GAINS = names("mul div")
KEEPING = names("_softmax _log_softmax _safe_softmax cumsum cumprod masked_fill sort topk native_dropout")
"""The first output's neurons are those of the input, in other places perhaps."""


@dataclass(eq=False)
class Group:
    """Neurons that play the same part."""

    name: str
    axes: tuple[Index, ...]
    number: int
    is_read: bool = False
    """Whether a weight has read it; from then on it is not joined with others any more."""
    is_given: bool = False
    """Whether it stands for an input of which nothing is known."""
    is_words: bool = False
    merged: Group | None = None

    def root(self) -> Group:
        """The group that this one was joined with."""
        group = self
        while group.merged is not None:
            group = group.merged
        return group


class Side(Enum):
    """Where an axis of a parameter leads."""

    SOURCE = "source"
    TARGET = "target"
    KERNEL = "kernel"


@dataclass(frozen=True)
class Along:
    """One axis of a piece of a parameter: along which dimension it runs, and how."""

    dim: int
    axis: Index
    stride: int
    """Along the dimension."""
    side: Side


@dataclass(eq=False)
class Wire:
    """A piece of a parameter and the neurons that it joins."""

    parameter: str
    start: tuple[int, ...]
    """Where the piece begins, per dimension."""
    along: tuple[Along, ...]
    """Its axes in storage order."""
    source: Group | None
    """``None`` if one node per piece, or one per index of the axes that the target lacks."""
    target: Group
    type: EdgeType


@dataclass(frozen=True)
class Link:
    """A connection without a parameter, neuron by neuron; groups repeat along the axes that they lack."""

    name: str
    source: Group
    target: Group
    axes: tuple[Index, ...]
    type: EdgeType


@dataclass
class Neurons:
    """What the second pass finds."""

    groups: list[Group] = field(default_factory=list)
    wires: list[Wire] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)


Labels = Tensor
"""Group numbers, float32 of a value's shape: 0 for none, negative for what was summed over neurons of the group."""


class Wirer:
    """Follows neurons through a trace; ``neurons`` is the result."""

    def __init__(self, trace: Trace, axes: Axes) -> None:
        self.axes = axes
        self.neurons = Neurons()
        self.shapes = {name: value.shape for name, value in trace.parameters.items()}
        self._dims = {name: axes.of(value) for name, value in trace.parameters.items()}
        self._pieces = {name: _pieces(name, dims) for name, dims in self._dims.items()}
        self._labels: dict[Value, Labels] = {}
        self._views: dict[Value, dict[str, Tensor]] = {
            value: {name: torch.empty(value.shape, device="meta")} for name, value in trace.parameters.items()
        }
        self._wired: dict[tuple[str, tuple[int, ...]], Wire] = {}
        self._words: set[Value] = set()
        """Integers that came in as they are: words, not positions that were counted."""
        for call in trace.calls:
            self._apply(call)
        self._wire_what_is_left()

    # What is known of a value

    def labels(self, value: Value) -> Labels:
        """The labels of a value; those of a parameter are zero."""
        if value not in self._labels:
            self._labels[value] = torch.zeros(value.shape)
        return self._labels[value]

    def is_weight(self, value: Value) -> bool:
        """Whether a value depends on parameters alone."""
        return value in self._views

    def group(self, number: float) -> Group:
        """The group of a label."""
        return self.neurons.groups[int(abs(number)) - 1].root()

    def groups_at(self, labels: Labels) -> list[Group]:
        """The groups that occur, each once, in order of their numbers."""
        found = dict.fromkeys(self.group(n) for n in _distinct(labels) if n > 0)
        return list(found)

    def new_group(self, name: str, axes: Sequence[Index], **flags: bool) -> Group:
        """A new neuron group."""
        group = Group(name, tuple(dict.fromkeys(map(find, axes))), len(self.neurons.groups) + 1, **flags)
        self.neurons.groups.append(group)
        return group

    def link(self, name: str, source: Group, target: Group, axes: Iterable[Index], edge_type: EdgeType) -> None:
        """Connect neurons; a group is not connected with itself."""
        if source.root() is not target.root():
            self.neurons.links.append(Link(name, source, target, tuple(dict.fromkeys(map(find, axes))), edge_type))

    # One operation

    def _apply(self, call: Call) -> None:
        if not call.outputs:
            return
        self._words.update(value for value in call.inputs if value.is_input)
        if call.name in STRUCTURAL and call.inputs[:1] and call.inputs[0] in self._words:
            self._words.update(call.outputs)
        if self._is_of_weights_alone(call):
            self._follow_weights(call)
            return
        for names_, follow in self._followers():
            if call.name in names_:
                follow(call)
                return
        if call.is_pointwise or call.name in KEEPING:
            self._mix(call, call.inputs, EdgeType.NORM if call.name in GAINS else EdgeType.BIAS)
        else:
            self._reduce(call)

    def _followers(self) -> list[tuple[frozenset[str], Callable[[Call], None]]]:
        return [
            (STRUCTURAL, self._move),
            (CONCATENATIONS, self._concatenate),
            (WRITES, self._write),
            (PRODUCTS, self._multiply),
            (CONVOLUTIONS, self._convolve),
            (names("embedding"), self._look_up),
            (names("_grouped_mm"), self._multiply_by_experts),
            (NORMS, self._normalise),
        ]

    def _is_of_weights_alone(self, call: Call) -> bool:
        """Whether an operation only prepares parameters: exponentials, transposes, rows of a table."""
        if call.name in PRODUCTS | CONVOLUTIONS | CONCATENATIONS or call.name == "aten.embedding":
            return False
        numbers = [value for value in call.inputs if value.shape and value.tensor.is_floating_point()]
        return any(map(self.is_weight, numbers)) and all(map(self.is_weight, numbers))

    def _set(self, call: Call, labels: Sequence[Labels]) -> None:
        """Give the outputs their labels; what is computed in place changes those of every view."""
        if call.is_in_place and not self.is_weight(call.inputs[0]):
            target = self.labels(call.inputs[0])
            try:
                labels = [target.copy_(labels[0])]
            except RuntimeError:  # one place in memory stands for many positions
                labels = [labels[0]]
        for value, of_value in zip(call.outputs, labels, strict=False):
            self._labels[value] = of_value

    # Parameters alone

    def _follow_weights(self, call: Call) -> None:
        """A value made of parameters alone stays a view of them, as far as it is one."""
        for place, output in enumerate(call.outputs):
            views: dict[str, Tensor] = {}
            for value in call.inputs:
                for name, view in self._views.get(value, {}).items():
                    followed = _follow_view(call, value, view, place, output.shape)
                    if followed is not None:
                        views.setdefault(name, followed)
            self._views[output] = views

    # Elements that move

    def _move(self, call: Call) -> None:
        first = call.inputs[0]
        if call.name in IDENTITIES:
            self._set(call, [self.labels(first)])
        elif call.name in RESHAPES:
            self._set(call, [self.labels(first).reshape(call.outputs[0].shape)])
        elif call.name == "aten.copy":
            self._mix(call, [call.inputs[1]] if call.inputs[1:] else [first], EdgeType.BIAS)
        else:
            self._set(call, self._moved(call))

    def _moved(self, call: Call) -> list[Labels]:
        def label(leaf: Any) -> Any:
            if not isinstance(leaf, Value):
                return leaf
            return (
                leaf.tensor if not leaf.tensor.is_floating_point() and leaf is not call.inputs[0] else self.labels(leaf)
            )

        args, kwargs = tree_map(label, (call.args, call.kwargs))
        try:
            moved = _out_of_place(call)(*args, **kwargs)
        except (RuntimeError, NotImplementedError):  # positions on the meta device, labels that share memory
            return [self._guess(call, output) for output in call.outputs]
        return list(moved) if isinstance(moved, (list, tuple)) else [moved]

    def _guess(self, call: Call, output: Value) -> Labels:
        labels = self.labels(call.inputs[0])
        return labels.clone() if labels.shape == output.shape else torch.zeros(output.shape)

    def _write(self, call: Call) -> None:
        """What is written at some positions is joined with what is there."""
        target = call.arguments["self"]
        source = next((call.arguments[n] for n in ("src", "source", "values") if n in call.arguments), None)
        parts = [self.labels(target)]
        if isinstance(source, Value):
            written = self.labels(source)
            excess = max(written.dim() - len(target.shape), 0)
            written = written.amax(tuple(range(excess))) if excess and written.numel() else written
            aligned = list(zip(range(-1, -written.dim() - 1, -1), reversed(target.shape), strict=False))
            changed = [dim for dim, size in aligned if written.shape[dim] not in (1, size)]
            parts.append(written.amax(changed, keepdim=True) if changed and written.numel() else written)
        joined = self._joined([p.expand(target.shape) for p in parts if _broadcasts(p.shape, target.shape)], call)
        self._set(call, [joined.expand(target.shape)])

    def _concatenate(self, call: Call) -> None:
        output = call.outputs[0]
        values = [value for value in call.inputs if len(value.shape) == len(output.shape) or call.name == "aten.stack"]
        dim = call.arguments.get("dim", 0) % len(output.shape)
        labels = [self.labels(v).unsqueeze(dim) if call.name == "aten.stack" else self.labels(v) for v in values]
        along = [axis for axis in axes_of([self.axes.of(output)[dim]])]
        groups = [group for of_value in labels for group in self.groups_at(of_value)]
        if not any(axis in group.axes for group in groups for axis in along):  # the same neurons in other places
            shape = [1 if place == dim else size for place, size in enumerate(output.shape)]
            parts = [of.amax(dim, keepdim=True) for of in labels if of.shape[dim]]
            together = self._joined(parts, call, connect=False).expand(shape)
            labels = [self._current(of) for of in labels]
            for place, value in enumerate(values):
                if self.is_weight(value):
                    of_value = labels[place].shape
                    labels[place] = self._onto(value, together.expand(of_value), EdgeType.BIAS, call, of_value)
        else:
            for place, value in enumerate(values):
                if self.is_weight(value):
                    labels[place] = self._activated(value, axes_of(self.axes.of(value)), call)
        self._set(call, [torch.cat(labels, dim)])

    def _current(self, labels: Labels) -> Labels:
        """The same labels after groups were joined."""
        out = labels
        for number in _distinct(labels):
            if number > 0 and self.group(number).number != number:
                out = torch.where(out == number, float(self.group(number).number), out)
        return out

    # Element by element

    def _mix(self, call: Call, values: Sequence[Value], edge_type: EdgeType) -> None:
        output = call.outputs[0]
        shape = output.shape
        parts = [self.labels(v).expand(shape) for v in values if not self.is_weight(v) and _broadcasts(v.shape, shape)]
        labels = self._joined(parts, call).expand(shape)
        for value in values:
            if self.is_weight(value):
                labels = self._onto(value, labels, edge_type, call, shape)
        self._set(call, [labels, *(torch.zeros(other.shape) for other in call.outputs[1:])])

    def _joined(self, parts: Sequence[Labels], call: Call, connect: bool = True) -> Labels:
        """Labels of neurons that are combined one by one, or (without ``connect``) that play the same part."""
        parts = [part for part in map(self._current, parts) if bool((part != 0).any())]
        if not parts:
            return torch.zeros(())
        out = parts[0]
        for other in parts[1:]:
            out = self._joined_pair(out, other, connect)
        return out

    def _joined_pair(self, a: Labels, b: Labels, connect: bool) -> Labels:
        a, b = torch.broadcast_tensors(a, b)
        out = torch.where(a > 0, a, torch.where(b > 0, b, torch.where(a != 0, a, b)))
        both = (a > 0) & (b > 0) & (a != b)
        if not bool(both.any()):
            return out
        pairs = torch.unique(torch.stack([a[both], b[both]]), dim=1)
        for first, second in pairs.T.tolist():
            joined = self._join(self.group(first), self.group(second), connect)
            out = torch.where(both & (a == first) & (b == second), float(joined.number), out)
        return self._current(out)

    def _join(self, a: Group, b: Group, connect: bool) -> Group:
        """Groups whose neurons are combined one by one: one group, or two with a connection."""
        if a is b:
            return a
        if not connect and (a.is_read or b.is_read or set(a.axes) != set(b.axes)):
            return a
        if set(a.axes) != set(b.axes):
            larger, smaller = (a, b) if len(a.axes) >= len(b.axes) else (b, a)
            if set(smaller.axes) <= set(larger.axes):
                self.link(f"{smaller.name} reaches {larger.name}", smaller, larger, larger.axes, EdgeType.HEAD)
            return larger
        if a.is_read and b.is_read:
            together = self.new_group(f"{a.name} with {b.name}", a.axes)
            self.link(f"{together.name}: first", a, together, a.axes, EdgeType.RESIDUAL)
            self.link(f"{together.name}: second", b, together, a.axes, EdgeType.RESIDUAL)
            return together
        if not a.is_read and not b.is_read:
            b.merged = a
            a.is_given = a.is_given and b.is_given
            return a
        read, unread = (a, b) if a.is_read else (b, a)
        self.link(f"{unread.name} residual", read, unread, read.axes, EdgeType.RESIDUAL)
        return unread

    def _reduce(self, call: Call) -> None:
        """An operation that uses up dimensions, or resizes them; neurons stay where none of them is summed over."""
        for value in call.inputs:
            if self.is_weight(value):
                self._activated(value, [axis for axis in axes_of(self.axes.of(value)) if not is_pinned(axis)], call)
        self._set(call, [self._reduced(call, output) for output in call.outputs])

    def _reduced(self, call: Call, output: Value) -> Labels:
        kept = set(axes_of(self.axes.of(output)))
        values = [value for value in call.inputs if bool((self.labels(value) != 0).any())]
        if not values:
            return torch.zeros(output.shape)
        value = max(values, key=lambda value: len(kept & set(axes_of(self.axes.of(value)))))
        labels, shape = self.labels(value), list(output.shape)
        before, after = self.axes.of(value), self.axes.of(output)
        if len(before) == len(after):
            changed = [dim for dim in range(len(shape)) if find(before[dim]) is not find(after[dim])]
            small = labels.amax(changed, keepdim=True) if changed and labels.numel() else labels
            if not _broadcasts(small.shape, output.shape):
                return torch.zeros(shape)
        else:
            changed = _dims_used_up(before, after)
            small = labels.amax(changed) if changed and labels.numel() else labels
            if small.shape != output.shape:
                return torch.zeros(shape)
        used = set(axes_of([before[dim] for dim in changed])) - set(axes_of(after))
        for number in _distinct(small):
            if number > 0 and used & set(self.group(number).axes):
                small = torch.where(small == number, -number, small)
        return small.expand(shape)

    def _normalise(self, call: Call) -> None:
        value = call.arguments["input"]
        labels = self.labels(value)
        if self.is_weight(value):
            labels = self._activated(value, axes_of(self.axes.of(value)[-1:]), call)
        shape = value.shape
        for name, edge_type in (("weight", EdgeType.NORM), ("bias", EdgeType.BIAS)):
            gain = call.arguments.get(name)
            if isinstance(gain, Value) and self.is_weight(gain):
                trailing = 0 if call.name in LAYER_NORMS else len(shape) - 2
                labels = self._onto(gain, labels, edge_type, call, shape, trailing)
        self._set(call, [labels, *(torch.zeros(other.shape) for other in call.outputs[1:])])

    # Parameters that meet neurons one by one

    def _onto(
        self, weight: Value, labels: Labels, edge_type: EdgeType, call: Call, shape: Sequence[int], trailing: int = 0
    ) -> Labels:
        """Wire parameters that are combined with neurons one by one: biases, gains, tables of positions."""
        labels = labels.expand(tuple(shape))
        for name, view in self._views.get(weight, {}).items():
            view = view.reshape(*view.shape, *[1] * trailing) if trailing else view
            if not _broadcasts(view.shape, shape):
                continue
            view = view.expand(tuple(shape))
            for piece in self._pieces[name]:
                place = _place_of(piece, view, self.shapes[name])
                if place is None or (name, piece.start) in self._wired:
                    continue
                here = labels[place]
                groups = self.groups_at(here)
                if not groups:
                    groups = [self.new_group(f"{name}.neurons", [a.axis for a in piece.along if not is_pinned(a.axis)])]
                    region = dict(enumerate(_region_of(piece, view, self.shapes[name])))
                    labels = torch.where(_box(labels.shape, region), float(groups[0].number), labels)
                self._wire(name, piece, None, groups[0], edge_type, {})
        return labels

    def _wire(
        self, name: str, piece: Piece, source: Group | None, target: Group, edge_type: EdgeType, sides: dict[int, Side]
    ) -> None:
        along = tuple(
            Along(a.dim, a.axis, a.stride, sides.get(place, Side.TARGET)) for place, a in enumerate(piece.along)
        )
        wire = Wire(name, piece.start, along, source, target, edge_type)
        self._wired[name, piece.start] = wire
        self.neurons.wires.append(wire)

    def _activated(self, weight: Value, neurons: Sequence[Index], call: Call) -> Labels:
        """Turn a value made of parameters alone (a learned query) into neurons along some axes."""
        labels = torch.zeros(weight.shape)
        group: Group | None = None
        for name in self._views.get(weight, {}):
            axes = [axis for axis in axes_of(self._dims[name]) if axis in neurons]
            group = group or self.new_group(f"{name}.neurons", axes)
        if group is not None:
            labels = labels + group.number
            self._onto(weight, labels, EdgeType.BIAS, call, weight.shape)
        self._labels[weight] = labels
        return labels

    # Contractions

    def _multiply(self, call: Call) -> None:
        a, b = contracted_pair(call)
        batched = len(a.shape) == 3 and len(b.shape) == 3
        left = Factor(a, len(a.shape) - 1, {len(a.shape) - 2: 1 if batched else 0} if len(a.shape) > 1 else {})
        right = Factor(b, max(len(b.shape) - 2, 0), {len(b.shape) - 1: 2 if batched else len(a.shape) - 1})
        if len(b.shape) == 1:
            right = Factor(b, 0, {})
        if batched:
            left.kept[0] = right.kept[0] = 0
        labels = self._contract(left, right, call)
        for bias in call.inputs:
            if bias is not a and bias is not b and self.is_weight(bias):
                labels = self._onto(bias, labels, EdgeType.BIAS, call, call.outputs[0].shape)
            elif bias is not a and bias is not b:
                labels = self._joined([labels, self.labels(bias).expand(labels.shape)], call).expand(
                    call.outputs[0].shape
                )
        self._set(call, [labels])

    def _multiply_by_experts(self, call: Call) -> None:
        rows, experts = call.arguments["self"], call.arguments["mat2"]
        self._set(call, [self._contract(Factor(rows, 1, {0: 0}), Factor(experts, 1, {2: 1}), call)])

    def _convolve(self, call: Call) -> None:
        value, weight, bias = (call.arguments[name] for name in ("input", "weight", "bias"))
        channel = len(value.shape) - len(weight.shape) + 1
        output_dim, input_dim = (1, 0) if call.arguments["transposed"] else (0, 1)
        right = Factor(weight, input_dim, {output_dim: channel})
        labels = self._contract(Factor(value, channel, {}), right, call)
        if bias is not None and self.is_weight(bias):
            trailing = len(weight.shape) - 2
            labels = self._onto(bias, labels, EdgeType.BIAS, call, call.outputs[0].shape, trailing)
        self._set(call, [labels])

    def _look_up(self, call: Call) -> None:
        table, positions = call.arguments["weight"], call.arguments["indices"]
        if not self.is_weight(table):
            self._set(call, [torch.zeros(call.outputs[0].shape)])
            return
        right = Factor(table, 0, {1: len(call.outputs[0].shape) - 1})
        self._set(call, [self._read(Factor(positions, None, {}), right, call)])

    def _contract(self, left: Factor, right: Factor, call: Call) -> Labels:
        if self.is_weight(right.value):
            if self.is_weight(left.value):
                self._activate(left, call)
            return self._read(left, right, call)
        if self.is_weight(left.value):
            return self._read(right, left, call)
        return self._meet(left, right, call)

    def _activate(self, factor: Factor, call: Call) -> None:
        contracted = axes_of([self.axes.of(factor.value)[factor.contracted or 0]])
        self._activated(factor.value, contracted, call)

    def _read(self, read: Factor, weight: Factor, call: Call) -> Labels:
        """Neurons are read through a weight: its source; the outputs are its targets."""
        out = torch.zeros(call.outputs[0].shape)
        out_axes = set(axes_of(self.axes.of(call.outputs[0])))
        for name, view in self._views[weight.value].items():
            kernel = call.name in CONVOLUTIONS
            targets: dict[tuple[int | None, ...], Group] = {}
            for piece in self._pieces[name]:
                place = _place_of(piece, view, self.shapes[name])
                if place is None:
                    continue
                sides = _sides(piece, view, self.shapes[name], weight, kernel)
                wire = self._wired.get((name, piece.start))
                source = self._source(read, weight, place, piece, view, sides, wire)
                for position, along in enumerate(piece.along):
                    hidden = sides[position] is Side.TARGET and along.axis not in out_axes
                    if hidden and source is not None and along.axis in source.root().axes:
                        sides[position] = Side.SOURCE
                key = tuple(
                    start if _has_side(piece, sides, dim, Side.TARGET) else None
                    for dim, start in enumerate(piece.start)
                )
                if wire is None:
                    if key not in targets:
                        axes = [a.axis for p, a in enumerate(piece.along) if sides[p] is Side.TARGET]
                        targets[key] = self.new_group(_named_after(name, piece), axes)
                    self._wire(name, piece, source, targets[key], self._type_of(call, read.value), sides)
                    target = targets[key]
                else:
                    target = targets[key] = wire.target.root()
                self._fill(out, target, piece, view, self.shapes[name], weight)
        return out

    def _type_of(self, call: Call, read: Value) -> EdgeType:
        if call.name in CONVOLUTIONS:
            return EdgeType.CONV
        if call.name == "aten.embedding":
            return EdgeType.WORD_EMBEDDING if read in self._words else EdgeType.POSITION_EMBEDDING
        return EdgeType.LINEAR

    def _source(
        self,
        read: Factor,
        weight: Factor,
        place: tuple[int, ...],
        piece: Piece,
        view: Tensor,
        sides: dict[int, Side],
        wire: Wire | None,
    ) -> Group | None:
        """The group that a piece of a weight reads."""
        axes = [a.axis for p, a in enumerate(piece.along) if sides[p] is Side.SOURCE]
        if read.contracted is None:  # a table
            if wire is not None:
                return wire.source
            words = read.value in self._words and len(axes) == 1 and not any(g.is_words for g in self.neurons.groups)
            return self.new_group(f"{piece.parameter}.words", axes, is_words=words, is_read=True)
        labels = self.labels(read.value)
        position = place[weight.contracted or 0]
        at = labels.select(read.contracted, min(position, labels.shape[read.contracted] - 1))
        groups = self.groups_at(at)
        if groups:
            group = groups[0]
            if wire is not None and wire.source is not None and wire.source.root().is_given and not group.is_given:
                given = wire.source.root()
                if set(given.axes) == set(group.axes):
                    given.merged = group
        elif wire is not None:
            return wire.source
        else:
            along = _region_of(piece, view, self.shapes[piece.parameter])[weight.contracted or 0]
            whole = labels.shape[read.contracted] != view.shape[weight.contracted or 0]
            group = self._given(read, at, range(labels.shape[read.contracted]) if whole else along, piece, axes)
        group.is_read = True
        return group

    def _given(self, read: Factor, at: Labels, along: Sequence[int], piece: Piece, axes: list[Index]) -> Group:
        """Neurons for what comes from outside, or from a sum over other neurons."""
        labels = self.labels(read.value)
        group = self.new_group(f"{_stem(piece.parameter)}.input", axes, is_given=True)
        for number in _distinct(at):
            if number < 0 and set(group.axes) <= set(self.group(number).axes):
                origin = self.group(number)
                self.link(f"{group.name} of {origin.name}", origin, group, origin.axes, EdgeType.HEAD)
                group.is_given = False
        positions = torch.as_tensor(along)
        before = labels.index_select(read.contracted or 0, positions)
        filled = torch.where(before <= 0, float(group.number), before)
        try:
            labels.index_copy_(read.contracted or 0, positions, filled)
        except RuntimeError:  # one place in memory stands for many positions
            self._labels[read.value] = labels.index_copy(read.contracted or 0, positions, filled)
        return group

    def _fill(
        self,
        out: Labels,
        target: Group,
        piece: Piece,
        view: Tensor,
        shape: Sequence[int],
        weight: Factor,
    ) -> None:
        """Write a target group's number where a piece of a weight writes."""
        region = _region_of(piece, view, shape)
        box = _box(out.shape, {out_dim: region[dim] for dim, out_dim in weight.kept.items()})
        out[box.expand(out.shape)] = target.number

    def _meet(self, left: Factor, right: Factor, call: Call) -> Labels:
        """Neurons meet neurons: queries and keys, scores and values."""
        output = call.outputs[0]
        used = set(axes_of([self.axes.of(left.value)[left.contracted or 0]]))
        groups = [self.groups_at(self.labels(factor.value)) for factor in (left, right)]
        out = torch.zeros(output.shape)
        paired = [(a, b) for a in groups[0] for b in groups[1] if used & set(a.axes) and used & set(b.axes)]
        if paired:
            return self._score(paired, used, out, call)
        for factor, others in ((right, groups[0]), (left, groups[1])):
            labels = self.labels(factor.value).amax(factor.contracted or 0, keepdim=True)
            small = self._without(_placed(labels, factor, out.dim()), used)
            kept = self.groups_at(small)
            if kept:
                self._weigh(kept, others)
                return small.expand(output.shape)
        return out

    def _without(self, labels: Labels, used: set[Index]) -> Labels:
        """Labels of neurons that were summed over are none any more."""
        for number in _distinct(labels):
            if number > 0 and used & set(self.group(number).axes):
                labels = torch.where(labels == number, 0.0, labels)
        return labels

    def _score(self, pairs: list[tuple[Group, Group]], used: set[Index], out: Labels, call: Call) -> Labels:
        alive = set(axes_of(self.axes.of(call.outputs[0])))
        heads: Group | None = None
        for a, b in pairs:
            if used & set(a.axes) != used & set(b.axes):
                continue
            axes = [axis for axis in (*a.axes, *b.axes) if axis not in used and axis in alive]
            heads = heads or self.new_group(f"{_stem(a.name)}.heads", axes)
            every = tuple(dict.fromkeys((*a.axes, *b.axes)))
            self.link(f"{a.name} of heads", heads, a, every, EdgeType.HEAD)
            self.link(f"{b.name} of heads", heads, b, every, EdgeType.HEAD)
            self.link(f"{a.name} with {b.name}", a, b, every, EdgeType.HEAD)
            self.link(f"{b.name} with {a.name}", b, a, every, EdgeType.HEAD)
            self._call_it(a, EdgeType.QUERY)
            self._call_it(b, EdgeType.KEY)
        return out + (heads.number if heads is not None else 0)

    def _weigh(self, values: list[Group], scores: list[Group]) -> None:
        for value in values:
            for heads in scores:
                if set(heads.axes) <= {*value.axes, *heads.axes} and heads.name.endswith(".heads"):
                    every = tuple(dict.fromkeys((*heads.axes, *value.axes)))
                    self.link(f"{value.name} of heads", heads, value, every, EdgeType.HEAD)
                    self._call_it(value, EdgeType.VALUE)

    def _call_it(self, group: Group, edge_type: EdgeType) -> None:
        """Name the weights that lead to a group after its part in attention."""
        for wire in self.neurons.wires:
            if wire.target.root() is group and wire.type is EdgeType.LINEAR:
                wire.type = edge_type

    # What is left

    def _wire_what_is_left(self) -> None:
        """Parameters (and parts of them) that met no neurons get neurons of their own, along their true axes."""
        for name, pieces in self._pieces.items():
            for piece in pieces:
                if (name, piece.start) in self._wired:
                    continue
                sides = _own_sides(piece, len(self.shapes[name]))
                targets = [a.axis for p, a in enumerate(piece.along) if sides[p] is Side.TARGET]
                sources = [a.axis for p, a in enumerate(piece.along) if sides[p] is Side.SOURCE]
                target = self.new_group(f"{name}.outputs", targets)
                source = self.new_group(f"{name}.inputs", sources) if sources else None
                self._wire(name, piece, source, target, EdgeType.LINEAR if source else EdgeType.BIAS, sides)


@dataclass
class Factor:
    """One side of a contraction."""

    value: Value
    contracted: int | None
    """Its dimension that is summed over."""
    kept: dict[int, int]
    """Its other dimensions, and those of the output that they become."""


@dataclass(frozen=True)
class Piece:
    """A part of a parameter along whose dimensions nothing changes its meaning."""

    parameter: str
    start: tuple[int, ...]
    along: tuple[Along, ...]


def _pieces(name: str, dims: Sequence[Index]) -> list[Piece]:
    """Cut a parameter where one of its dimensions is a sum."""
    pieces = []
    for choice in combinations(*map(segments, dims)):
        along = [
            Along(dim, find(axis), stride, Side.TARGET)
            for dim, segment in enumerate(choice)
            for axis, stride in segment.axes
        ]
        pieces.append(Piece(name, tuple(segment.start for segment in choice), tuple(along)))
    return pieces


def _strides(shape: Sequence[int]) -> list[int]:
    return [prod(shape[dim + 1 :]) for dim in range(len(shape))]


def _dim_along(element_stride: int, view: Tensor) -> int | None:
    """The dimension of a view along which elements so far apart lie."""
    for dim, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
        if size > 1 and stride > 0 and stride <= element_stride < stride * size:
            return dim
    return None


def _place_of(piece: Piece, view: Tensor, shape: Sequence[int]) -> tuple[int, ...] | None:
    """Where in a view of a parameter a piece begins; ``None`` if it is not in it."""
    strides = _strides(shape)
    rest = sum(start * stride for start, stride in zip(piece.start, strides, strict=True)) - int(view.storage_offset())
    for along in piece.along:  # of what is read by position, any will do
        step = along.stride * strides[along.dim]
        if rest < 0 and _dim_along(step, view) is None:
            rest += min(-(rest // step), along.axis.size - 1) * step
    place = [0] * view.dim()
    if rest < 0:
        return None
    for dim in sorted(range(view.dim()), key=lambda dim: -view.stride(dim)):
        if view.stride(dim) > 0 and view.shape[dim] > 1:
            place[dim] = rest // view.stride(dim)
            rest -= place[dim] * view.stride(dim)
            if place[dim] >= view.shape[dim]:
                return None
    return tuple(place) if rest == 0 else None


def _region_of(piece: Piece, view: Tensor, shape: Sequence[int]) -> list[list[int]]:
    """Per dimension of a view, the positions that a piece of its parameter takes."""
    strides = _strides(shape)
    place = _place_of(piece, view, shape) or (0,) * view.dim()
    region = [list(range(size)) if view.stride(dim) == 0 else [place[dim]] for dim, size in enumerate(view.shape)]
    for along in piece.along:
        step = along.stride * strides[along.dim]
        dim = _dim_along(step, view)
        if dim is not None:
            moves = [step // view.stride(dim) * index for index in range(along.axis.size)]
            region[dim] = [position + move for position in region[dim] for move in moves]
    return [[p for p in positions if p < size] for positions, size in zip(region, view.shape, strict=True)]


def _box(shape: Sequence[int], region: dict[int, Sequence[int]]) -> Tensor:
    """Where in a shape the positions along some dimensions meet: bool, to be broadcast to it."""
    box = torch.ones([1] * len(shape), dtype=torch.bool)
    for dim, positions in region.items():
        line = torch.zeros(shape[dim], dtype=torch.bool)
        line[torch.as_tensor(positions, dtype=torch.long)] = True
        box = box & line.view([-1 if place == dim else 1 for place in range(len(shape))])
    return box


def _sides(piece: Piece, view: Tensor, shape: Sequence[int], weight: Factor, kernel: bool) -> dict[int, Side]:
    """Where each axis of a piece leads when its parameter is read through a view."""
    strides = _strides(shape)
    sides = {}
    for place, along in enumerate(piece.along):
        dim = _dim_along(along.stride * strides[along.dim], view)
        sides[place] = Side.TARGET
        if dim is not None and dim == weight.contracted:
            sides[place] = Side.SOURCE
        elif dim is not None and kernel and dim >= 2:
            sides[place] = Side.KERNEL
    return sides


def _own_sides(piece: Piece, num_dims: int) -> dict[int, Side]:
    """Sides of a piece of which nothing is known: stored as ``[targets, sources, *kernel]``."""
    first = min((along.dim for along in piece.along), default=0)
    sides = {}
    for place, along in enumerate(piece.along):
        sides[place] = Side.TARGET if along.dim == first else Side.SOURCE
        if num_dims > 2 and along.dim >= 2 and is_pinned(along.axis) and along.dim != first:
            sides[place] = Side.KERNEL
    return sides


def _has_side(piece: Piece, sides: dict[int, Side], dim: int, side: Side) -> bool:
    """Whether an axis along a dimension leads there; one of size 1 counts as a target."""
    of_dim = [sides[place] for place, along in enumerate(piece.along) if along.dim == dim]
    return side in of_dim or (not of_dim and side is Side.TARGET)


def _follow_view(call: Call, value: Value, view: Tensor, place: int, shape: Sequence[int]) -> Tensor | None:
    """What an operation makes of a view of a parameter; ``None`` if that is no view any more."""
    if call.name in IDENTITIES | KEEPING:
        return view if view.shape == tuple(shape) else None
    if call.name in RESHAPES:
        return _if_same_memory(view.reshape(tuple(shape)), view)
    if call.name in names("index_select index _unsafe_index embedding gather"):
        return _read_by_position(call, view, shape)
    if call.name in STRUCTURAL and value is call.inputs[0]:
        args, kwargs = tree_map(
            lambda leaf: (view if leaf is value else leaf.tensor) if isinstance(leaf, Value) else leaf,
            (call.args, call.kwargs),
        )
        try:
            moved = _out_of_place(call)(*args, **kwargs)
        except (RuntimeError, NotImplementedError):
            return None
        return _if_same_memory(moved[place] if isinstance(moved, (list, tuple)) else moved, view)
    if (call.is_pointwise or call.name == "aten._weight_norm_interface") and _broadcasts(view.shape, shape):
        return view.expand(tuple(shape))
    return None


def _out_of_place(call: Call) -> Any:
    return getattr(torch.ops.aten, call.name.removeprefix("aten.")) if call.is_in_place else call.function


def _if_same_memory(result: Tensor, view: Tensor) -> Tensor | None:
    return result if result.untyped_storage()._cdata == view.untyped_storage()._cdata else None


def _read_by_position(call: Call, view: Tensor, shape: Sequence[int]) -> Tensor | None:
    """Rows of a table: any of them stands for all."""
    if call.name == "aten.index_select":
        return view.narrow(call.arguments["dim"], 0, 1).expand(tuple(shape))
    if call.name in ("aten.index", "aten._unsafe_index"):
        given = [(dim, positions) for dim, positions in enumerate(call.arguments["indices"]) if positions is not None]
        if len(given) == 1 and len(shape) == view.dim() - 1 + len(given[0][1].shape):
            dim, positions = given[0]
            row = view.select(dim, 0)
            for _ in positions.shape:
                row = row.unsqueeze(dim)
            return row.expand(tuple(shape))
    return None


def _placed(labels: Labels, factor: Factor, num_dims: int) -> Labels:
    """Labels of a factor whose contracted dimension has size 1, at the dimensions of the output."""
    order = sorted(factor.kept, key=lambda dim: factor.kept[dim])
    moved = labels.permute(*order, *(dim for dim in range(labels.dim()) if dim not in factor.kept))
    shape = [1] * num_dims
    for dim in order:
        shape[factor.kept[dim]] = labels.shape[dim]
    return moved.reshape(shape)


def _dims_used_up(before: Sequence[Index], after: Sequence[Index]) -> list[int]:
    left, used = list(after), []
    for dim, index in enumerate(before):
        if left and find(index) is find(left[0]):
            left.pop(0)
        else:
            used.append(dim)
    return used


def _broadcasts(shape: Sequence[int], onto: Sequence[int]) -> bool:
    pairs = zip(reversed(shape), reversed(onto), strict=False)
    return len(shape) <= len(onto) and all(size in (1, other) for size, other in pairs)


def _distinct(labels: Labels) -> list[float]:
    """The labels that occur, but zero; where one place in memory stands for many positions, only that one is read."""
    for dim, stride in enumerate(labels.stride()):
        if stride == 0 and labels.shape[dim] > 1:
            labels = labels.narrow(dim, 0, 1)
    return [number for number in torch.unique(labels).tolist() if number != 0]


def _stem(name: str) -> str:
    """A parameter's name without its last part, a group's without what was added to it."""
    return name.rpartition(".")[0] or name


def _named_after(parameter: str, piece: Piece) -> str:
    suffix = "".join(f".{start}" for start in piece.start if start)
    return f"{_stem(parameter) if parameter.endswith(('.weight', '.bias')) else parameter}{suffix}"
