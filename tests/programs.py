"""Tiny models that a wrong rule of tracing would get wrong, and which of their axes may be relabelled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nino import NeuralGraph
from nino.graph.builder import GraphBuilder
from nino.graph.tracing.wiring import wire


class Tiny(nn.Module):
    """Parameters of some shapes, and what is done with them."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self._function = function
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))

    def forward(self, x: Tensor) -> Tensor:
        return self._function(self, x)


@dataclass(frozen=True)
class Case:
    """A model, and the sizes of the axes that must be found permutable: these and no others."""

    name: str
    build: Callable[[], nn.Module]
    permutable: tuple[int, ...]
    inputs: tuple[int, ...] = (4, 3)
    words: bool = False

    def example(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        if self.words:
            return torch.randint(5, self.inputs, generator=generator)
        return torch.randn(self.inputs, generator=generator)


def tiny(
    name: str, function: Callable[[Any, Tensor], Tensor], *permutable: int, x: tuple[int, ...] = (4, 3), **shapes: Any
) -> Case:
    return Case(name, lambda: Tiny(function, shapes), permutable, x)


def module(
    name: str, build: Callable[[], nn.Module], *permutable: int, x: tuple[int, ...] = (4, 3), words: bool = False
) -> Case:
    return Case(name, build, permutable, x, words)


def traced(model: nn.Module, inputs: Any) -> NeuralGraph:
    builder = GraphBuilder(model)
    wire(model, builder, inputs)
    return builder.finish("traced", "exact")


A, B = (3, 6), (6, 2)


def add_into_slice(m: Any, x: Tensor) -> Tensor:
    h = x @ m.a
    h[:, :4] += h[:, 2:] ** 2
    return h @ m.b


def write_slice(m: Any, x: Tensor) -> Tensor:
    h = torch.zeros(len(x), 6, dtype=x.dtype)
    h[:, :4] = x @ m.a
    h[:, 4:] = torch.tanh(x @ m.c)
    return h @ m.b


def written_through_out(m: Any, x: Tensor) -> Tensor:
    h = torch.zeros(len(x), 6, dtype=x.dtype)
    torch.mul(x @ m.a, 2.0, out=h[:, :4])
    return torch.relu(h) @ m.b


def argmax_reads_a_longer_table(m: Any, x: Tensor) -> Tensor:
    return F.embedding((x @ m.a).argmax(-1), m.table)


def store_positions(m: Any, x: Tensor) -> Tensor:
    h = x @ m.a
    at = torch.zeros(len(x), 2, dtype=torch.long).scatter(1, torch.tensor([[0]] * len(x)), h.argmax(-1, keepdim=True))
    return at.to(x.dtype) @ m.b


def gathered_positions(m: Any, x: Tensor) -> Tensor:
    at = (x @ m.a).topk(3, dim=-1).indices
    return at.gather(1, torch.zeros(len(x), 1, dtype=torch.long)).to(x.dtype) * m.b


def positions_as_output(m: Any, x: Tensor) -> Tensor:
    return (x @ m.a).argmax(-1).to(x.dtype)


def positions_over_all(m: Any, x: Tensor) -> Tensor:
    return (x @ m.a).argmax().to(x.dtype) * m.b


def one_hot_gate(m: Any, x: Tensor) -> Tensor:
    h = x @ m.a
    return (h * torch.zeros_like(h).scatter(-1, h.argmax(-1, keepdim=True), 1.0)) @ m.b


def mixture_by_topk(m: Any, x: Tensor) -> Tensor:
    """Experts picked by a router, their weights gathered."""
    scores, chosen = (x @ m.router).softmax(-1).topk(2, dim=-1)
    hidden = torch.relu(torch.einsum("bi,bkij->bkj", x, m.up[chosen]))
    return torch.einsum("bkj,bkjo,bk->bo", hidden, m.down[chosen], scores)


def mixture_by_loop(m: Any, x: Tensor) -> Tensor:
    scores = (x @ m.router).softmax(-1)
    return sum((torch.relu(x @ m.up[e]) @ m.down[e]) * scores[:, e : e + 1] for e in range(5))


def mixture_of_all(m: Any, x: Tensor) -> Tensor:
    scores = (x @ m.router).softmax(-1)
    hidden = torch.relu(torch.einsum("bi,eij->bej", x, m.up))
    return torch.einsum("bej,ejo,be->bo", hidden, m.down, scores)


def heads_apart(m: Any, x: Tensor) -> Tensor:
    """Two heads of four dimensions each with weights of their own, then a sum over heads."""
    h = (x @ m.a).view(-1, 2, 4)
    return torch.einsum("bhd,hdo->bo", torch.tanh(h), m.per_head)


def heads_together(m: Any, x: Tensor) -> Tensor:
    h = (x @ m.a).view(-1, 2, 4)
    return (torch.tanh(h) @ m.shared).sum(1)


def heads_compared(m: Any, x: Tensor) -> Tensor:
    """Dimensions never occur without their head, and yet have to move alike in both: heads meet heads."""
    h = (x @ m.a).view(-1, 2, 4)
    return torch.einsum("bhd,bgd->bhg", h, h).flatten(1) @ m.b


def heads_subtracted(m: Any, x: Tensor) -> Tensor:
    h = (x @ m.a).view(-1, 2, 4)
    return (h[:, :, None] - h[:, None]).square().sum(-1).flatten(1) @ m.b


def heads_mixed(m: Any, x: Tensor) -> Tensor:
    """A square weight that all heads share: heads do not depend on the dimension, though they never occur without."""
    h = torch.tanh((x @ m.a).view(-1, 3, 4))
    return (h + torch.tanh(h @ m.square)).flatten(1) @ m.b


def heads_normed(m: Any, x: Tensor) -> Tensor:
    h = (x @ m.a).view(-1, 2, 4)
    return (h.softmax(dim=1).flatten(1)) @ m.b


def rotary_complex(m: Any, x: Tensor) -> Tensor:
    """Two heads of four dimensions, rotated as complex numbers."""
    angles = torch.polar(torch.ones(len(x), 2), torch.outer(torch.arange(len(x)), torch.tensor([1.0, 0.1])))
    q, k, v = ((x @ w).view(len(x), 2, 4).transpose(0, 1) for w in (m.q, m.k, m.v))

    def rotated(h: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(h.reshape(2, len(x), 2, 2).contiguous()) * angles).flatten(2)

    h = (rotated(q) @ rotated(k).transpose(1, 2)).softmax(-1) @ v
    return h.transpose(0, 1).reshape(len(x), 8) @ m.o


def attention(bias: Callable[[Any, int], Any], *, groups: int = 1) -> Callable[[Any, Tensor], Tensor]:
    def run(m: Any, x: Tensor) -> Tensor:
        q = (x @ m.q).view(len(x), -1, 2).transpose(0, 1)
        k, v = ((x @ w).view(len(x), -1, 2).transpose(0, 1) for w in (m.k, m.v))
        h = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=bias(m, len(x)), enable_gqa=groups > 1)[
            0
        ]
        return h.transpose(0, 1).reshape(len(x), -1) @ m.o

    return run


