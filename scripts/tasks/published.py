"""The published NiNo, run from a folder of its code, beside ours: the same weights, snapshots and machine.

Nothing of it is copied here. Its code is imported from the folder that is given, in a process of its own. It asks for
``torch_geometric``, and for ``torchvision`` only to tell models apart: without that a stand-in is put in its place.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn

from nino import Nowcaster
from nino.data import build_model
from nino.evaluation.workers import in_fresh_process
from tasks.measuring import Memory
from tasks.sizes import ARCHITECTURES, random_snapshots

CODE = ("optim/nino.py", "graph/graph.py", "utils/utils.py")
"""Files by which its folder is known."""
FAMILIES = ("GPT2", "Bert", "Llama", "Qwen3")
"""Of transformers, that it asks for."""


def is_published_code(folder: Path) -> bool:
    """Whether a folder holds the published code."""
    return all((folder / name).is_file() for name in CODE)


def compare_with_published(
    name: str, folder: Path, checkpoint: str, horizon: int, dtypes: Sequence[str], repeats: int
) -> dict[str, Any]:
    """Nowcast one model by the published code and by ours, each in a fresh process and on one thread.

    Args:
        name: of the model.
        folder: of the published code.
        checkpoint: a published ``.pt`` file.
        horizon: snapshot intervals ahead.
        dtypes: in which our engine computes.
        repeats: of ours; the least seconds count.
    """
    theirs = in_fresh_process(_published, name, str(folder), checkpoint, horizon)
    ours = {dtype: in_fresh_process(_ours, name, checkpoint, horizon, dtype, repeats) for dtype in dtypes}
    change = theirs.pop("movement")
    for result in ours.values():
        movement = result.pop("movement")
        result["difference"] = float((movement - change).norm() / change.norm())
        result["times as fast"] = theirs["cpu seconds"] / result["cpu seconds"]
    return {"model": name, "weights": len(change), "horizon": horizon, "published": theirs, "ours": ours}


def _published(name: str, folder: str, checkpoint: str, horizon: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    model, snapshots = _model(name)
    flat = [torch.cat([snapshot[n].flatten() for n, _ in model.named_parameters()]) for snapshot in snapshots]
    for family in FAMILIES:  # before a stand-in is there, for they would look for the real one
        getattr(transformers, f"{family}PreTrainedModel")
    with mock.patch.dict(sys.modules, _stand_ins()), contextlib.redirect_stdout(io.StringIO()):
        sys.path.insert(0, folder)
        from optim import NiNo  # type: ignore[import-not-found]

        optimizer = NiNo(None, None, ckpt=checkpoint, period=5, verbose=0, max_train_steps=100)
        memory = Memory(torch.device("cpu"))
        with memory.watched():
            began = time.process_time()
            optimizer.set_model(model)
            wired = time.process_time()
            optimizer.states = list(flat[:-1])
            optimizer.step_idx = 4
            optimizer.step(k=horizon)
            done = time.process_time()
    after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return {
        "graph cpu seconds": wired - began,
        "cpu seconds": done - wired,
        "extra bytes": memory.peak_bytes,
        "movement": after - flat[-1],
    }


def _ours(name: str, checkpoint: str, horizon: int, dtype: str, repeats: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    model, snapshots = _model(name)
    nowcaster = Nowcaster.from_official(checkpoint)
    began = time.process_time()
    graph = nowcaster.graph_of(model)
    nowcaster.predict_movement(snapshots, horizon, graph, dtype=getattr(torch, dtype))
    first = time.process_time() - began
    memory, seconds = Memory(torch.device("cpu")), []
    for _ in range(repeats):
        began = time.process_time()
        with memory.watched():
            movement = nowcaster.predict_movement(snapshots, horizon, graph, dtype=getattr(torch, dtype)).tensors
        seconds.append(time.process_time() - began)
    flat = torch.cat([movement[n].flatten() for n, _ in model.named_parameters()])
    return {
        "wiring": graph.wiring,
        "first cpu seconds": first,
        "cpu seconds": min(seconds),
        "extra bytes": memory.peak_bytes,
        "movement": flat,
    }


def _model(name: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    model = build_model(ARCHITECTURES[name])
    shapes = {n: tuple(parameter.shape) for n, parameter in model.named_parameters()}
    snapshots = random_snapshots(shapes, 5, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        for n, parameter in model.named_parameters():
            parameter.copy_(snapshots[-1][n])
    return model, snapshots


def _stand_ins() -> Mapping[str, ModuleType]:
    """A stand-in for torchvision, of which only the class of a model is asked for."""
    try:
        import torchvision  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        models = ModuleType("torchvision.models")
        models.VisionTransformer = type("VisionTransformer", (), {})  # type: ignore[attr-defined]
        whole = ModuleType("torchvision")
        whole.models, whole.__version__ = models, "none"  # type: ignore[attr-defined]
        for module in (whole, models):
            module.__spec__ = ModuleSpec(module.__name__, None)
        return {"torchvision": whole, "torchvision.models": models}
    return {}
