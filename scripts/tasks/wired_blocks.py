"""Blocks that other libraries' models are made of, as plain modules: graphs, diffusion, flows, older convnets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Made = tuple[nn.Module, Any]
BLOCKS: dict[str, Callable[[], Made]] = {}
EDGES = torch.tensor([[0, 1, 2, 3, 4, 1, 2, 0], [1, 2, 2, 4, 0, 0, 1, 3]])


def draw(*shape: int) -> Tensor:
    """The same numbers each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def block(name: str, *inputs: Any, **named: Any) -> Callable[[Any], Any]:
    """Register a module, built without arguments, and what it is called with."""

    def register(kind: Any) -> Any:
        BLOCKS[name] = lambda: (kind(), named or inputs)
        return kind

    return register


# Graph networks


def with_loops(edges: Tensor, count: int) -> Tensor:
    """Edges with just one loop at every node."""
    edges = edges[:, edges[0] != edges[1]]
    return torch.cat([edges, torch.arange(count).repeat(2, 1)], dim=1)


@block("GCN", draw(5, 4), EDGES)
class Gcn(nn.Module):
    """Two convolutions over a graph, normalised by degrees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)
        self.bias = nn.Parameter(torch.zeros(6))

    def spread(self, h: Tensor, edges: Tensor) -> Tensor:
        """Sums over neighbours."""
        edges = with_loops(edges, len(h))
        degree = torch.zeros(len(h), dtype=h.dtype).scatter_add_(0, edges[1], torch.ones(edges.shape[1], dtype=h.dtype))
        weight = degree.pow(-0.5)[edges[0]] * degree.pow(-0.5)[edges[1]]
        return torch.zeros_like(h).index_add_(0, edges[1], h[edges[0]] * weight[:, None])

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = torch.relu(self.spread(self.first(x), edges) + self.bias)
        return self.spread(self.second(h), edges)


@block("GAT", draw(5, 4), EDGES)
class Gat(nn.Module):
    """Attention over the edges of a graph, in heads."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.out = nn.Linear(4, 2 * 6, bias=False), nn.Linear(12, 3)
        self.source, self.target = (nn.Parameter(torch.randn(1, 2, 6)) for _ in range(2))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        edges = with_loops(edges, len(x))
        h = self.values(x).view(-1, 2, 6)
        score = (h * self.source).sum(-1)[edges[0]] + (h * self.target).sum(-1)[edges[1]]
        score = F.leaky_relu(score, 0.2).exp()
        total = torch.zeros(len(x), 2, dtype=score.dtype).index_add(0, edges[1], score)
        share = score / total[edges[1]]
        out = torch.zeros_like(h).index_add(0, edges[1], h[edges[0]] * share[..., None])
        return self.out(F.elu(out.flatten(1)))


