"""Convert the published ``.pt`` files, without running anything that is in them (``weights_only=True``)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nino.errors import CheckpointError
from nino.graph.ir import MAX_FEATURES
from nino.predict.model.config import NowcasterConfig
from nino.predict.model.networks import NUM_ROUNDS, Network, build_network_with_weights

RENAMED = (
    ("layer_embed.", "type_embed."),
    ("wte_pos_enc_layer.", "word_embed."),
    ("node_proj.fc.0.", "node_proj."),
    ("edge_proj.fc.0.", "edge_proj."),
    ("gnn.convs.", "convs."),
    (".pre_nns.0.0.", ".pre."),
    (".post_nns.0.0.", ".post."),
    ("gnn.edge_update.", "edge_updates."),
    (".lin_e.", ".from_edge."),
    (".lin_s.", ".from_source."),
    (".lin_t.", ".from_target."),
    (".lin1.", ".lin."),
    ("edge_out.fc.0.", "head_hidden."),
    ("edge_out.fc.2.", "head."),
    ("edge_mlp.fc.6.", "head."),
    ("edge_mlp.fc.", "body."),
)
"""Parts of published parameter names and what they are called here, applied in this order."""

UNUSED_ROUND = f"convs.{NUM_ROUNDS}."


def rename_parameter(name: str) -> str | None:
    """Our name of a published parameter; ``None`` for those of the last convolution, which nothing reads."""
    for published, ours in RENAMED:
        name = name.replace(published, ours)
    return None if name.startswith(UNUSED_ROUND) else name


def load_official(path: str | Path) -> Network:
    """Read a published ``.pt`` file: a state dict, or ``{"state_dict": ..., "model_args": ...}``.

    Raises:
        CheckpointError: if the file is missing, corrupted, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; expected a published NiNo .pt file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickle protocols, in files that are no pickles
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may fail in any way: OSError, TypeError, struct.error ...
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise CheckpointError(f"{path} cannot be read as a published NiNo .pt file: {reason}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dict of tensors; expected a published NiNo .pt file")
    return network_from_official_state(state, str(path))


def network_from_official_state(state: dict[str, Tensor], origin: str = "state dict") -> Network:
    """Build the network that a published state dict belongs to; its sizes are read off the tensors."""
    try:
        config = _infer_config(state)
        renamed = {ours: value for name, value in state.items() if (ours := rename_parameter(name)) is not None}
        network = build_network_with_weights(config, renamed)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        raise CheckpointError(f"{origin} is not a published NiNo or WNN state dict: {reason}") from error
    return network.eval()


def _infer_config(state: dict[str, Tensor]) -> NowcasterConfig:
    hidden, num_inputs = state["edge_proj.fc.0.weight"].shape
    if "edge_mlp.fc.6.weight" in state:
        return NowcasterConfig(
            kind="wnn",
            hidden=hidden,
            context=num_inputs,
            max_horizon=len(state["edge_mlp.fc.6.weight"]),
            wiring="official",
        )
    words = state.get("wte_pos_enc_layer.weight")
    return NowcasterConfig(
        kind="nino",
        hidden=hidden,
        context=num_inputs // MAX_FEATURES,
        max_horizon=len(state["edge_out.fc.2.weight"]) // MAX_FEATURES,
        num_positions=state["node_proj.fc.0.weight"].shape[1],
        vocabulary_size=0 if words is None else len(words),
        wiring="official",
    )
