"""The nowcaster: a trained network, where it comes from and how it predicts.

Standardises snapshots, runs an engine, maps the prediction back. Knows nothing of optimizers and schedules.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nino.errors import CheckpointError, NinoError, SnapshotError
from nino.graph.ir import NeuralGraph
from nino.parallel.shards import local_tensor
from nino.predict.engine import predict_blockwise, predict_edgewise
from nino.predict.engine.blockwise import MESSAGE_VECTORS, Progress
from nino.predict.engine.hardware import fusing_pays, product_dtype
from nino.predict.engine.tiling import Sizes
from nino.predict.engine.weights import Jump, PredictionWriter, SnapshotReader, SnapshotViews, bytes_of_copies
from nino.predict.model.config import NowcasterConfig
from nino.predict.model.networks import Network, Trend, build_network, build_network_with_weights
from nino.predict.partition import WHOLE, Partition
from nino.predict.standardise import check_snapshots, is_finite, measure_snapshots, piece_size, pieces_of
from nino.system.signals import or_undone

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Engine = Literal["blockwise", "edges"]


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

    @property
    def config(self) -> NowcasterConfig:
        """Sizes and conventions of the network."""
        return self.network.config

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
        config_path, weights_path = _find_files(str(name))
        config = NowcasterConfig.from_json(_read_text(config_path), str(config_path))
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

    def stretched(self, factor: float) -> Nowcaster:
        """One whose every movement is ``factor`` times as long, in the same direction; this one stays as it is.

        A nowcaster is trained to err little, so where it is unsure it moves less than the weights will. A single jump
        that is stretched by 1.4 to 1.8 can be worth more; whole trainings gained nothing from it (docs/lab-notes.md,
        2026-11-26).

        Args:
            factor: 1 changes nothing, -1 is backwards.

        Raises:
            NinoError: if it is not a finite number.
        """
        if not math.isfinite(factor):
            raise NinoError(f"factor must be a finite number, got {factor!r}")
        network = deepcopy(self.network)
        for parameter in network.head.parameters():  # the last layer, which is linear
            parameter.data.mul_(factor)
        if network.trend is not None:
            network.trend.stretch_(factor)
        return Nowcaster(network)

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
        fuse: bool | None = None,
        progress: Progress | None = None,
        preserve_norms: bool = False,
    ) -> dict[str, Tensor]:
        """Predict the weights ``horizon`` snapshot intervals after the last snapshot.

        An element that is the same in all snapshots (the row of a padding token, a masked weight) stays as it is, to
        the last bit.

        Args:
            snapshots: ``config.context`` dicts of parameter name to tensor, oldest first; every parameter of the graph.
            horizon: snapshot intervals ahead, 1 to ``config.max_horizon``.
            graph: of the model that the snapshots are from.
            positions: node features ``[num_nodes, num_positions]``; by default the graph's own.
            engine: ``"blockwise"``, or ``"edges"`` for the definition (small models only); they agree to rounding.
            dtype: in which the network computes; snapshots may have any floating dtype. Below float32 the blockwise
                engine computes its large products in it, where the hardware can, and everything else in float32.
            device: where to compute; by default where the last snapshot lies.
            memory_budget: bytes that the blockwise engine may use beyond snapshots and predictions (not counting what
                a compiler needs); ``None`` for what is fastest (node features, and a tile of some MB on a CPU, some
                100 MB on a GPU).
            fuse: whether the blockwise engine compiles its inner loop (``torch.compile``); ``None`` where it pays.
            progress: called by the blockwise engine with the work done and the total.
            preserve_norms: whether every parameter of two or more axes is scaled to the norm that it has in the last
                snapshot, up to rounding in its dtype (one that is zero there, or predicted so, is not). Elements that
                stay as they are are not scaled: the others get the norm that they have there, and so does the whole.

        Returns:
            Per parameter name the predicted tensor, with the dtype, device and memory format of the last snapshot.

        Raises:
            SnapshotError: if the snapshots do not fit the graph or hold NaN or infinity, or the prediction does.
            NinoError: if the horizon, the engine, the dtype, the positions or the budget are out of range, or the graph
                is none.
        """
        self._check_arguments(horizon, graph, positions, engine, dtype, memory_budget)
        check_snapshots(snapshots, graph.shapes, self.config.context)
        out = {name: snapshots[-1][name].detach().clone() for name in graph.shapes}
        how = _Computation(engine, dtype, _device(snapshots, device), memory_budget, fuse, progress, preserve_norms)
        self._predict_into(out, snapshots, horizon, graph, positions, how)
        return out

    @torch.no_grad()
    def predict_(
        self,
        parameters: Mapping[str, Tensor],
        snapshots: Sequence[Mapping[str, Tensor]],
        horizon: int,
        graph: NeuralGraph,
        positions: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        memory_budget: int | None = None,
        fuse: bool | None = None,
        progress: Progress | None = None,
        preserve_norms: bool = False,
        backup: Mapping[str, Tensor] | None = None,
        partition: Partition = WHOLE,
    ) -> Jump:
        """Predict straight into live parameters, piece by piece: no second copy of the weights is made.

        If anything fails half way (an interrupt included), the parameters are restored from the backup before the error
        goes on; further interrupts wait until that is done.

        Args:
            parameters: what to overwrite, by name; parameters of the graph that are left out stay as they are, and so
                do those that no graph holds (empty, or not floating point), and elements that are the same in all
                snapshots.
            snapshots: as in :meth:`predict`.
            horizon: as in :meth:`predict`.
            graph: as in :meth:`predict`.
            positions: as in :meth:`predict`.
            dtype: as in :meth:`predict`.
            device: as in :meth:`predict`.
            memory_budget: as in :meth:`predict`.
            fuse: as in :meth:`predict`.
            progress: as in :meth:`predict`.
            preserve_norms: as in :meth:`predict`.
            backup: holds what ``parameters`` hold now, bit for bit, in memory of its own; by default the last snapshot.
            partition: this process's, if several work together; sessions plan it with
                :func:`nino.predict.work_partition.partition_work` and call this within
                :meth:`nino.parallel.collectives.Channel.together`. Of parameters that are sharded with FSDP2,
                ``snapshots`` hold the local shards.

        Returns:
            How far the weights moved, in all processes.

        Raises:
            SnapshotError: as :meth:`predict`, or if the backup is not a copy of the parameters.
            NinoError: as :meth:`predict`.
        """
        self._check_arguments(horizon, graph, positions, "blockwise", dtype, memory_budget)
        shapes = {name: partition.held_rows(name, shape).shape(shape) for name, shape in graph.shapes.items()}
        check_snapshots(snapshots, shapes, self.config.context)
        live = _live(parameters, graph)
        backup = snapshots[-1] if backup is None else backup
        _check_backup(live, backup)
        how = _Computation(
            "blockwise", dtype, _device(snapshots, device), memory_budget, fuse, progress, preserve_norms, partition
        )

        def put_back() -> None:
            for name, parameter in live.items():
                parameter.copy_(backup[name])

        return or_undone(
            lambda: self._predict_into(live, snapshots, horizon, graph, positions, how), put_back, lambda jump: jump
        )

    @torch.no_grad()
    def _predict_into(
        self,
        tensors: Mapping[str, Tensor],
        snapshots: Sequence[Mapping[str, Tensor]],
        horizon: int,
        graph: NeuralGraph,
        positions: Tensor | None,
        how: _Computation,
    ) -> Jump:
        device, exact = how.device, torch.promote_types(how.dtype, torch.float32)
        network = self._network(device, how.dtype if how.engine == "edges" else exact)
        partition = how.partition
        held = bytes_of_copies(graph, *snapshots, tensors, partition=partition) + self._bytes_of_copy(network)
        held += partition.extra_bytes(graph.groups, MESSAGE_VECTORS * self.config.hidden, exact.itemsize)
        sizes = Sizes.within(how.memory_budget, graph, self.config, exact, device, held)
        scalers = measure_snapshots(snapshots, graph.shapes, device, partition, self.config.inputs)
        node_features = graph.positions(self.config.num_positions) if positions is None else positions
        stored = SnapshotViews(graph, snapshots, partition)
        writer = PredictionWriter(graph, tensors, scalers, stored, partition, how.preserve_norms)
        with _full_precision(device):
            if how.engine == "edges":
                predict_edgewise(network, graph, snapshots, scalers, writer, node_features, horizon)
            else:
                predict_blockwise(
                    network,
                    graph,
                    SnapshotReader(stored, scalers, device, exact),
                    writer,
                    node_features,
                    horizon,
                    sizes,
                    product_dtype=product_dtype(how.dtype, device),
                    fuse=fusing_pays(graph.num_edges, device) if how.fuse is None else how.fuse,
                    progress=how.progress,
                    partition=partition,
                )
        jump = writer.finish()
        return jump if partition is WHOLE else jump.over_processes(partition, device)

    def _network(self, device: torch.device, dtype: torch.dtype) -> Network:
        """The network, or where it must be moved or converted a copy: it may hold a large table of words."""
        weight = self.network.head.weight
        if (weight.device, weight.dtype) == (device, dtype):
            return self.network
        return deepcopy(self.network).to(device, dtype)

    def _bytes_of_copy(self, network: Network) -> int:
        copied = () if network is self.network else network.parameters()
        return sum(weights.numel() * weights.itemsize for weights in copied)

    def _check_arguments(
        self,
        horizon: int,
        graph: NeuralGraph,
        positions: Tensor | None,
        engine: str,
        dtype: torch.dtype,
        memory_budget: int | None,
    ) -> None:
        if not isinstance(graph, NeuralGraph):
            raise NinoError(
                f"graph must be a NeuralGraph, got {type(graph).__name__}; nowcaster.graph_of(model) makes one"
            )
        if not isinstance(horizon, int) or isinstance(horizon, bool) or not 1 <= horizon <= self.config.max_horizon:
            raise NinoError(f"horizon must be 1 to {self.config.max_horizon} snapshot intervals, got {horizon!r}")
        if dtype not in DTYPES:
            raise NinoError(f"dtype must be a floating point torch.dtype of 16 bits or more, got {dtype!r}")
        if engine not in ("blockwise", "edges"):
            raise NinoError(f"engine must be 'blockwise' or 'edges', got {engine!r}")
        expected = (graph.num_nodes, self.config.num_positions)
        if positions is not None and tuple(positions.shape) != expected:
            raise NinoError(f"positions must have shape {expected}, got {tuple(positions.shape)}")
        if memory_budget is not None and not isinstance(memory_budget, int):
            raise NinoError(f"memory_budget must be a whole number of bytes, got {memory_budget!r}")
        self.check_fits(graph)
        if graph.wiring in ("exact", "official") and graph.wiring != self.config.wiring and not self._said_wiring:
            self._said_wiring = True
            logger.warning(
                "this nowcaster was trained on the %s wiring and predicts on the %s one; "
                "nowcaster.graph_of(model) makes a graph that fits",
                self.config.wiring,
                graph.wiring,
            )


@dataclass(frozen=True)
class _Computation:
    """How a nowcast is computed: arguments of :meth:`Nowcaster.predict`."""

    engine: Engine
    dtype: torch.dtype
    device: torch.device
    memory_budget: int | None
    fuse: bool | None
    progress: Progress | None
    preserve_norms: bool
    partition: Partition = WHOLE


def _device(snapshots: Sequence[Mapping[str, Tensor]], device: torch.device | str | None) -> torch.device:
    return torch.device(device) if device is not None else next(iter(snapshots[-1].values())).device


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Keep a caller's autocast out of the engines, which choose formats themselves."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _live(parameters: Mapping[str, Tensor], graph: NeuralGraph) -> dict[str, Tensor]:
    """The parameters that a nowcast may write into; those that no graph holds are left out."""
    live = {}
    for name, parameter in parameters.items():
        if name not in graph.shapes:
            if parameter.is_floating_point() and parameter.numel():
                raise NinoError(f"{name} is no parameter of the graph; pass the named_parameters() of its model")
            continue
        parameter = local_tensor(parameter)
        if parameter.is_meta:
            raise NinoError(f"{name} is on the meta device: there is nothing to write into")
        if any(stride == 0 and size > 1 for stride, size in zip(parameter.stride(), parameter.shape, strict=True)):
            raise NinoError(f"elements of {name} share their memory (an expanded tensor); pass a copy of its own")
        if parameter.is_inference() and not torch.is_inference_mode_enabled():
            raise NinoError(f"{name} was made in torch.inference_mode() and can only be changed there")
        live[name] = parameter
    return live


def _check_backup(parameters: Mapping[str, Tensor], snapshot: Mapping[str, Tensor]) -> None:
    """Refuse a last snapshot from which the parameters could not be restored."""
    for name, parameter in parameters.items():
        if not _are_equal(snapshot[name], parameter):
            if not is_finite(parameter):
                raise SnapshotError(f"{name} holds NaN or infinity; there is nothing to nowcast from")
            raise SnapshotError(
                f"the last snapshot does not hold the present values of {name}; take it after the last step, in the "
                "parameters' own dtype, so that they can be restored from it"
            )
    shared = _shared_memory(parameters, {name: snapshot[name] for name in parameters})
    if shared is not None:
        raise SnapshotError(f"the last snapshot shares the memory of {shared}; pass a copy to restore it from")


def _are_equal(copy: Tensor, parameter: Tensor) -> bool:
    """Bit for bit, but for the sign of zero; a piece at a time, since the copy may be on another device."""
    if copy.dtype != parameter.dtype or copy.shape != parameter.shape:
        return False
    size = piece_size(parameter.device)
    pieces = zip(pieces_of(copy, size), pieces_of(parameter, size), strict=True)
    return all(torch.equal(piece.to(parameter.device), other) for piece, other in pieces)


def _shared_memory(parameters: Mapping[str, Tensor], copies: Mapping[str, Tensor]) -> str | None:
    """The name of a parameter or copy whose span of memory reaches into one of the other kind."""
    spans = sorted(
        (str(tensor.device), tensor.data_ptr(), is_copy, name, tensor)
        for is_copy, tensors in ((False, parameters), (True, copies))
        for name, tensor in tensors.items()
        if tensor.numel()
    )
    ends: dict[tuple[str, bool], int] = {}
    for device, start, is_copy, name, tensor in spans:
        if start < ends.get((device, not is_copy), 0):
            return name
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        ends[device, is_copy] = max(ends.get((device, is_copy), 0), start + (last + 1) * tensor.itemsize)
    return None


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error


def shipped_nowcasters() -> list[str]:
    """Names of the nowcasters that are installed with Nino."""
    root = resources.files("nino.pretrained")
    return sorted(entry.name for entry in root.iterdir() if (entry / CONFIG_FILE).is_file())


def _find_files(name: str) -> tuple[Path, Path]:
    shipped = shipped_nowcasters()
    if name in shipped:
        folder = Path(str(resources.files("nino.pretrained") / name))
    elif os.path.isdir(name):  # of a name that is too long it says no, where Path fails
        folder = Path(name)
    elif name.count("/") == 1 and not os.path.exists(name) and not name.startswith((".", "/")):
        return _download(name)
    else:
        raise CheckpointError(
            f"no nowcaster {name!r}: expected one of {shipped}, a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, "
            "or a hub id 'user/name' (published .pt files load with Nowcaster.from_official)"
        )
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder} holds no {file}; expected a folder written by save_pretrained")
    return folder / CONFIG_FILE, folder / WEIGHTS_FILE


def _download(hub_id: str) -> tuple[Path, Path]:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, CONFIG_FILE)), Path(hf_hub_download(hub_id, WEIGHTS_FILE))
    except Exception as error:  # the client's own errors and those of the HTTP library that it uses
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{hub_id!r} is no local folder and cannot be had from the Hugging Face hub: {reason}"
        ) from error