def alibi(m: Any, n: int) -> Tensor:
    places = torch.arange(n)
    return -(places[:, None] - places).abs() * torch.tensor([1.0, 0.5, 0.25])[:, None, None]


def relative(m: Any, n: int) -> Tensor:
    places = torch.arange(n)
    return F.embedding(places[:, None] - places + n, m.bias).permute(2, 0, 1)


QKVO = {"q": (3, 6), "k": (3, 6), "v": (3, 6), "o": (6, 2)}


def two_roles(m: Any, x: Tensor) -> Tensor:
    """Rows and columns of one square weight are the same neurons."""
    h = torch.tanh(x @ m.a)
    return torch.tanh(h @ m.square + h) @ m.b


def incompatible_roles(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(x @ m.a)
    return (h.view(-1, 2, 3).flatten(1) * m.c.repeat(2) + (h.view(-1, 3, 2) * m.c[None, :, None]).flatten(1)) @ m.b


def buffer(m: Any, x: Tensor) -> Tensor:
    return torch.tanh(x @ m.a + torch.linspace(0, 1, 6)) @ m.b


def where_index(m: Any, x: Tensor) -> Tensor:
    h = x @ m.a
    return torch.where(torch.arange(6) % 2 == 0, h, -h) @ m.b


def hidden_view(m: Any, x: Tensor) -> Tensor:
    return torch.tanh(x @ m.a + m.hidden) @ m.b + torch.tanh(x @ m.c) @ m.d


class HiddenView(Tiny):
    """A view of a parameter that was made before the forward pass, and has the same number everywhere so far."""

    def __init__(self) -> None:
        super().__init__(hidden_view, {"a": A, "b": B, "c": A, "d": B})
        nn.init.zeros_(self.d)
        self.hidden = self.d.data[:, 0]

    def double(self) -> HiddenView:
        model = super().double()
        model.hidden = model.d.data[:, 0]  # a copy has views of its own
        return model


def unrolled(cell: type[nn.Module]) -> Case:
    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = cell(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for step in x.unbind(1):
                state = self.cell(step, state)
            return self.head(state[0] if isinstance(state, tuple) else state)

    return Case(f"unrolled {cell.__name__}", Unrolled, (6,), (2, 3, 3))


def recurrent(kind: type[nn.Module], **settings: Any) -> Case:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core, self.head = (
                kind(3, 6, batch_first=True, **settings),
                nn.Linear(6 * (1 + settings.get("bidirectional", 0)), 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.core(x)[0])

    return Case(
        f"{kind.__name__} {settings}",
        Recurrent,
        (6,) * (1 + settings.get("bidirectional", 0)) * settings.get("num_layers", 1),
        (2, 3, 3),
    )


def chain(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(layer() for layer in layers))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(5, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return (self.words(x) + torch.tanh(self.mix(self.words(x)))) @ self.words.weight.T


class Adapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.up, self.head = nn.Linear(3, 8), nn.Linear(8, 5), nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        return self.head(h + self.up(F.gelu(self.down(h))))


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 6)), nn.Tanh(), nn.Linear(6, 2))


def weight_normed(old: bool) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(3, 6), dim=None if old else 0), nn.Tanh(), nn.Linear(6, 2)
        )

    return build


