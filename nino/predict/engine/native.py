"""The arithmetic of :mod:`nino.predict.engine.kernels` in compiled form, for float32 on CPUs.

``kernels.cpp`` keeps the hidden vectors of a few edges in registers, where the plain form writes and reads each of them
a dozen times. It is compiled once per width of the hidden vectors and machine, in a second or two, when a nowcast first
needs it, with the machine's own compiler (``$CXX`` or ``c++``), and kept in ``$NINO_CACHE`` (by default
``~/.cache/nino``). Without a compiler nowcasts are computed in the plain form. ``NINO_NATIVE=0`` asks for that.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from nino.predict.engine.hardware import cpu_multiplies
from nino.predict.engine.kernels import MovementWeights

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")
LANES = 16
"""Hidden vectors must be a multiple of so many numbers wide."""
WIDEST = 512
"""Wider hidden vectors of a few edges would not stay in the first level of cache."""
EDGES_PER_THREAD = 2**11
"""With fewer, starting another thread costs more than it saves."""
COMPILER_SECONDS = 120
MOST_SNAPSHOTS = 8
"""That are measured together."""


class _Strip(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "at_source", "at_target", "first")),
        *((name, ctypes.c_int64) for name in ("num_values", "num_edges", "num_sources", "is_paired")),
        *((name, ctypes.c_void_p) for name in ("source", "target")),
    )


class _Head(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("at_source", "at_target", "second", "third", "third_bias", "weight", "bias")),
        ("num_features", ctypes.c_int64),
    )


@dataclass(frozen=True)
class ListedEnds:
    """The ends of edges that are in the order of their targets."""

    source: Tensor
    """int32 ``[E]``."""
    target: Tensor
    """int32 ``[E]``, ascending."""

    def cuts(self) -> Sequence[int]:
        """Where the edges of each thread begin, and the end: no target has edges in two of them."""
        number = len(self.target)
        threads = _threads(number)
        if threads == 1:
            return 0, number
        near = self.target[[number * part // threads for part in range(1, threads)]]
        return [0, *torch.searchsorted(self.target, near).tolist(), number]


class NativeKernels:
    """Compiled arithmetic for hidden vectors of one width, and products in one format.

    Args:
        library: as compiled.
        product_dtype: float32 or bfloat16.
    """

    def __init__(self, library: ctypes.CDLL, product_dtype: torch.dtype) -> None:
        library.columns.restype = ctypes.c_int64
        self._library = library
        self._columns = int(library.columns())
        self._product_dtype = product_dtype

    def packed(self, weight: Tensor) -> Tensor:
        """Lay out the right factor of a product, ``[H, H]``, as it is read: by blocks of columns, pairs of rows."""
        blocks = weight.unflatten(1, (-1, self._columns)).transpose(0, 1)
        if self._product_dtype == torch.bfloat16:
            blocks = blocks.unflatten(1, (-1, 2)).transpose(2, 3)
        return blocks.to(self._product_dtype).contiguous()

    def message_sums(
        self, values: Tensor, from_source: Tensor, from_target: Tensor, as_source: Tensor, first: Tensor, scale: Tensor
    ) -> Tensor:
        """As :func:`nino.predict.engine.kernels.message_sums`, of a whole strip, ``[2, t, H]``; ``scale`` is packed."""
        kept = [tensor.contiguous() for tensor in (values, from_source, from_target, first, as_source, scale)]
        strip, bias = _strip(*kept[:4]), first.new_zeros(first.shape[1])
        sums = from_target.new_zeros(2, values.shape[1], first.shape[1])

        def compute(start: int, stop: int) -> None:
            self._library.message_sums(
                ctypes.byref(strip), ctypes.c_int64(start), ctypes.c_int64(stop), *map(_at, (*kept[4:], bias, *sums))
            )

        _in_threads(compute, _cuts_by_row(values.shape[1], values.shape[2]))
        return sums

    def movements(
        self,
        values: Tensor,
        first_ends: tuple[Tensor, Tensor],
        second_ends: tuple[Tensor, Tensor],
        weights: MovementWeights,
    ) -> Tensor:
        """As :func:`nino.predict.engine.kernels.movements`, of a whole strip; H x H weights are packed."""
        kept = [tensor.contiguous() for tensor in (values, *first_ends, weights.first)]
        cuts = _cuts_by_row(values.shape[1], values.shape[2])
        return self._movements(_strip(*kept), values, second_ends, weights, cuts)

    def _movements(
        self,
        strip: _Strip,
        values: Tensor,
        second_ends: tuple[Tensor, Tensor],
        weights: MovementWeights,
        cuts: Sequence[int],
    ) -> Tensor:
        bias, rows, row_bias = weights.third_bias, weights.head, weights.head_bias
        kept = [t.contiguous() for t in (*second_ends, weights.second, weights.third, bias, rows, row_bias)]
        head = _Head(*(tensor.data_ptr() for tensor in kept), len(weights.head))
        movement = values.new_empty(len(weights.head), *values.shape[1:])

        def compute(start: int, stop: int) -> None:
            self._library.movements(
                ctypes.byref(strip), ctypes.c_int64(start), ctypes.c_int64(stop), ctypes.byref(head), _at(movement)
            )

        _in_threads(compute, cuts)
        return movement

    def listed_linear_sums(
        self, values: Tensor, ends: ListedEnds, at_target: Tensor, as_source: Tensor, first: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum what edges send that are linear in their values.

        Args:
            values: ``[Q, E]``.
            ends: of the edges.
            at_target: is added to what ``first`` makes of an edge's values, ``[T, H]``.
            as_source: is scaled by that, ``[S, H]``.
            first: ``[Q, H]``.

        Returns:
            Over the edges of each target, the sums ``[T, H]`` and those of the values ``[T, Q]``.
        """
        kept = [tensor.contiguous() for tensor in (values, at_target, first, as_source)]
        strip = _listed(ends, kept[0], None, kept[1], kept[2])
        scaled, value_sums = torch.zeros_like(kept[1]), values.new_zeros(len(at_target), len(values))

        def compute(start: int, stop: int) -> None:
            self._library.linear_sums(
                ctypes.byref(strip),
                ctypes.c_int64(start),
                ctypes.c_int64(stop),
                *map(_at, (kept[3], scaled, value_sums)),
            )

        _in_threads(compute, ends.cuts())
        return scaled, value_sums

    def listed_message_sums(
        self,
        values: Tensor,
        ends: ListedEnds,
        at_ends: tuple[Tensor, Tensor],
        as_source: Tensor,
        first: Tensor,
        scale: Tensor,
        bias: Tensor,
    ) -> Tensor:
        """As :meth:`message_sums`, of listed edges, ``[2, T, H]``; a bias ``[H]`` is added to every scale.

        Args:
            values: ``[Q, E]``.
            ends: of the edges.
            at_ends: the sources' part of the first hidden vector ``[S, H]``, and the targets' ``[T, H]``.
            as_source: ``[S, H]``.
            first: ``[Q, H]``.
            scale: packed.
            bias: ``[H]``.
        """
        kept = [tensor.contiguous() for tensor in (values, *at_ends, first, as_source, scale, bias)]
        strip = _listed(ends, *kept[:4])
        sums = values.new_zeros(2, *kept[2].shape)

        def compute(start: int, stop: int) -> None:
            self._library.message_sums(
                ctypes.byref(strip), ctypes.c_int64(start), ctypes.c_int64(stop), *map(_at, (*kept[4:], *sums))
            )

        _in_threads(compute, ends.cuts())
        return sums

    def listed_movements(
        self,
        values: Tensor,
        ends: ListedEnds,
        first_ends: tuple[Tensor, Tensor],
        second_ends: tuple[Tensor, Tensor],
        weights: MovementWeights,
    ) -> Tensor:
        """As :meth:`movements`, of listed edges: ``[F, E]``; what depends on ends is ``[S, H]`` and ``[T, H]``."""
        kept = [tensor.contiguous() for tensor in (values, *first_ends, weights.first)]
        return self._movements(_listed(ends, *kept), values, second_ends, weights, ends.cuts())

    def measure(self, snapshots: Tensor, parts: Sequence[slice]) -> Tensor:
        """Measure parameters that lie side by side.

        Args:
            snapshots: ``[C, total]`` contiguous; C at most :data:`MOST_SNAPSHOTS`.
            parts: where each parameter lies; none is empty.

        Returns:
            float64 ``[parameters, 3 + (C - 1)^2]``: a number near the mean, sums of differences from it and of their
            squares, sums of products of the differences from the last snapshot.
        """
        context, total = snapshots.shape
        found = torch.empty(len(parts), 3 + (context - 1) ** 2, dtype=torch.float64)
        sizes = (ctypes.c_int64(context), ctypes.c_int64(total))
        for part, row in zip(parts, found, strict=True):
            self._library.measure(
                _at(snapshots), *sizes, ctypes.c_int64(part.start), ctypes.c_int64(part.stop), _at(row)
            )
        return found