@block("GraphSAGE and GIN", draw(5, 4), EDGES)
class SageGin(nn.Module):
    """Means of neighbours beside oneself, then sums through a network."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = nn.Linear(4, 6), nn.Linear(4, 6, bias=False)
        self.eps = nn.Parameter(torch.zeros(()))
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        at = edges[1][:, None].expand(-1, x.shape[1])
        mean = torch.zeros_like(x).scatter_reduce(0, at, x[edges[0]], "mean", include_self=False)
        h = torch.relu(self.own(x) + self.other(mean))
        return self.net((1 + self.eps) * h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]))


@block("EdgeConv", draw(5, 4), EDGES)
class EdgeConv(nn.Module):
    """A network on pairs of nodes, the maximum over neighbours, and the mean of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5)), nn.Linear(5, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        pairs = self.net(torch.cat([x[edges[1]], x[edges[0]] - x[edges[1]]], dim=-1))
        at = edges[1][:, None].expand(-1, pairs.shape[1])
        most = torch.zeros(len(x), pairs.shape[1], dtype=pairs.dtype).scatter_reduce(0, at, pairs, "amax")
        return self.head(most.mean(0, keepdim=True))


# Diffusion


def sinusoids(t: Tensor, width: int) -> Tensor:
    """Of a time step."""
    angles = t.float()[:, None] * torch.exp(-torch.arange(width // 2, dtype=torch.float32))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class ResnetBlock(nn.Module):
    """Two convolutions with the time between them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, inputs), nn.GroupNorm(2, outputs)
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time = nn.Linear(8, 2 * outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(F.silu(time))[:, :, None, None].chunk(2, dim=1)
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))


class CrossAttention(nn.Module):
    """Queries from one sequence, keys and values from another."""

    def __init__(self, width: int, context: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(n, width, bias=False) for n in (width, context, context))
        self.out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.1))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            of(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for of, y in ((self.q, x), (self.k, context), (self.v, context))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GeGlu(nn.Module):
    """A gated network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 24), nn.Linear(12, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))


class SpatialTransformer(nn.Module):
    """Places as a sequence that attends to itself and to a text."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.GroupNorm(2, width), nn.Conv2d(width, 8, 1), nn.Conv2d(8, width, 1)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.own, self.cross, self.net = CrossAttention(8, 8), CrossAttention(8, 5), GeGlu(8)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        n, _, height, width = x.shape
        h = self.inner(self.norm(x)).permute(0, 2, 3, 1).reshape(n, height * width, 8)
        normed = self.norms[0](h)
        h = h + self.own(normed, normed)
        h = h + self.cross(self.norms[1](h), text)
        h = h + self.net(self.norms[2](h))
        return x + self.outer(h.reshape(n, height, width, 8).permute(0, 3, 1, 2).contiguous())


@dataclass
class Sample:
    """What the models of diffusers return."""

    sample: Tensor


@block("UNet2DConditionModel", draw(2, 3, 8, 8), torch.tensor([1, 7]), draw(2, 4, 5))
class ConditionedUNet(nn.Module):
    """Down and up again, conditioned on a time step and a text."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 8))
        self.stem, self.down = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, stride=2, padding=1)
        self.block1, self.middle, self.block2 = ResnetBlock(6, 6), ResnetBlock(6, 10), ResnetBlock(16, 6)
        self.attend, self.up = SpatialTransformer(10), nn.Conv2d(10, 10, 3, padding=1)
        self.norm, self.head = nn.GroupNorm(3, 6), nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Sample:
        time = self.time(sinusoids(timestep, 6).to(sample.dtype))
        fine = self.block1(self.stem(sample), time)
        coarse = self.attend(self.middle(self.down(fine), time), encoder_hidden_states)
        coarse = self.up(F.interpolate(coarse, scale_factor=2.0, mode="nearest"))
        return Sample(self.head(F.silu(self.norm(self.block2(torch.cat([coarse, fine], dim=1), time)))))


@block("DiT", draw(2, 3, 8, 8), torch.tensor([1, 7]), torch.tensor([0, 2]))
class DiT(nn.Module):
    """A transformer on patches whose norms are set by time and class."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.places = nn.Conv2d(3, 8, 2, stride=2), nn.Parameter(torch.randn(1, 16, 8), requires_grad=False)
        self.time, self.label = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 8)), nn.Embedding(4, 8)
        self.norm = nn.LayerNorm(8, elementwise_affine=False)
        self.attention, self.net = CrossAttention(8, 8), GeGlu(8)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(8, 48))
        self.head = nn.Linear(8, 12)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2) + self.places
        c = self.time(sinusoids(t, 6).to(x.dtype)) + self.label(y)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        normed = self.norm(h) * (1 + scale1) + shift1
        h = h + gate1 * self.attention(normed, normed)
        h = h + gate2 * self.net(self.norm(h) * (1 + scale2) + shift2)
        out = self.head(self.norm(h)).view(-1, 4, 4, 2, 2, 3)
        return torch.einsum("nhwpqc->nchpwq", out).reshape(-1, 3, 8, 8)


@block("AutoencoderKL", draw(2, 3, 8, 8))
class AutoencoderKL(nn.Module):
    """Mean and variance of a code, a sample of it, and what is made of that."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.SiLU(), nn.Conv2d(6, 8, 3, 2, 1)
        )
        self.decoder = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, 2), nn.SiLU(), nn.Conv2d(6, 3, 3, padding=1))

    def forward(self, x: Tensor) -> dict[str, Any]:
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        code = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        return {"sample": self.decoder(code), "posterior": {"mean": mean, "logvar": logvar}}


