"""Training a metanetwork on models of any architectures: batches of graphs, dealt to processes by their size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nino.errors import NinoError
from nino.graph.ir import NeuralGraph
from nino.metanet.inputs import GraphInputs, Model, union
from nino.metanet.network import GraphMetanetwork, graphs_for
from nino.numbers import as_whole, counted
from nino.pretraining.batching import deal

Loss = Callable[[Any, Any], Tensor]
"""Of what the network gives for one model, and that model's target."""
LOSSES = ("bce", "mse", "cross-entropy")
WARMUP = 0.05
"""Of the steps, in which the rate rises; it falls along half a cosine afterwards."""
MOST_GRADIENT = 1.0
MOST_LOOKED_AT = 64
"""Models by which pooled edges are scaled before training."""


@dataclass
class FitReport:
    """What :func:`fit` did."""

    losses: list[float] = field(default_factory=list)
    """Of every step, before it was taken."""


def fit(
    net: GraphMetanetwork,
    models: Sequence[Model],
    targets: Any,
    graphs: NeuralGraph | Sequence[NeuralGraph] | None = None,
    loss: str | Loss = "bce",
    steps: int = 2000,
    seed: int = 0,
    *,
    batch: int = 16,
    lr: float = 2e-3,
    weight_decay: float = 1e-2,
    example_inputs: Any = None,
    progress: Callable[[int, float], None] | None = None,
) -> FitReport:
    """Train a metanetwork in place, by AdamW with warm-up and a rate that falls to zero.

    Args:
        net: to be trained.
        models: modules, or state dicts; architectures may differ.
        targets: of each model: a tensor ``[models]`` or ``[models, outputs]`` for the losses by name, or a sequence of
            anything that ``loss`` takes.
        graphs: of each model, or one for all; by default every module is wired, by tracing it on ``example_inputs`` if
            there are some.
        loss: ``"bce"`` (targets between 0 and 1; the network gives probabilities afterwards), ``"mse"``,
            ``"cross-entropy"`` (targets are class numbers), or a function of one model's output and its target.
        steps: of the optimizer.
        seed: of the order of the models.
        batch: models per step, of all processes together.
        lr: the highest rate.
        weight_decay: of AdamW.
        example_inputs: what the models are called with; probes are like it.
        progress: called after every step with its number and loss.

    Returns:
        The losses.

    Raises:
        NinoError: if there are no models, targets or graphs do not fit, or a weight is NaN.
    """
    from accelerate import Accelerator

    models = _checked(net, models, steps, batch)
    graphs = _graphs(models, graphs, example_inputs)
    loss_of, wanted = _loss(net, loss, targets, len(models))
    net.prepare(models[0], example_inputs)
    accelerator = Accelerator()
    net.to(accelerator.device)
    read = _read_all(net, models, graphs)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=weight_decay)
    batches = batches_of(len(models), batch, steps, seed)
    report = FitReport()
    for value in _train(net, read, loss_of, wanted, batches, accelerator, optimizer, steps):
        report.losses.append(value)
        if progress is not None:
            progress(len(report.losses), value)
    if loss == "bce":
        net.config = replace(net.config, output="sigmoid")
    net.eval()
    return report


def _train(
    net: GraphMetanetwork,
    read: Sequence[GraphInputs],
    loss_of: Loss,
    wanted: Sequence[Any],
    batches: Iterator[list[int]],
    accelerator: Any,
    optimizer: torch.optim.Optimizer,
    steps: int,
) -> Iterator[float]:
    """Take the steps; the loss of each, before it was taken."""
    lr = optimizer.param_groups[0]["lr"]
    prepared, optimizer = accelerator.prepare(net, optimizer)
    net.train()
    for step, chosen in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * rate_factor(step, steps)
        picked = _dealt(chosen, read, accelerator)
        outputs = prepared(union([read[index] for index in picked]))
        value = torch.stack([loss_of(out, wanted[index]) for out, index in zip(outputs, picked, strict=True)]).mean()
        if not bool(value.isfinite()):
            raise NinoError(f"the loss is {float(value.detach())} at step {step}: lower the rate (lr={lr})")
        optimizer.zero_grad()
        accelerator.backward(value)
        accelerator.clip_grad_norm_(net.parameters(), MOST_GRADIENT)
        optimizer.step()
        yield float(value.detach())