def native_kernels(
    hidden: int, dtype: torch.dtype, product_dtype: torch.dtype, device: torch.device
) -> NativeKernels | None:
    """Compiled kernels, or ``None`` where the plain ones are to be used.

    Args:
        hidden: width of the hidden vectors.
        dtype: in which to compute.
        product_dtype: in which H x H products are computed.
        device: where.
    """
    fits = device.type == "cpu" and dtype == torch.float32 and hidden % LANES == 0 and hidden <= WIDEST
    narrow = product_dtype == torch.bfloat16 and cpu_multiplies(torch.bfloat16) and platform.machine() == "x86_64"
    if not fits or not (narrow or product_dtype == torch.float32) or os.environ.get("NINO_NATIVE") == "0":
        return None
    library = _library(hidden, narrow)
    return None if library is None else NativeKernels(library, product_dtype)


def _strip(values: Tensor, from_source: Tensor, from_target: Tensor, first: Tensor) -> _Strip:
    num_values, targets, sources = values.shape
    is_paired = from_source.shape[0] == targets and from_source.shape[1] == 1 and sources == 1
    pointers = (tensor.data_ptr() for tensor in (values, from_source, from_target, first))
    return _Strip(*pointers, num_values, targets * sources, sources, int(is_paired), None, None)


def _listed(ends: ListedEnds, values: Tensor, at_source: Tensor | None, at_target: Tensor, first: Tensor) -> _Strip:
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in (values, at_source, at_target, first))
    return _Strip(*pointers, *values.shape, 1, 0, ends.source.data_ptr(), ends.target.data_ptr())


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _threads(edges: int) -> int:
    return max(min(torch.get_num_threads(), edges // EDGES_PER_THREAD), 1)


def _cuts_by_row(targets: int, sources: int) -> Sequence[int]:
    """Cut edges between targets, a part for each thread: no two write to one place, and sums have one order."""
    threads = min(_threads(targets * sources), max(targets, 1))
    return [targets * part // threads * sources for part in range(threads + 1)]


def _in_threads(compute: Callable[[int, int], None], cuts: Sequence[int]) -> None:
    """Compute the edges between cuts, each part in a thread of its own."""
    if len(cuts) == 2:
        compute(*cuts)
    else:
        list(_pool(len(cuts) - 1).map(compute, cuts[:-1], cuts[1:]))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="nino")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not come along


@cache
def _library(hidden: int, narrow: bool) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(_compiled(hidden, narrow)))
    except (OSError, subprocess.SubprocessError) as error:
        told = error.stderr if isinstance(error, subprocess.CalledProcessError) and error.stderr else str(error)
        lines = told.strip().splitlines() or [type(error).__name__]
        logger.info("nowcasts are computed without compiled kernels, which is slower: %s", lines[0])
        return None


def _compiled(hidden: int, narrow: bool) -> Path:
    """The compiled library, which is made if it is not there."""
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        raise OSError("no C++ compiler was found")
    options = [*FLAGS, f"-DHIDDEN={hidden}", f"-DBF16={int(narrow)}"]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=COMPILER_SECONDS)
    told = "\n".join([SOURCE.read_text(), *options, version.stdout, _machine()])
    path = _folder() / f"kernels-{hashlib.sha256(told.encode()).hexdigest()[:20]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            command = [compiler, *options, str(SOURCE), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILER_SECONDS)
            made.replace(path)  # other processes find it whole
    return path


def _folder() -> Path:
    folder = Path(os.environ.get("NINO_CACHE") or Path.home() / ".cache" / "nino")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # no home
        pass
    return Path(tempfile.mkdtemp(prefix="nino-"))


def _machine() -> str:
    """What instructions the processor has: machines may share a home."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
