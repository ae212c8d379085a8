"""Models as people write them by hand, small: the sizes of axes that may be relabelled, found by reading, proved."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check_zoo import pieces
from test_kinds import sizes
from torch import Tensor, nn

import nino


class Written(nn.Module):
    """A forward and the parts that it uses."""

    def __init__(self, run: Callable[..., Any], /, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(draw(*shape))


Made = tuple[nn.Module, Any]
PROGRAMS: dict[str, tuple[Callable[[], Made], tuple[int, ...]]] = {}


def program(*permutable: int) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    """Register a model with the sizes of its permutable axes."""

    def register(make: Callable[[], Made]) -> Callable[[], Made]:
        PROGRAMS[make.__name__.replace("_", " ")] = make, permutable
        return make

    return register


@program(6)
def lengths_in_a_list() -> Made:
    def run(m: Any, x: Tensor, lengths: list[int]) -> Tensor:
        return torch.stack([m.b(part.mean(0)) for part in torch.tanh(m.a(x)).split(lengths)])

    return Written(run, a=nn.Linear(3, 6), b=nn.Linear(6, 2)), (draw(9, 3), [4, 2, 3])


@program(5, 6)
def packed_sequences() -> Made:
    def run(m: Any, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        pack, unpack = nn.utils.rnn.pack_padded_sequence, nn.utils.rnn.pad_packed_sequence
        out, last = m.gru(pack(torch.tanh(m.a(x)), lengths))
        return m.b(unpack(out)[0]), m.b(last[-1])

    parts = {"a": nn.Linear(3, 5), "gru": nn.GRU(5, 6), "b": nn.Linear(6, 2)}
    return Written(run, **parts), (draw(5, 3, 3), torch.tensor([5, 3, 2]))


@dataclasses.dataclass
class Scores:
    """What a forward returns that is no dict."""

    scores: Tensor
    more: dict[str, list[Tensor]]
    loss: float | None = None


@program(6)
def dataclass_that_is_returned() -> Made:
    def run(m: Any, x: Tensor) -> Scores:
        hidden = torch.tanh(m.a(x))
        return Scores(m.b(hidden), {"other": [m.c(hidden)]})

    return Written(run, a=nn.Linear(3, 6), b=nn.Linear(6, 4), c=nn.Linear(6, 5)), (draw(4, 3),)


@program(5, 6)
def narrowed_memory_as_out() -> Made:
    def run(m: Any, x: Tensor) -> Tensor:
        memory = torch.empty(len(x), 11, dtype=x.dtype)
        torch.mul(torch.tanh(m.a(x)), 2, out=memory[:, :6])
        torch.tanh(m.b(x), out=memory[:, 6:])
        return m.c(memory)

    return Written(run, a=nn.Linear(3, 6), b=nn.Linear(3, 5), c=nn.Linear(11, 2)), (draw(4, 3),)


@program(6)
def products_as_out() -> Made:
    def run(m: Any, x: Tensor) -> Tensor:
        memory = torch.zeros(2, len(x), 6, dtype=x.dtype)
        for place, factor in enumerate((m.a, m.b)):
            torch.mm(x, factor, out=memory[place])
        return m.c(torch.relu(memory[0]) * torch.sigmoid(memory[1]))

    return Written(run, a=weight(3, 6), b=weight(3, 6), c=nn.Linear(6, 2)), (draw(4, 3),)


@program(6, 7)
def dense_adjacency() -> Made:
    def run(m: Any, x: Tensor, adjacency: Tensor) -> Tensor:
        adjacency = adjacency / adjacency.sum(1, keepdim=True).clamp(min=1)
        hidden = torch.relu(adjacency @ m.a(x))
        return m.c(torch.relu(m.own(hidden) + adjacency @ m.b(hidden))).amax(0)

    parts = {"a": nn.Linear(3, 6), "b": nn.Linear(6, 7), "own": nn.Linear(6, 7), "c": nn.Linear(7, 2)}
    return Written(run, **parts), (draw(5, 3), (draw(5, 5) > 0).float())


@program(6)
def sparse_features_and_adjacency() -> Made:
    def run(m: Any, x: Tensor, adjacency: Tensor) -> Tensor:
        return m.b(torch.relu(torch.sparse.mm(adjacency, torch.sparse.mm(x, m.a))))

    inputs = (draw(5, 4) > 0).float().to_sparse_coo(), (draw(5, 5) > 0).float().to_sparse_coo()
    return Written(run, a=weight(4, 6), b=nn.Linear(6, 2)), inputs


@program(2, 4)
def masked_edges_of_heads() -> Made:
    def run(m: Any, x: Tensor, joined: Tensor) -> Tensor:
        hidden = m.a(x).view(len(x), 2, 4).transpose(0, 1)
        scores = (hidden * m.left[:, None]).sum(-1)[:, :, None] + (hidden * m.right[:, None]).sum(-1)[:, None]
        scores[:, ~joined] = -1e9
        return m.b(F.elu((scores.softmax(-1) @ hidden).transpose(0, 1).flatten(1))[joined.any(1)])

    parts = {"a": nn.Linear(3, 8), "left": weight(2, 4), "right": weight(2, 4), "b": nn.Linear(8, 2)}
    return Written(run, **parts), (draw(5, 3), draw(5, 5) > -0.3)


@program(6, 7)
def image_tokens_scattered_among_words() -> Made:
    def run(m: Any, words: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        stream = m.words(words)
        stream = stream.masked_scatter(mask[..., None].expand_as(stream), m.image(image))
        return m.b(torch.tanh(m.a(stream)))

    parts = {"words": nn.Embedding(9, 6), "image": nn.Linear(4, 6), "a": nn.Linear(6, 7), "b": nn.Linear(7, 2)}
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 0, 1, 0]]).bool()
    return Written(run, **parts), (torch.tensor([[1, 2, 3, 4, 5], [5, 6, 7, 8, 0]]), draw(4, 4), mask)


@program()
def scattered_one_by_one() -> Made:
    """The mask differs along the features, so what is written of one row ends up in another."""

    def run(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        return m.c(torch.tanh(m.a(x)).masked_scatter(mask, m.b(x)))

    return Written(run, a=nn.Linear(3, 6), b=nn.Linear(3, 6), c=nn.Linear(6, 2)), (draw(4, 3), draw(4, 6) > 0)


@program(6)
def standardised_kernels() -> Made:
    def run(m: Any, x: Tensor) -> Tensor:
        kernel = m.a.weight
        deviation, mean = torch.std_mean(kernel, (1, 2, 3), keepdim=True)
        return m.b(torch.relu(F.conv2d(x, (kernel - mean) / deviation, m.a.bias)).mean((2, 3)))

    return Written(run, a=nn.Conv2d(3, 6, 3), b=nn.Linear(6, 2)), (draw(2, 3, 6, 6),)


@program(4)
def kernels_for_each_example() -> Made:
    def run(m: Any, x: Tensor, code: Tensor) -> Tensor:
        kernels = m.make(torch.tanh(m.a(code))).view(len(code) * 2, 3, 3, 3)
        return F.conv2d(x.reshape(1, -1, 6, 6), kernels, groups=len(code)).view(len(code), 2, 4, 4)

    return Written(run, a=nn.Linear(5, 4), make=nn.Linear(4, 54)), (draw(2, 3, 6, 6), draw(2, 5))


class Merged(nn.Module):
    """Adds a product to a weight in evaluation mode and takes it away again in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.full, self.down, self.up, self.is_merged = nn.Linear(3, 6), weight(2, 3), weight(6, 2), False

    def train(self, mode: bool = True) -> Merged:
        if mode is self.is_merged:
            self.full.weight.data += (-1 if mode else 1) * self.up.data @ self.down.data
            self.is_merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.full(x) if self.is_merged else self.full(x) + x @ self.down.t() @ self.up.t()


