"""Models whose weights walked at random, in several memory layouts; wide ones; what an action allocates at most."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from models import gpt2
from tiny import Weights
from torch import Tensor, nn

import nino
from nino import NeuralGraph
from nino.predict.model import build_network

Snapshots = list[Weights]


def _scrambled(tensor: Tensor) -> Tensor:
    """The strides of the reversed dimensions, in every second place of the storage: kernels cannot be viewed."""
    order = tuple(reversed(range(tensor.ndim)))
    return tensor.permute(order).repeat_interleave(2, dim=-1)[..., ::2].permute(order) if tensor.ndim else tensor


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "channels last": lambda tensor: tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor,
    "scrambled": _scrambled,
}


def walked(graph: NeuralGraph, context: int = 3, dtype: torch.dtype = torch.float32) -> Snapshots:
    """Weights that went straight on at random, oldest first."""
    generator = torch.Generator().manual_seed(0)
    start, steps = (
        {name: torch.randn(shape, generator=generator) for name, shape in graph.shapes.items()} for _ in range(2)
    )
    return [{n: (start[n] + 0.1 * age * steps[n]).to(dtype) for n in start} for age in range(context)]


def moved_model(
    build: Callable[[], nn.Module],
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    context: int = 3,
) -> tuple[nn.Module, NeuralGraph, Snapshots]:
    """A model whose parameters walked at random, and where they were; the last snapshot is where they are."""
    model = build()
    graph = NeuralGraph.from_model(model)
    snapshots = walked(graph, context, dtype)
    for name, parameter in model.named_parameters():
        if name in graph.shapes:
            parameter.data = LAYOUTS[layout](snapshots[-1][name].clone())
    return model, graph, snapshots


def random_nowcaster(**changes: Any) -> nino.Nowcaster:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nino.Nowcaster(build_network(nino.NowcasterConfig(hidden=16, **changes)))


def random_snapshots(
    graph: NeuralGraph, context: int = 5, seed: int = 5, dtype: torch.dtype = torch.float64
) -> Snapshots:
    generator = torch.Generator().manual_seed(seed)
    return [
        {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in graph.shapes.items()}
        for _ in range(context)
    ]


def chain(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)))  # noqa: RUF007


WIDE: dict[str, Callable[[], nn.Module]] = {
    "square": lambda: chain(80, 100, 30),
    "one source": lambda: chain(1, 600, 2),
    "convolutions": lambda: nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 5)),
    "one channel": lambda: nn.Sequential(nn.Conv2d(1, 300, 3), nn.Conv2d(300, 1, 3)),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(3, 200, 1), nn.Conv2d(200, 200, 5, groups=200), nn.Conv2d(200, 1, 1)),
    "flattened": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 100, 3)),
    "language model": lambda: gpt2(vocab_size=400, n_layer=1),
    "one vector": lambda: nn.Sequential(nn.LayerNorm(600)),
}


def peak_bytes(action: Callable[[], object]) -> int:
    """The most that was allocated at once during the action, by the records of the allocator."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()  # else what is left of earlier actions is given back in this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        action()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = most = 0
    for event in events:
        held += event.nbytes()
        most = max(most, held)
    assert most > 0
    return most
