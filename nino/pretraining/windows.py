"""Windows of recorded runs: C snapshots as the network reads them, and where every weight went afterwards.

A window takes states of one run that lie ``stride`` recorded states apart, standardised by the statistics of its inputs
alone, as a nowcast is. Targets beyond the end of the run are masked. A window lies
within one segment of the run (:meth:`nino.data.Trajectory.segments`), never across a jump: its targets say where plain
training leads from its inputs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nino.data import Trajectory
from nino.data.trajectory import RecordedStates
from nino.errors import TrajectoryError
from nino.graph.edge_list import EdgeList
from nino.numbers import counted
from nino.predict.engine import graph_inputs
from nino.predict.model.config import NowcasterConfig
from nino.predict.model.networks import EdgeInputs
from nino.predict.standardise import Standardiser
from nino.pretraining.sampling import EVERYTHING, Sampling

CONV_DIMS = 4
"""Of the weight of a convolution of images."""


@dataclass(frozen=True, kw_only=True)
class WindowPlace:
    """Which window of which run."""

    run: int
    first: int
    """Index of the first input state."""
    stride: int
    """Recorded states between two snapshots."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """A training example: O edges that want a prediction, K horizons."""

    inputs: EdgeInputs
    horizons: Tensor
    """int64 ``[K]``: snapshot intervals ahead, in ascending order."""
    targets: Tensor
    """``[O, 9, K]``: movement of each weight from the last snapshot, as the network predicts it."""
    mask: Tensor
    """bool ``[O, 9, K]``: which targets exist (position used, horizon within the run)."""
    last_steps: Tensor
    """``[O, 9]``: movement from the last snapshot but one to the last, for the linear baseline."""
    movement: Tensor
    """``[O, K]``: how far the weights of the edge's parameter move from the last snapshot, root mean square; 1 where
    no target exists."""

    def to(self, device: torch.device) -> Window:
        """The window on a device."""

        def move(values: Mapping[str, Any]) -> dict[str, Any]:
            return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in values.items()}

        return Window(**{**move(vars(self)), "inputs": EdgeInputs(**move(vars(self.inputs)))})


class RecordedRun:
    """A trajectory with its graph, ready to be cut into windows."""

    def __init__(self, trajectory: RecordedStates, config: NowcasterConfig) -> None:
        self.trajectory = trajectory
        self.family = str(trajectory.training.get("family", "unknown"))
        self.segments = trajectory.segments()
        graph = trajectory.graph()
        if graph.wiring != config.wiring:
            raise TrajectoryError(
                f"{trajectory.folder}: recorded with the {graph.wiring} wiring, this nowcaster reads the "
                f"{config.wiring} one; train one of yours"
            )
        recorded = dict(trajectory.parameters)
        if recorded != graph.shapes:
            different = sorted(set(recorded.items()) ^ set(graph.shapes.items()))[:3]
            frozen = set(recorded.items()) < set(graph.shapes.items())
            raise TrajectoryError(
                f"{trajectory.folder}: recorded parameters differ from its graph: {different}"
                + ("; a nowcaster is trained on runs that train all of their parameters, none frozen" if frozen else "")
            )
        trajectory.check_finite()  # better said now than in the midst of a training
        self.edges = EdgeList(graph)
        self.positions = graph.positions(config.num_positions)
        self.words = graph.words()
        self.feature_mask = self.edges.feature_mask()

    def states(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The asked-for states, ``[len(indices), *shape]`` of each parameter."""
        return self.trajectory.split(self.trajectory.states(indices))

    def starts(self, length: int) -> list[range]:
        """Where stretches of ``length`` states can begin, in each segment that is long enough."""
        return [range(s.start, s.stop - length + 1) for s in self.segments if len(s) >= length]

    def just_jumped(self, starts: range, length: int) -> range:
        """Those of a stretch's starts whose windows of ``length`` states begin less than that after a jump."""
        steps = self.trajectory.steps
        before = steps[starts.start - 1] if starts.start else -1
        jumped = any(before < jump <= steps[starts.start] for jump in self.trajectory.jumps)
        return starts[:length] if jumped else starts[:0]

    def end_of_segment(self, index: int) -> int:
        """The end (exclusive) of the segment that a state lies in."""
        return next(segment.stop for segment in self.segments if index in segment)