def _checked(net: Any, models: Any, steps: Any, batch: Any) -> list[Model]:
    """The models, if there can be a training of that kind."""
    if not isinstance(net, GraphMetanetwork):
        raise NinoError(f"fit trains a GraphMetanetwork, got {type(net).__name__}")
    if isinstance(models, (torch.nn.Module, Mapping, str)):
        raise NinoError(f"fit takes a list of models, got one {type(models).__name__}")
    for name, number in (("steps", steps), ("batch", batch)):
        if as_whole(number, 1) is None:
            raise NinoError(f"{name} must be a whole number of at least 1, got {number!r}")
    models = list(models)
    if not models:
        raise NinoError("fit needs at least one model: the zoo is empty")
    return models


def _dealt(chosen: list[int], read: Sequence[GraphInputs], accelerator: Any) -> list[int]:
    """Those of the chosen models that this process takes, so that all have about as many edges."""
    costs = [read[index].num_edges for index in chosen]
    mine = deal(costs, accelerator.num_processes)[accelerator.process_index]
    return [chosen[index] for index in mine] or chosen[:1]


def _graphs(
    models: Sequence[Model], graphs: NeuralGraph | Sequence[NeuralGraph] | None, example_inputs: Any
) -> list[NeuralGraph]:
    if graphs is not None:
        return graphs_for(models, graphs)
    found = []
    for index, model in enumerate(models):
        if not isinstance(model, torch.nn.Module):
            raise NinoError("state dicts have no graph of their own: pass graphs=")
        found.append(NeuralGraph.from_model(model, example_inputs=example_inputs))
        if found[-1].wiring == "per-parameter":
            raise NinoError(
                f"model {index} of the zoo, {type(model).__name__}, cannot be traced: pass example_inputs that it "
                "takes, or its graph in graphs="
            )
    return found


@torch.no_grad()
def _read_all(net: GraphMetanetwork, models: Sequence[Model], graphs: Sequence[NeuralGraph]) -> list[GraphInputs]:
    """What the network reads of each model, once it knows by what to scale pooled edges."""
    read = []
    for index, (model, graph) in enumerate(zip(models, graphs, strict=True)):
        try:
            read.append(net.read(model, graph))
        except NinoError as error:
            raise NinoError(f"model {index} of the zoo: {error}") from error
    net.look_at(read[:: max(1, len(read) // MOST_LOOKED_AT)])
    return read


def _loss(net: GraphMetanetwork, loss: str | Loss, targets: Any, number: int) -> tuple[Loss, Sequence[Any]]:
    """The loss of one model, and its targets."""
    if not hasattr(targets, "__len__") or len(targets) != number:
        came = counted(len(targets), "target") if hasattr(targets, "__len__") else type(targets).__name__
        raise NinoError(f"fit got {came} for {counted(number, 'model')}; give one each")
    if not isinstance(loss, str):
        return loss, targets
    if loss not in LOSSES:
        raise NinoError(f"loss must be one of {', '.join(LOSSES)} or a function, got {loss!r}")
    if net.config.head == "equivariant":
        raise NinoError("of an equivariant head, loss must be a function of a dict of new weights and a target")
    like = next(net.parameters())
    wanted = _numbers(targets).to(like.device)
    outputs = net.config.outputs
    if loss == "cross-entropy":
        if wanted.dim() != 1 or bool(((wanted < 0) | (wanted >= outputs) | (wanted != wanted.long())).any()):
            raise NinoError(f"loss='cross-entropy' takes one whole number from 0 to {outputs - 1} per model")
        return lambda out, target: F.cross_entropy(out, target.long()), wanted  # type: ignore[return-value]
    if wanted.dim() > 2 or (wanted.dim() == 2 and wanted.shape[1] not in (1, outputs)):
        raise NinoError(
            f"targets must be [models] or [models, outputs] with {outputs} outputs, got {tuple(wanted.shape)}"
        )
    wanted = wanted.to(like.dtype)
    if not bool(wanted.isfinite().all()):
        raise NinoError("a target is NaN or infinite")
    if loss == "mse":
        return lambda out, target: (out - target).square().mean(), wanted  # type: ignore[return-value]
    if bool(((wanted < 0) | (wanted > 1)).any()):
        raise NinoError("loss='bce' takes targets between 0 and 1: give accuracies as parts of one")
    net.config = replace(net.config, output="linear")
    return lambda out, target: F.binary_cross_entropy_with_logits(out, target.expand_as(out)), wanted  # type: ignore[return-value]


def _numbers(targets: Any) -> Tensor:
    try:
        return torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError) as error:
        raise NinoError(f"targets must be numbers for a loss by name ({str(error).splitlines()[0]})") from error


def batches_of(number: int, batch: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Models of every step: all of them once, in a random order, before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < min(batch, number):
            order += torch.randperm(number, generator=generator).tolist()
        yield order[:batch]
        order = order[batch:]


def rate_factor(step: int, steps: int) -> float:
    """The rate of a step, as a part of the highest."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
