"""A predictor for low-rank adapters: it continues the path of the layers they make, not that of their factors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from nino.errors import NinoError
from nino.graph.ir import NeuralGraph
from nino.predict.adapters import adapter_movement, adapter_products
from nino.predict.extrapolation import combine, products_of
from nino.predict.movement import UNCHANGED, Movement
from nino.predict.partition import WHOLE, Partition
from nino.predict.predictor import Progress
from nino.predict.request import check_request, device_of, empty_movement
from nino.predict.standardise import check_snapshots
from nino.predict.straight import StraightExtrapolator
from nino.predict.unchanged import unchanged_mask

FIRST, SECOND = ".lora_A.", ".lora_B."
"""In the names of PEFT's factors; a layer is the second times the first."""
Snapshots = Sequence[Mapping[str, Tensor]]


class AdapterExtrapolator(StraightExtrapolator):
    """A straight line of every adapter's product, as far as the path of all products is straight.

    The factors move as little as it takes to hold the product, so that an optimizer's moments keep their meaning
    (:mod:`nino.predict.adapters`). What is trained beside adapters, such as a new head, goes on in its own straight
    line for as long. Adapters that lie in several processes' shards are refused.
    """

    @torch.no_grad()
    def predict_movement(
        self,
        snapshots: Snapshots,
        horizon: int,
        graph: NeuralGraph,
        *,
        positions: Tensor | None = None,
        only: Collection[str] | None = None,
        device: torch.device | str | None = None,
        preserve_norms: bool = False,
        partition: Partition = WHOLE,
        progress: Progress | None = None,
        memory_budget: int | None = None,
    ) -> Movement:
        """Predict how far the weights move; see :meth:`nino.predict.predictor.Predictor.predict_movement`.

        Factors have no norms of their own to keep, so that ``preserve_norms`` changes nothing.
        """
        del positions, memory_budget, preserve_norms
        if partition is not WHOLE:
            raise NinoError(
                "adapters are continued as whole products, and these are several processes'; use 'straight'"
            )
        check_request(graph, horizon, self.max_horizon)
        check_snapshots(snapshots, graph.shapes, self.context)
        moved, where = empty_movement(snapshots[-1], graph, only), device_of(snapshots, device)
        pairs = pairs_of(moved)
        alone = [name for name in moved if name not in {factor for pair in pairs for factor in pair}]
        numbers = self._numbers(snapshots, pairs, alone, where, horizon)
        for index, (a, b) in enumerate(pairs, start=1):
            change = adapter_movement(_of(snapshots, a, where), _of(snapshots, b, where), numbers)
            _write(moved, a, change.a, snapshots)
            _write(moved, b, change.b, snapshots)
            if progress is not None:
                progress(index, len(pairs))
        for name in alone:
            _write(moved, name, combine(_of(snapshots, name, where), numbers), snapshots)
        return Movement.measured(moved, snapshots[-1])

    def _numbers(
        self,
        snapshots: Snapshots,
        pairs: Sequence[tuple[str, str]],
        alone: Sequence[str],
        device: torch.device,
        horizon: int,
    ) -> Tensor:
        """What the snapshots are multiplied by, ``[context]``; their sum is 0."""
        total = torch.zeros(self.context, self.context, dtype=torch.float64)
        for a, b in pairs:
            products = adapter_products(_of(snapshots, a, device), _of(snapshots, b, device)).cpu()
            total += products - products[:1] - products[:, :1] + products[0, 0]  # of what was added to the first
        for name in alone:
            total += products_of(_of(snapshots, name, device))
        steps = torch.diff(torch.diff(total, dim=0), dim=1)  # of the movements between neighbours
        along = self.coefficients(steps, 0.0, horizon)
        numbers = torch.zeros(self.context, dtype=torch.float64)
        numbers[1:] += along
        numbers[:-1] -= along
        return numbers


def pairs_of(names: Collection[str]) -> list[tuple[str, str]]:
    """The factors of every adapter among some parameters, ``A`` and ``B``."""
    return [(name, b) for name in names if FIRST in name and (b := name.replace(FIRST, SECOND)) in names]


def _of(snapshots: Snapshots, name: str, device: torch.device) -> list[Tensor]:
    return [snapshot[name].to(device) for snapshot in snapshots]


def _write(moved: Mapping[str, Tensor], name: str, change: Tensor, snapshots: Snapshots) -> None:
    unchanged = unchanged_mask([snapshot[name] for snapshot in snapshots])
    change = change.to(moved[name])
    moved[name].copy_(change if unchanged is None else change.masked_fill(unchanged, UNCHANGED))