ORDER = [
    tiny("cumulative sum", lambda m, x: (x @ m.a).cumsum(-1) @ m.b, a=A, b=B),
    tiny("cumulative sum elsewhere", lambda m, x: (x @ m.a).cumsum(0) @ m.b, 6, a=A, b=B),
    tiny("flip", lambda m, x: (x @ m.a).flip(-1) + m.b, a=A, b=(6,)),
    tiny("flip and back", lambda m, x: torch.relu((x @ m.a).flip(-1)) @ m.b, a=A, b=B),
    tiny("roll", lambda m, x: ((x @ m.a).roll(1, -1) * (x @ m.a)) @ m.b, a=A, b=B),
    tiny("sorted values by position", lambda m, x: (x @ m.a).sort(-1).values @ m.b, 6, a=A, b=B),
    tiny("largest values by position", lambda m, x: (x @ m.a).topk(3, -1).values @ m.b, 6, a=A, b=(3, 2)),
    tiny(
        "sorting and reading back", lambda m, x: (x @ m.a).gather(1, (x @ m.c).sort(-1).indices) @ m.b, 6, a=A, b=B, c=A
    ),
    tiny("ranks", lambda m, x: (x @ m.a).argsort(-1).argsort(-1).to(x.dtype) @ m.b, a=A, b=B),
    tiny("positions in arithmetic", lambda m, x: (x @ m.a).argmax(-1, keepdim=True) * (x @ m.b), a=A, b=(3, 2)),
    tiny("positions over all dimensions", positions_over_all, a=A, b=(1,)),
    tiny("positions as the output", positions_as_output, a=A),
    tiny("positions stored and computed with", store_positions, a=A, b=(2, 2)),
    tiny("positions gathered and computed with", gathered_positions, a=A, b=(1,)),
    tiny("positions in another table", argmax_reads_a_longer_table, a=A, table=(9, 2)),
    tiny("positions in a table of that size", lambda m, x: F.embedding((x @ m.a).argmax(-1), m.b), 6, a=A, b=B),
    tiny("one-hot gate", one_hot_gate, 6, a=A, b=B),
    tiny(
        "one-hot gate that looks at numbers",
        lambda m, x: F.one_hot((x @ m.a).argmax(-1), 6) * (x @ m.a) @ m.b,
        a=A,
        b=B,
    ),
    tiny("read by numbers of the input", lambda m, x: (x @ m.a)[:, (x[0] > 0).long()] @ m.b, a=A, b=(3, 2)),
    tiny("chosen by a mask of neurons", lambda m, x: (x @ m.a) * ((x @ m.a) > 0) @ m.b, 6, a=A, b=B),
    tiny("a constant that differs", buffer, a=A, b=B),
    tiny("where an index is even", where_index, a=A, b=B),
    tiny("triangle", lambda m, x: torch.tril(x.T @ (x @ m.a)) @ m.b, a=A, b=B),
    tiny("Fourier transform of neurons", lambda m, x: torch.fft.rfft(x @ m.a).abs() @ m.b, a=A, b=(4, 2)),
    tiny("Fourier transform of rows", lambda m, x: torch.fft.fft(x @ m.a, dim=0).abs() @ m.b, 6, a=A, b=B),
    tiny("padding", lambda m, x: F.pad(x @ m.a, (1, 0)) @ m.b, 6, a=A, b=(7, 2)),
    tiny("differences", lambda m, x: torch.diff(x @ m.a) @ m.b, a=A, b=(5, 2)),
    tiny(
        "memory in another order",
        lambda m, x: torch.relu((x @ m.a).as_strided((3, 3), (1, 3)) + x @ m.a) @ m.b,
        a=(3, 3),
        b=(3, 2),
        x=(3, 3),
    ),
]
PARTS = [
    tiny("half of the neurons", lambda m, x: (x @ m.a)[:, :4] @ m.b, 2, 4, a=A, b=(4, 2)),
    tiny(
        "halves with different uses",
        lambda m, x: torch.tanh((x @ m.a)[:, :3]) * (x @ m.a)[:, 3:] @ m.b,
        3,
        a=A,
        b=(3, 2),
    ),
    tiny(
        "thirds", lambda m, x: torch.cat([h.tanh() for h in (x @ m.a).split([1, 2, 3], -1)], -1) @ m.b, 2, 3, a=A, b=B
    ),
    tiny("every other neuron", lambda m, x: torch.tanh((x @ m.a)[:, ::2]) * (x @ m.a)[:, 1::2] @ m.b, 3, a=A, b=(3, 2)),
    tiny("every third from the second", lambda m, x: (x @ m.a)[:, 1::4] @ m.b, a=A, b=(2, 2)),
    tiny("overlapping parts", lambda m, x: ((x @ m.a)[:, :4] * (x @ m.a)[:, 2:]) @ m.b, 2, a=A, b=(4, 2)),
    tiny("added into a part", add_into_slice, 2, a=A, b=B),
    tiny("written into parts", write_slice, 2, 4, a=(3, 4), c=(3, 2), b=B),
    tiny("written through out=", written_through_out, 2, 4, a=(3, 4), b=B),
    tiny("twice the same", lambda m, x: torch.cat([x @ m.a, x @ m.a], -1) @ m.b, 6, a=A, b=(12, 2)),
    tiny(
        "twice the same, then a norm",
        lambda m, x: F.layer_norm(torch.cat([x @ m.a, x @ m.c], -1), (10,), m.g) @ m.b,
        4,
        6,
        a=A,
        c=(3, 4),
        g=(10,),
        b=(10, 2),
    ),
    tiny("repeated in turn", lambda m, x: (x @ m.a).repeat_interleave(2, dim=-1) @ m.b, 6, a=A, b=(12, 2)),
    tiny("repeated as a whole", lambda m, x: (x @ m.a).repeat(1, 2) @ m.b, 6, a=A, b=(12, 2)),
    tiny(
        "repeated in turn and as a whole",
        lambda m, x: ((x @ m.a).repeat_interleave(2, dim=-1) * (x @ m.a).repeat(1, 2)) @ m.b,
        a=A,
        b=(12, 2),
    ),
    tiny("expanded", lambda m, x: (x @ m.a)[:, None].expand(-1, 2, -1).flatten(1) @ m.b, 6, a=A, b=(12, 2)),
    tiny(
        "shuffled by hand",
        lambda m, x: torch.tanh(x @ m.a).view(-1, 2, 3).transpose(1, 2).flatten(1) @ m.b,
        2,
        3,
        a=A,
        b=B,
    ),
    tiny(
        "shuffled and added",
        lambda m, x: ((x @ m.a).view(-1, 2, 3).transpose(1, 2).flatten(1) + x @ m.a) @ m.b,
        a=A,
        b=B,
    ),
]
MEETINGS = [
    tiny("softmax over neurons", lambda m, x: (x @ m.a).softmax(-1) @ m.b, 6, a=A, b=B),
    tiny(
        "softmax over one of two axes",
        lambda m, x: (x @ m.a).view(-1, 2, 4).softmax(-1).flatten(1) @ m.b,
        2,
        4,
        a=(3, 8),
        b=(8, 2),
    ),
    tiny("softmax over the outer of two axes", heads_normed, 2, 4, a=(3, 8), b=(8, 2)),
    tiny("Gram matrix over rows", lambda m, x: (x @ m.a) @ (x @ m.a).T @ m.b, 6, a=A, b=(4, 2)),
    tiny("Gram matrix of neurons", lambda m, x: ((x @ m.a).T @ (x @ m.a)).sum(0) @ m.b, 6, a=A, b=B),
    tiny("Gram matrix of neurons, flat", lambda m, x: ((x @ m.a).T @ (x @ m.a)).flatten() @ m.b, a=A, b=(36, 2)),
    tiny("Gram matrix against a weight", lambda m, x: ((x @ m.a).T @ (x @ m.a) * m.c).sum(0) @ m.b, a=A, b=B, c=(6, 6)),
    tiny(
        "outer product",
        lambda m, x: torch.einsum("bi,bj->bij", x @ m.a, x @ m.c).flatten(1) @ m.b,
        4,
        6,
        a=A,
        c=(3, 4),
        b=(24, 2),
    ),
    tiny("weights per head", heads_apart, 2, 4, a=(3, 8), per_head=(2, 4, 2)),
    tiny("weights shared by heads", heads_together, 2, 4, a=(3, 8), shared=(4, 2)),
    tiny("heads that meet heads", heads_compared, 4, a=(3, 8), b=(4, 2)),
    tiny("heads through a square weight", heads_mixed, 3, 4, a=(3, 12), square=(4, 4), b=(12, 2)),
    tiny("heads less heads", heads_subtracted, 4, a=(3, 8), b=(4, 2)),
    tiny("distances", lambda m, x: torch.cdist(x @ m.a, m.c) @ m.b, 5, 6, a=A, c=(5, 6), b=(5, 2)),
    tiny("bilinear", lambda m, x: F.bilinear(torch.tanh(x @ m.a), x, m.w) @ m.b, 5, 6, a=A, w=(5, 6, 3), b=(5, 2)),
    tiny("a weight and its transpose", lambda m, x: torch.tanh(x @ m.a) @ m.a.T, 6, a=A),
    tiny("a square weight on a stream", two_roles, 6, a=A, square=(6, 6), b=B),
    tiny("two incompatible roles", incompatible_roles, a=A, c=(3,), b=B),
    tiny(
        "learned queries",
        lambda m, x: ((m.queries @ (x @ m.k).T).softmax(-1) @ (x @ m.v)).flatten() @ m.b,
        4,
        5,
        6,
        k=A,
        v=(3, 4),
        queries=(5, 6),
        b=(20, 2),
    ),
    tiny("attention", attention(lambda m, n: None), 2, 2, 3, **QKVO),
    tiny("attention with slopes", attention(alibi), 2, 2, **QKVO),
    tiny("attention with a relative bias", attention(relative), 2, 2, 3, bias=(9, 3), **QKVO),
    tiny(
        "attention with grouped queries",
        attention(lambda m, n: None, groups=3),
        2,
        2,
        2,
        3,
        **QKVO | {"q": (3, 12), "k": (3, 4), "v": (3, 4), "o": (12, 2)},
    ),
    tiny("rotary embedding as complex numbers", rotary_complex, 2, 4, q=(3, 8), k=(3, 8), v=(3, 8), o=(8, 2)),
    tiny("experts gathered", mixture_by_topk, 5, 6, router=(3, 5), up=(5, 3, 6), down=(5, 6, 2)),
    tiny("experts in a loop", mixture_by_loop, 6, router=(3, 5), up=(5, 3, 6), down=(5, 6, 2)),
    tiny("all experts at once", mixture_of_all, 5, 6, router=(3, 5), up=(5, 3, 6), down=(5, 6, 2)),
    module("a view of a parameter's memory", HiddenView),
]
LAYERS = [
    module("gated linear unit", chain(lambda: nn.Linear(3, 12), nn.GLU, lambda: nn.Linear(6, 2)), 6),
    tiny(
        "gated by SiLU, fused", lambda m, x: (F.silu((x @ m.a)[:, :4]) * (x @ m.a)[:, 4:]) @ m.b, 4, a=(3, 8), b=(4, 2)
    ),
    module(
        "log sigmoid, hard swish, PReLU",
        chain(lambda: nn.Linear(3, 6), nn.LogSigmoid, nn.Hardswish, lambda: nn.PReLU(6), lambda: nn.Linear(6, 2)),
        6,
    ),
    module(
        "layer norm over several dimensions",
        chain(lambda: nn.Conv1d(3, 6, 2), lambda: nn.LayerNorm([6, 4]), lambda: nn.Conv1d(6, 2, 4)),
        6,
        x=(2, 3, 5),
    ),
    module("RMS norm", chain(lambda: nn.Linear(3, 6), lambda: nn.RMSNorm(6), lambda: nn.Linear(6, 2)), 6),
    module(
        "group norm",
        chain(lambda: nn.Conv1d(3, 6, 2), lambda: nn.GroupNorm(2, 6), lambda: nn.Conv1d(6, 2, 4)),
        2,
        3,
        x=(2, 3, 5),
    ),
    module(
        "instance norm",
        chain(lambda: nn.Conv1d(3, 6, 2), lambda: nn.InstanceNorm1d(6, affine=True), lambda: nn.Conv1d(6, 2, 4)),
        6,
        x=(2, 3, 5),
    ),
    module(
        "batch norm without statistics",
        chain(lambda: nn.Linear(3, 6), lambda: nn.BatchNorm1d(6, track_running_stats=False), lambda: nn.Linear(6, 2)),
        6,
    ),
    module("weight norm", weight_normed(False), 6),
    module("weight norm of the whole", weight_normed(True), 6),
    module("spectral norm", spectral),
    module(
        "weight standardisation",
        chain(lambda: Standardised(3, 6, 3), nn.ReLU, lambda: Standardised(6, 2, 2)),
        6,
        x=(2, 3, 4, 4),
    ),
    module("tied embedding and head", Tied, 6, x=(2, 4), words=True),
    module("adapter", Adapter, 5, 8),
    module(
        "transposed convolutions",
        chain(
            lambda: nn.Conv1d(3, 6, 2),
            lambda: nn.ConvTranspose1d(6, 4, 2, groups=2, bias=True),
            lambda: nn.Conv1d(4, 2, 5),
        ),
        2,
        2,
        3,
        x=(2, 3, 5),
    ),
    module(
        "grouped and dilated in two dimensions",
        chain(lambda: nn.Conv2d(3, 6, 2), lambda: nn.Conv2d(6, 4, 2, groups=2, dilation=2), lambda: nn.Conv2d(4, 2, 2)),
        2,
        2,
        3,
        x=(2, 3, 5, 5),
    ),
    module(
        "three dimensions",
        chain(lambda: nn.Conv3d(1, 4, 2, stride=2), lambda: nn.ConvTranspose3d(4, 3, 2), lambda: nn.Conv3d(3, 2, 3)),
        3,
        4,
        x=(1, 1, 5, 5, 5),
    ),
    module(
        "pixel shuffle",
        chain(lambda: nn.Conv2d(3, 8, 1), lambda: nn.PixelShuffle(2), lambda: nn.Conv2d(2, 2, 2)),
        2,
        x=(2, 3, 3, 3),
    ),
    module(
        "pixel unshuffle",
        chain(lambda: nn.Conv2d(3, 5, 1), lambda: nn.PixelUnshuffle(2), lambda: nn.Conv2d(20, 2, 1)),
        5,
        x=(2, 3, 4, 4),
    ),
    module(
        "unfold and fold",
        chain(lambda: nn.Conv2d(3, 5, 1), lambda: nn.Unfold(2), lambda: nn.Fold((4, 4), 2), lambda: nn.Conv2d(5, 2, 1)),
        5,
        x=(2, 3, 4, 4),
    ),
    module(
        "pooling",
        chain(
            lambda: nn.Conv2d(3, 5, 1),
            lambda: nn.AdaptiveMaxPool2d(2),
            lambda: nn.LPPool2d(2, 2),
            lambda: nn.Conv2d(5, 2, 1),
        ),
        5,
        x=(2, 3, 4, 4),
    ),
    tiny(
        "grid sample",
        lambda m, x: (
            F.grid_sample(m.plane.expand(4, -1, -1, -1), x[:, None, None, :2].tanh(), align_corners=True)[..., 0, 0]
            @ m.b
        ),
        6,
        plane=(1, 6, 3, 3),
        b=B,
    ),
    unrolled(nn.RNNCell),
    unrolled(nn.GRUCell),
    unrolled(nn.LSTMCell),
    recurrent(nn.RNN),
    recurrent(nn.LSTM, num_layers=2),
    recurrent(nn.GRU, bidirectional=True),
]
CASES = [*ORDER, *PARTS, *MEETINGS, *LAYERS]