@block("VQ-VAE", draw(2, 3, 8, 8))
class VqVae(nn.Module):
    """The nearest entry of a codebook, passed straight through."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, 6, 2, 2), nn.ConvTranspose2d(6, 3, 2, 2)
        self.codebook = nn.Embedding(7, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x).permute(0, 2, 3, 1)
        nearest = torch.cdist(z.flatten(0, 2), self.codebook.weight).argmin(1)
        q = self.codebook(nearest).view(z.shape)
        loss = (q - z.detach()).square().mean() + (q.detach() - z).square().mean()
        return self.decoder((z + (q - z).detach()).permute(0, 3, 1, 2)), loss


# Flows and densities


@block("RealNVP", draw(3, 4))
class RealNvp(nn.Module):
    """Coupling by a mask, and by halves."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([True, False, True, False]))
        self.first, self.second = (nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.clone()
        scale, shift = self.first(x[:, self.mask]).chunk(2, dim=1)
        y[:, ~self.mask] = x[:, ~self.mask] * torch.tanh(scale).exp() + shift
        left, right = y.chunk(2, dim=1)
        more, shift = self.second(left).chunk(2, dim=1)
        return torch.cat([left, right * more.exp() + shift], dim=1), scale.sum(1) + more.sum(1)


@block("MADE and PixelCNN", draw(2, 1, 6, 6))
class Masked(nn.Module):
    """Kernels and weights times masks."""

    mask: Tensor
    lower: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.second, self.line = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 4, 1), nn.Linear(24, 24)
        mask = torch.ones(3, 3)
        mask[1, 1:], mask[2] = 0, 0
        self.register_buffer("mask", mask[None, None])
        self.register_buffer("lower", torch.tril(torch.ones(24, 24), -1))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(F.conv2d(x, self.conv.weight * self.mask, self.conv.bias, padding=1))
        h = torch.relu(self.second(h)).mean(2).flatten(1)
        return F.linear(h, self.line.weight * self.lower, self.line.bias)


# Older and odder networks


class OptionA(nn.Module):
    """A residual block whose shortcut takes every second place and fills channels up with zeros."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.more = (outputs - inputs) // 2
        self.net = nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.net(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more, self.more)))


BLOCKS["ResNet with padded shortcuts"] = lambda: (
    nn.Sequential(
        nn.Conv2d(3, 4, 3), OptionA(4, 8), OptionA(8, 10), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 2)
    ),
    draw(2, 3, 9, 9),
)
BLOCKS["spectral norm"] = lambda: (
    nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 6, 3)),
        nn.LeakyReLU(0.2),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 2, 1)),
    ),
    draw(2, 3, 6, 6),
)
BLOCKS["weight norm"] = lambda: (
    nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 6, 3)),
        nn.ReLU(),
        nn.utils.parametrizations.weight_norm(nn.Conv1d(6, 2, 1)),
    ),
    draw(2, 3, 8),
)


@block("SegNet", draw(2, 3, 8, 8))
class SegNet(nn.Module):
    """Pooling that remembers where, and its inverse."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h, where = F.max_pool2d(F.relu(self.first(x)), 2, return_indices=True)
        return self.head(F.max_unpool2d(self.second(h), where, (2, 2)))


@block("frozen batch norm", draw(2, 3, 6, 6))
class Frozen(nn.Module):
    """Scales and shifts kept in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1)
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((6,), value))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (
            getattr(self, n).reshape(1, -1, 1, 1) for n in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight * (var + 1e-5).rsqrt()
        return self.head(F.relu(self.conv(x) * scale + (bias - mean * scale)))


@block("bags of words", torch.tensor([1, 3, 2, 2, 5, 0]), torch.tensor([0, 2, 3]))
class Bags(nn.Module):
    """Means of rows of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.net = (
            nn.EmbeddingBag(7, 6, mode="mean"),
            nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)),
        )

    def forward(self, words: Tensor, offsets: Tensor) -> Tensor:
        return self.net(self.table(words, offsets))