@program(2, 6)
def adapters_merged_in_evaluation() -> Made:
    return nn.Sequential(Merged(), nn.Tanh(), nn.Linear(6, 2)), (draw(4, 3),)


class Graph:
    """A batch of somebody's own class."""

    def __init__(self, x: Tensor, edges: dict[str, list[Tensor]]) -> None:
        self.x, self.edges = x, edges


@program(6)
def object_with_tensors() -> Made:
    def run(m: Any, graph: Graph) -> dict[str, Tensor]:
        return {"y": m.c(torch.tanh(m.a(graph.x) + m.b(graph.edges["all"][0])))}

    batch = Graph(draw(4, 3), {"all": [draw(4, 5)]})
    return Written(run, a=nn.Linear(3, 6), b=nn.Linear(5, 6), c=nn.Linear(6, 2)), (batch,)


@program(8)
def half_precision() -> Made:
    return nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2)).half(), (draw(4, 3).half(),)


@program(6)
def quantised_vectors() -> Made:
    def run(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = m.a(x)
        nearest = m.book(torch.cdist(hidden, m.book.weight).argmin(-1))
        return m.b(hidden + (nearest - hidden).detach()), (hidden - nearest).square().mean()

    return Written(run, a=nn.Linear(3, 6), book=nn.Embedding(1, 6), b=nn.Linear(6, 2)), (draw(4, 3),)


EXPERTS = 12


@program(5, 5, 6)
def many_experts_in_a_loop() -> Made:
    """Every expert's weights meet the sum of all experts before: what is noted of that must not multiply."""

    def run(m: Any, x: Tensor) -> Tensor:
        stream = m.a(x)
        for up, down, router in ((m.up, m.down, m.router), (m.more_up, m.more_down, m.more_router)):
            shares, out = (stream @ router).softmax(-1), torch.zeros_like(stream)
            for expert in range(EXPERTS):
                out = out + shares[:, expert, None] * (torch.relu(stream @ up[expert]) @ down[expert])
            stream = stream + out
        return m.b(stream)

    parts: dict[str, Any] = {"a": nn.Linear(3, 6), "b": nn.Linear(6, 2)}
    for more in ("", "more_"):
        parts |= {f"{more}up": weight(EXPERTS, 6, 5), f"{more}down": weight(EXPERTS, 5, 6)}
        parts[f"{more}router"] = weight(6, EXPERTS)
    return Written(run, **parts), (draw(4, 3),)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_wired_as_it_computes(name: str) -> None:
    make, permutable = PROGRAMS[name]
    torch.manual_seed(0)
    model, inputs = make()
    report = nino.check_wiring(model, inputs)
    assert report.ok, report
    assert report.modes == ("training", "evaluation")
    assert sizes(report.graph) == Counter(permutable), report
    assert len(pieces(report.graph)) == 1
    assert nino.NeuralGraph.from_model(model, example_inputs=inputs) == report.graph
