"""The nowcaster: a trained network, where it comes from and how it predicts.

Standardises snapshots, runs an engine, maps the prediction back. Knows nothing of optimizers and schedules.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nino.errors import CheckpointError, NinoError
from nino.graph.ir import NeuralGraph
from nino.predict.engine import predict_blockwise, predict_edgewise
from nino.predict.engine.blockwise import MESSAGE_VECTORS
from nino.predict.engine.hardware import product_dtype
from nino.predict.engine.listed import predict_listed
from nino.predict.engine.reader import SnapshotReader
from nino.predict.engine.tiling import Sizes
from nino.predict.engine.views import SnapshotViews, bytes_of_copies
from nino.predict.engine.writer import MovementWriter
from nino.predict.files import CONFIG_FILE, WEIGHTS_FILE, find_files, read_text
from nino.predict.model.config import NowcasterConfig
from nino.predict.model.networks import Network, Trend, build_network, build_network_with_weights
from nino.predict.movement import Movement, MovementSize, moved
from nino.predict.partition import WHOLE, Partition
from nino.predict.predictor import Progress
from nino.predict.remembered import RememberedGraph
from nino.predict.request import Computation, Engine, check_request, empty_movement, full_precision
from nino.predict.standardise import check_snapshots, measure_snapshots

logger = logging.getLogger(__name__)


class Nowcaster:
    """Predicts where a model's weights will be from where they have just been.

    Args:
        network: a trained network.

    Example:
        >>> nowcaster = Nowcaster.from_pretrained("nino-base")              # doctest: +SKIP
        >>> graph = nino.NeuralGraph.from_model(model)                      # doctest: +SKIP
        >>> new = nowcaster.predict(snapshots, horizon=20, graph=graph)     # doctest: +SKIP
    """

    def __init__(self, network: Network) -> None:
        self.network = network.eval().requires_grad_(False)
        self._said_wiring = False
        self._remembered = RememberedGraph()

    @property
    def config(self) -> NowcasterConfig:
        """Sizes and conventions of the network."""
        return self.network.config

    @property
    def context(self) -> int:
        """How many snapshots it reads."""
        return self.config.context

    @property
    def max_horizon(self) -> int:
        """How many snapshot intervals it looks ahead at most."""
        return self.config.max_horizon

    @classmethod
    def from_pretrained(cls, name: str | Path) -> Nowcaster:
        """Load a nowcaster that Nino ships, from a local folder, or from the Hugging Face hub.

        Args:
            name: ``"nino-tiny"``, ``"nino-small"`` or ``"nino-base"`` (shipped), a folder with ``config.json`` and
                ``model.safetensors``, or a hub id ``"user/name"``; looked up in this order.

        Raises:
            CheckpointError: if nothing of that name exists, or it is not a nowcaster, or is corrupted.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not isinstance(name, (str, Path)):
            hint = "; Nowcaster(network) makes a nowcaster of a network" if isinstance(name, torch.nn.Module) else ""
            raise CheckpointError(
                f"a nowcaster is given as a Nowcaster, a name or a folder, got {type(name).__name__}{hint}"
            )
        config_path, weights_path = find_files(str(name))
        config = NowcasterConfig.from_json(read_text(config_path), str(config_path))
        try:
            network = build_network_with_weights(config, load_file(weights_path))
        except (SafetensorError, RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{weights_path} does not hold the weights of {config_path}: {reason}") from error
        return cls(network)

    @classmethod
    def from_official(cls, path: str | Path) -> Nowcaster:
        """Load a published ``.pt`` file (``weights_only=True``: nothing in it is run).

        Raises:
            CheckpointError: if the file is missing, corrupted, or not a published NiNo or WNN.
        """
        from nino.predict.model.official import load_official

        return cls(load_official(path))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` to a folder, which is created.

        Raises:
            CheckpointError: if there is a file of that name, or no folder can be made.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be made a folder ({error.strerror}); give another name") from error
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.network.state_dict().items()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(self.config.to_json())

    def with_trend(self, trend: Trend | None = None) -> Nowcaster:
        """One with the same network and a trend (:class:`nino.NowcasterConfig`).

        Args:
            trend: is copied; by default a fresh one, with which it predicts the same.

        Raises:
            CheckpointError: if it does not read movements.
        """
        network = build_network(replace(self.config, trend=True))
        network.load_state_dict(network.state_dict() | self.network.state_dict())
        if trend is not None:
            network.trend = deepcopy(trend)
        return Nowcaster(network)

    def graph_of(self, model: torch.nn.Module, example_inputs: Any = None) -> NeuralGraph:
        """Wire a model as this nowcaster expects; where the published layout has no form for it, exactly.

        Args:
            model: to wire.
            example_inputs: as in :meth:`NeuralGraph.from_model`.
        """
        if self.config.wiring == "official":
            try:
                return NeuralGraph.from_model(model, wiring="official")
            except NinoError as error:
                logger.warning(
                    "%s; the published weights will run on the exact wiring, on which they were not trained", error
                )
                self._said_wiring = True
        return NeuralGraph.from_model(model, example_inputs=example_inputs)

    def check_fits(self, graph: NeuralGraph) -> None:
        """Refuse a graph with more words than the network's table has rows.

        Raises:
            CheckpointError: naming both sizes.
        """
        vocabulary_size = max((group.size for group in graph.groups if group.is_vocabulary), default=0)
        if 0 < self.config.vocabulary_size <= vocabulary_size:
            raise CheckpointError(
                f"this nowcaster's table has rows for {self.config.vocabulary_size - 1} words, the model has "
                f"{vocabulary_size}; "
                "use a nowcaster without a word table"
            )

    def predict(
        self,
        snapshots: Sequence[Mapping[str, Tensor]],
        horizon: int,
        graph: NeuralGraph,
        positions: Tensor | None = None,
        engine: Engine = "blockwise",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        *,
        memory_budget: int | None = None,
        progress: Progress | None = None,
        preserve_norms: bool = False,
    ) -> dict[str, Tensor]:
        """Predict the weights ``horizon`` snapshot intervals after the last snapshot.

        An element that is the same in all snapshots (the row of a padding token, a masked weight) stays as it is, bit
        for bit.

        Args:
            snapshots: ``config.context`` dicts of parameter name to tensor, oldest first; every parameter of the graph.
            horizon: snapshot intervals ahead, 1 to ``config.max_horizon``.
            graph: of the model that the snapshots are from.
            positions: node features ``[num_nodes, num_positions]``; by default the graph's own.
            engine: ``"blockwise"``, or ``"edges"`` for the definition (small models only); they agree to rounding.
            dtype: in which the network computes; snapshots may have any floating dtype. Below float32 the blockwise
                engine computes its large products in it, where the hardware can, and everything else in float32.
            device: where to compute; by default where the last snapshot lies.
            memory_budget: bytes that the blockwise engine may use beyond snapshots and movements; ``None`` for what is
                fastest (node features, and a tile of some MB on a CPU, some 100 MB on a GPU).
            progress: called by the blockwise engine with the work done and the total.
            preserve_norms: whether every parameter of two or more axes is scaled to the norm that it has in the last
                snapshot, up to rounding in its dtype (one that is zero there, or predicted so, is not). Elements that
                stay as they are are not scaled: the others get the norm that they have there, and so does the whole.

        Returns:
            Per parameter name the predicted tensor, with the dtype, device and memory format of the last snapshot: the
            last snapshot and :meth:`predict_movement`, added up.

        Raises:
            SnapshotError: if the snapshots do not fit the graph or hold NaN or infinity, or the prediction does.
            NinoError: if the horizon, the engine, the dtype, the positions or the budget are out of range, or the graph
                is none.
        """
        movement = self.predict_movement(
            snapshots,
            horizon,
            graph,
            positions=positions,
            engine=engine,
            dtype=dtype,
            device=device,
            memory_budget=memory_budget,
            progress=progress,
            preserve_norms=preserve_norms,
        ).tensors
        return {name: moved(snapshots[-1][name].detach(), movement.pop(name)) for name in graph.shapes}

    @torch.no_grad()
    def predict_movement(
        self,
        snapshots: Sequence[Mapping[str, Tensor]],
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
        engine: Engine = "blockwise",
        dtype: torch.dtype = torch.float32,
    ) -> Movement:
        """Predict how far the weights move; see :meth:`Predictor.predict_movement` and :meth:`predict`.

        Several processes plan their parts with :func:`nino.predict.work_partition.partition_work` and call this within
        :meth:`nino.parallel.collectives.Channel.together`.
        """
        how = Computation(engine, dtype, device, memory_budget, progress, preserve_norms, partition)
        horizon = self._check(snapshots, horizon, graph, positions, how)
        tensors = empty_movement(snapshots[-1], graph, only)
        size = self._compute(tensors, snapshots, horizon, graph, positions, how, writes_weights=False)
        return Movement(size.distance, size.norm, size.by_kind, tensors)

    @torch.no_grad()
    def predict_into(
        self,
        out: Mapping[str, Tensor],
        snapshots: Sequence[Mapping[str, Tensor]],
        horizon: int,
        graph: NeuralGraph,
        *,
        positions: Tensor | None = None,
        device: torch.device | str | None = None,
        preserve_norms: bool = False,
        progress: Progress | None = None,
        memory_budget: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> MovementSize:
        """Write predicted weights piece by piece: no tensor of the model's size is made.

        If anything fails, an interrupt included, what ``out`` holds is not known.

        Args:
            out: what to write into, by name, of any strides, in the format of the last snapshot and in memory that no
                snapshot shares; parameters of the graph that are left out are not predicted.
            snapshots: as in :meth:`predict`.
            horizon: as in :meth:`predict`.
            graph: as in :meth:`predict`.
            positions: as in :meth:`predict`.
            device: as in :meth:`predict`.
            preserve_norms: as in :meth:`predict`, whose numbers are then met up to rounding.
            progress: as in :meth:`predict`.
            memory_budget: bytes to use beyond snapshots and ``out``.
            dtype: as in :meth:`predict`.

        Raises:
            SnapshotError: as :meth:`predict`.
            NinoError: as :meth:`predict`, or if ``out`` does not fit the graph.
        """
        how = Computation("blockwise", dtype, device, memory_budget, progress, preserve_norms)
        horizon = self._check(snapshots, horizon, graph, positions, how)
        for name, tensor in out.items():
            if graph.shapes.get(name) != tuple(tensor.shape):
                raise NinoError(f"{name} of shape {tuple(tensor.shape)} is no parameter of the graph")
        return self._compute(out, snapshots, horizon, graph, positions, how, writes_weights=True)

    def fingerprint_tensors(self) -> list[Tensor]:
        """The network's weights, which processes compare to be sure that they predict with the same nowcaster."""
        return list(self.network.parameters())

    def _compute(
        self,
        tensors: Mapping[str, Tensor],
        snapshots: Sequence[Mapping[str, Tensor]],
        horizon: int,
        graph: NeuralGraph,
        positions: Tensor | None,
        how: Computation,
        writes_weights: bool,
    ) -> MovementSize:
        device, partition = how.device_of(snapshots), how.partition
        exact = how.exact_dtype
        network = self._network(device, how.dtype if how.engine == "edges" else exact)
        held = 0
        if how.memory_budget is not None:
            held = bytes_of_copies(graph, *snapshots, tensors, partition=partition) + self._bytes_of_copy(network)
            held += partition.extra_bytes(graph.groups, MESSAGE_VECTORS * self.config.hidden, exact.itemsize)
        sizes = Sizes.within(how.memory_budget, graph, self.config, exact, device, held)
        facts = self._remembered.facts(graph)
        positions = facts.positions_of(graph, self.config.num_positions) if positions is None else positions
        layouts = facts.layouts if partition is WHOLE else None
        views = SnapshotViews(graph, snapshots, partition, layouts)
        writer = MovementWriter(graph, tensors, views, device, partition, how.preserve_norms, writes_weights, layouts)
        if predict_listed(network, graph, snapshots, writer, positions, horizon, how, facts.engine):
            return writer.finish()
        scalers = measure_snapshots(snapshots, graph.shapes, device, partition, self.config.inputs)
        reader = SnapshotReader(views, scalers, device, exact)
        with full_precision(device):
            if how.engine == "edges":
                predict_edgewise(network, graph, reader, writer, positions, horizon)
            else:
                predict_blockwise(
                    network,
                    graph,
                    reader,
                    writer,
                    positions,
                    horizon,
                    sizes,
                    product_dtype=product_dtype(how.dtype, device),
                    progress=how.progress,
                    partition=partition,
                    remembered=facts.engine if how.memory_budget is None else None,
                )
        return writer.finish()

    def _network(self, device: torch.device, dtype: torch.dtype) -> Network:
        """The network, or where it must be moved or converted a copy: it may hold a large table of words."""
        weight = self.network.head.weight
        if (weight.device, weight.dtype) == (device, dtype):
            return self.network
        return deepcopy(self.network).to(device, dtype)

    def _bytes_of_copy(self, network: Network) -> int:
        copied = () if network is self.network else network.parameters()
        return sum(weights.numel() * weights.itemsize for weights in copied)

    def _check(
        self,
        snapshots: Sequence[Mapping[str, Tensor]],
        horizon: int,
        graph: NeuralGraph,
        positions: Tensor | None,
        how: Computation,
    ) -> int:
        """Refuse what cannot be computed; returns the horizon."""
        number = check_request(graph, horizon, self.max_horizon)
        how.check()
        expected = (graph.num_nodes, self.config.num_positions)
        if positions is not None and tuple(positions.shape) != expected:
            raise NinoError(f"positions must have shape {expected}, got {tuple(positions.shape)}")
        self.check_fits(graph)
        self._warn_of_wiring(graph)
        check_snapshots(snapshots, how.partition.held_shapes(graph.shapes), self.context)
        return number

    def _warn_of_wiring(self, graph: NeuralGraph) -> None:
        if graph.wiring in ("exact", "official") and graph.wiring != self.config.wiring and not self._said_wiring:
            self._said_wiring = True
            logger.warning(
                "this nowcaster was trained on the %s wiring and predicts on the %s one; "
                "nowcaster.graph_of(model) makes a graph that fits",
                self.config.wiring,
                graph.wiring,
            )