@block("FNet", draw(2, 5, 4))
class FNet(nn.Module):
    """Fourier transforms over places and features in place of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.net, self.head = (
            nn.Linear(4, 6),
            nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)),
            nn.Linear(6, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + torch.fft.fft(torch.fft.fft(h, dim=-1), dim=-2).real
        return self.head(h + self.net(h))


@block("pooling over features", draw(3, 4))
class Pooled(nn.Module):
    """Maxout, and pooling along hidden neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 12), nn.Linear(6, 8), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).unflatten(-1, (6, 2)).amax(-1)
        return self.head(F.avg_pool1d(self.second(h)[:, None], 2)[:, 0])


@block("Fourier neural operator", draw(2, 8, 4))
class Fno(nn.Module):
    """Spectral weights kept as pairs of real numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.local, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.weight = nn.Parameter(torch.randn(3, 6, 6, 2) / 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(x)
        spectrum = torch.fft.rfft(h, dim=1)[:, :3]
        mixed = torch.einsum("bkc,kcd->bkd", spectrum, torch.view_as_complex(self.weight))
        return self.head(torch.relu(torch.fft.irfft(mixed, n=x.shape[1], dim=1) + self.local(h)))


@block("decoder into prepared memory", draw(4, 3, 4))
class Prepared(nn.Module):
    """Writes its states where they are read later."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Linear(4, 5), nn.GRUCell(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), 6, dtype=x.dtype)
        out = torch.empty(len(x), x.shape[1], 6, dtype=x.dtype)
        for t in range(x.shape[1]):
            state = self.cell(torch.relu(self.embed(x[:, t])), state)
            out[:, t] = state
        return self.head(out)


@block("experts by masks", draw(6, 4))
class Experts(nn.Module):
    """Rows go to the expert of their highest score."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router, self.head = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 6)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        weight, chosen = self.router(h).softmax(-1).max(-1)
        out = torch.zeros_like(h)
        for index, expert in enumerate(self.experts):
            rows = chosen == index
            out[rows] = expert(h[rows]) * weight[rows, None]
        return self.head(h + out)


@block("masked autoencoder", draw(2, 3, 8, 8))
class MaskedAutoencoder(nn.Module):
    """Random patches are left out, and a token stands for them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.encoder, self.decoder = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 8), nn.Linear(8, 12)
        self.token = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2)
        order = torch.rand(h.shape[:2]).argsort(1)
        back = order.argsort(1)
        kept = torch.relu(self.encoder(h.gather(1, order[:, :6, None].expand(-1, -1, 8))))
        full = torch.cat([kept, self.token.expand(len(x), 10, -1)], dim=1)
        return self.decoder(full.gather(1, back[:, :, None].expand(-1, -1, 8)))


@block("deep equilibrium", draw(3, 4))
class Equilibrium(nn.Module):
    """The same layer again and again, with a stop when nothing changes any more."""

    def __init__(self) -> None:
        super().__init__()
        self.inject, self.layer, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 6, dtype=x.dtype)
        for _ in range(4):
            h = torch.tanh(self.layer(h) / 4 + self.inject(x))
        return self.head(h)


@block("dynamic kernels", draw(2, 4, 5, 5))
class CondConv(nn.Module):
    """A kernel per example, mixed from experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.route, self.out = (
            nn.Parameter(torch.randn(3, 6, 4, 3, 3)),
            nn.Linear(4, 3),
            nn.Conv2d(6, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        kernels = (torch.sigmoid(self.route(x.mean((2, 3)))) @ self.experts.flatten(1)).view(n * 6, 4, 3, 3)
        return self.out(F.relu(F.conv2d(x.reshape(1, n * 4, h, w), kernels, padding=1, groups=n).view(n, 6, h, w)))