class WindowSource:
    """Draws windows from a set of runs.

    Args:
        folders: of recorded trajectories, or runs that were read already (:func:`nino.data.read_memmap`).
        config: of the nowcaster; gives context, horizon and wiring.
        strides: snapshots of a window lie this many recorded states apart; one is drawn per window.

    Raises:
        TrajectoryError: if no folder is given, or a run is unreadable or shorter than the smallest window.
    """

    def __init__(
        self, folders: Sequence[str | RecordedStates], config: NowcasterConfig, strides: Sequence[int] = (1,)
    ) -> None:
        if not folders:
            raise TrajectoryError("no recorded runs: expected at least one trajectory folder")
        self.config = config
        self.strides = tuple(strides)
        self.runs = [RecordedRun(Trajectory(run) if isinstance(run, str) else run, config) for run in folders]
        for run in self.runs:
            needed = config.context * min(self.strides) + 1
            longest = max(map(len, run.segments))
            if longest < needed:
                found = counted(len(run.trajectory), "state")
                found += "" if len(run.segments) == 1 else f", at most {longest} without a jump or a gap between"
                raise TrajectoryError(
                    f"{run.trajectory.folder}: {found}, a window needs {needed}; choose smaller strides or leave it out"
                )
        self.by_family: dict[str, list[int]] = {}
        for index, run in enumerate(self.runs):
            self.by_family.setdefault(run.family, []).append(index)

    def describe(self) -> dict[str, Any]:
        """What windows are cut from, for the log of a training: strides, and the states of every run.

        Runs are named by their paths below the folder that holds them all.
        """
        folders = [os.path.abspath(run.trajectory.folder) for run in self.runs]
        common = os.path.commonpath(list(map(os.path.dirname, folders)))
        names = [Path(os.path.relpath(folder, common)).as_posix() for folder in folders]
        runs = {name: run.trajectory.describe() for name, run in zip(names, self.runs, strict=True)}
        return {"strides": list(self.strides), "runs": runs}

    def draw(self, family: str, generator: torch.Generator) -> WindowPlace:
        """Draw a run of the family, a stride that fits it and a start; in a run that jumps, often just after a jump.

        What a nowcaster reads in training is the way from its last jump, which a plain run never shows.
        """
        members = self.by_family[family]
        run = members[_randint(len(members), generator)]
        lengths = {stride: self.config.context * stride + 1 for stride in self.strides}
        fitting = [stride for stride in self.strides if self.runs[run].starts(lengths[stride])]
        stride = fitting[_randint(len(fitting), generator)]
        stretches = self.runs[run].starts(lengths[stride])
        after_jumps = [first for starts in stretches for first in self.runs[run].just_jumped(starts, lengths[stride])]
        if after_jumps and _randint(2, generator):
            places = after_jumps
        else:
            places = [first for starts in stretches for first in starts]
        return WindowPlace(run=run, first=places[_randint(len(places), generator)], stride=stride)

    def num_edges(self, place: WindowPlace) -> int:
        """The cost of a window."""
        return self.runs[place.run].edges.num_edges

    def load(
        self,
        place: WindowPlace,
        generator: torch.Generator | None = None,
        sampling: Sampling = EVERYTHING,
        horizons: Tensor | None = None,
    ) -> Window:
        """Read a window.

        Args:
            place: which one.
            generator: if given, the window is changed at random to one that could as well have been recorded (signs of
                the positions are flipped, since eigenvectors have none of their own; kernels are turned) and edges are
                sampled; else the window is whole.
            sampling: how many edges.
            horizons: which to predict, int64 ``[K]`` in ascending order; by default all, 1 to ``max_horizon``.
        """
        horizons = torch.arange(1, self.config.max_horizon + 1) if horizons is None else horizons
        run, config = self.runs[place.run], self.config
        last = place.first + (config.context - 1) * place.stride
        end = run.end_of_segment(place.first)
        if last >= end:
            raise TrajectoryError(f"{run.trajectory.folder}: {place} reaches over a jump or the end of its segment")
        ahead = horizons[horizons <= (end - 1 - last) // place.stride]
        offsets = torch.cat([torch.arange(1 - config.context, 1), ahead]) * place.stride
        named = run.states((last + offsets).tolist())
        if generator is not None:
            named = _turned(named, generator)
        states, scalers, future, steps = {}, {}, {}, {}
        for name, values in named.items():
            scaler = scalers[name] = Standardiser.of(values[: config.context], inputs=config.inputs)
            states[name] = scaler.encode_(values[: config.context].clone())
            future[name] = scaler.movement(values[config.context - 1 :] - values[config.context - 1])
            steps[name] = scaler.movement(values[config.context - 1] - values[config.context - 2])
        positions, kept, chosen = run.positions, None, torch.arange(run.edges.num_parameter_edges)
        if generator is not None:
            positions = positions * (torch.randint(2, (config.num_positions,), generator=generator) * 2 - 1)
            kept = sampling.keep(run.edges, run.words, generator)
            chosen = sampling.outputs(run.edges, kept, generator)
        inputs = graph_inputs(run.edges, states, scalers, positions, run.words)
        targets = run.edges.series({name: f[1:] for name, f in future.items()})[chosen]
        beyond = len(horizons) - len(ahead)
        padded = F.pad(targets, (0, beyond))
        mask = run.feature_mask[chosen][..., None].expand(padded.shape).clone()
        mask[..., len(ahead) :] = False
        movement = run.edges.per_parameter(
            {name: f[1:].square().flatten(1).mean(1).sqrt() for name, f in future.items()}
        )[chosen]
        inputs = _choose(inputs, kept, chosen)
        return Window(
            inputs=inputs,
            targets=padded,
            mask=mask,
            last_steps=run.edges.values(steps)[chosen],
            movement=F.pad(movement, (0, beyond), value=1.0),
            horizons=horizons,
        )


def _turned(named: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """All square kernels ``[..., k, k]`` flipped and transposed alike: as if trained on images that were."""
    upside_down, mirrored, transposed = torch.randint(2, (3,), generator=generator).tolist()
    axes = [axis for axis, flip in ((-2, upside_down), (-1, mirrored)) if flip]

    def turn(values: Tensor) -> Tensor:
        if values.ndim != 1 + CONV_DIMS or values.shape[-1] != values.shape[-2]:
            return values
        values = values.flip(axes)
        return values.transpose(-1, -2).contiguous() if transposed else values

    return {name: turn(values) for name, values in named.items()}


def _choose(inputs: EdgeInputs, kept: Tensor | None, chosen: Tensor) -> EdgeInputs:
    """The inputs with some of the edges alone, asked for some of those."""
    products = None if inputs.products is None else inputs.products[chosen]
    fields = vars(inputs) | {"num_outputs": len(chosen), "chosen": chosen, "products": products}
    if kept is not None:
        fields |= {"features": inputs.features[kept], "index": inputs.index[:, kept], "type": inputs.type[kept]}
        fields["chosen"] = (kept.cumsum(0) - 1)[chosen]
    return EdgeInputs(**fields)


def _randint(size: int, generator: torch.Generator) -> int:
    return int(torch.randint(size, (), generator=generator))
