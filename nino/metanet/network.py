"""The metanetwork: an encoder over a model's graph and a head that reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nino.errors import NinoError
from nino.graph.ir import MAX_FEATURES, NeuralGraph
from nino.metanet.config import MetanetConfig
from nino.metanet.inputs import PLACE_FEATURES, GraphInputs, Model, read, union
from nino.metanet.layers import Encoded, Encoder, mlp
from nino.metanet.mpnn import Mpnn
from nino.metanet.ng_gnn import NgGnn
from nino.metanet.ng_t import NgT
from nino.metanet.probe import Probe, with_probes
from nino.metanet.readout import Readout
from nino.metanet.saving import load_network, save_network
from nino.metanet.scale import Scale
from nino.numbers import counted

ENCODERS: dict[str, type[Encoder]] = {"mpnn": Mpnn, "ng-gnn": NgGnn, "ng-t": NgT, "scale": Scale, "probe": Probe}
FIRST_STEP = 0.01
"""How much of what it gives out an untrained equivariant head adds to a weight."""


class GraphMetanetwork(nn.Module):
    """A network that reads the weights of others: one vector per model, a new value per weight, or one per neuron.

    Args:
        config: all settings; instead of it, they can be given by name.
        settings: as in :class:`nino.metanet.MetanetConfig`.

    Example:
        >>> import nino
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> graph = nino.NeuralGraph.from_model(model)
        >>> GraphMetanetwork(outputs=5)(model, graph).shape
        torch.Size([5])
    """

    encoder: Encoder | None

    def __init__(self, config: MetanetConfig | None = None, **settings: Any) -> None:
        super().__init__()
        self.config = config if config is not None else _config(settings)
        hidden = self.config.hidden
        self.encoder = None
        if self.config.variant != "probe" or self.config.probe_numbers is not None:
            self.encoder = ENCODERS[self.config.variant](self.config)
        if self.config.head == "invariant":
            self.head: nn.Module = Readout(self.config)
        elif self.config.head == "per-neuron":
            self.head = mlp(hidden, hidden, self.config.outputs)
        else:
            self.head = mlp(hidden, hidden, MAX_FEATURES)
            self.gain = nn.Parameter(torch.tensor(FIRST_STEP))
            self.moving = nn.Linear(hidden, MAX_FEATURES, bias=False) if self.config.variant == "scale" else None

    def forward(
        self,
        model: Model | Sequence[Model] | GraphInputs,
        graph: NeuralGraph | Sequence[NeuralGraph] | None = None,
    ) -> Any:
        """Read one model, or several.

        Args:
            model: a module, or a state dict by parameter name; a list of them; or inputs that :meth:`read` made.
            graph: of the model; of several, one each or one for all.

        Returns:
            ``"invariant"``: ``[outputs]``. ``"per-neuron"``: ``[nodes, outputs]``, numbered as in the graph.
            ``"equivariant"``: a dict of new values by parameter name. Of several ``[models, outputs]``, or lists.

        Raises:
            NinoError: if the graph is of another model, or a weight is NaN or infinite.
        """
        if isinstance(model, GraphInputs):
            return self._read_out(model)
        several = isinstance(model, (list, tuple))
        models: list[Model] = list(model) if several else [model]  # type: ignore[arg-type, list-item]
        if not models:
            raise NinoError("there is no model to read: the list is empty")
        inputs = union([self.read(one, own) for one, own in zip(models, graphs_for(models, graph), strict=True)])
        out = self._read_out(inputs)
        return out if several else out[0]

    def read(self, model: Model, graph: NeuralGraph) -> GraphInputs:
        """What the network reads of a model, on the network's device; can be kept and joined by ``union``."""
        self.prepare(model)
        inputs = read(model, graph, self.config)
        parameter = next(self.parameters())
        return inputs.to(parameter.device, parameter.dtype)

    def prepare(self, model: Model, example_inputs: Any = None) -> None:
        """Find the size of probes, if there are any and it is not known yet."""
        if self.encoder is None:
            self.config = with_probes(self.config, model, example_inputs)
            like = next(self.head.parameters())
            self.encoder = Probe(self.config).to(like.device, like.dtype)

    def _ready_encoder(self) -> Encoder:
        if self.encoder is None:
            raise NinoError("the size of probes is not known yet: call prepare(model) of this metanetwork first")
        return self.encoder

    def _read_out(self, inputs: GraphInputs) -> Any:
        wanted = self.config.num_positions + PLACE_FEATURES
        if inputs.nodes.shape[1] != wanted:
            raise NinoError(
                f"the graph has {inputs.nodes.shape[1]} features per node and this metanetwork reads {wanted}: make "
                f"the inputs with its own read(), or with num_positions={self.config.num_positions}"
            )
        encoded: Encoded = self._ready_encoder()(inputs)
        if self.config.head == "invariant":
            out = self.head(encoded, inputs)
            return out.sigmoid() if self.config.output == "sigmoid" else out
        if self.config.head == "per-neuron":
            out = self.head(encoded.nodes)
            out = out.sigmoid() if self.config.output == "sigmoid" else out
            return list(out.split(torch.bincount(inputs.node_owner, minlength=inputs.num_models).tolist()))
        return self._edited(encoded, inputs)

    @torch.no_grad()
    def look_at(self, inputs: Sequence[GraphInputs]) -> None:
        """Note what is usual in the models to be trained on, before training (``Readout.look_at``)."""
        encoder = self._ready_encoder()
        if isinstance(self.head, Readout):
            self.head.look_at([(encoder(one), one) for one in inputs])

    def _edited(self, encoded: Encoded, inputs: GraphInputs) -> list[dict[str, Tensor]]:
        """New values of all weights: the old ones and a step, in units of the parameter's size where it is known."""
        step = self.head(encoded.edges[inputs.carriers])
        if self.moving is not None and encoded.moving is not None:
            step = step * self.moving(encoded.moving[inputs.carriers])
        if self.config.inputs == "standardised":
            step = step * inputs.scale[:, None]
        values = inputs.values + self.gain * step
        numbers = [edges.num_parameter_edges for edges in inputs.edge_lists]
        return [edges.parameters(part) for edges, part in zip(inputs.edge_lists, values.split(numbers), strict=True)]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        if self.encoder is None:
            raise NinoError("this network has never seen a model: its probes have no size yet, so train it first")
        save_network(self, self.config.as_dict(), folder)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> GraphMetanetwork:
        """Read what :meth:`save_pretrained` wrote, from a folder or the Hugging Face hub.

        Raises:
            CheckpointError: if it is missing, damaged or foreign.
        """
        return load_network(lambda saved: cls(MetanetConfig.from_dict(saved)), name)


def graphs_for(models: Sequence[Any], graph: NeuralGraph | Sequence[NeuralGraph] | None) -> list[NeuralGraph]:
    """One graph per model.

    Raises:
        NinoError: if there are fewer or more.
    """
    if graph is None:
        raise NinoError("give the model's graph: nino.NeuralGraph.from_model(model, example_inputs=x)")
    graphs = [graph] * len(models) if isinstance(graph, NeuralGraph) else list(graph)
    if len(graphs) != len(models):
        came, wanted = counted(len(graphs), "graph"), counted(len(models), "model")
        raise NinoError(f"got {came} for {wanted}; give one each, or one for all")
    return graphs


def _config(settings: Mapping[str, Any]) -> MetanetConfig:
    try:
        return MetanetConfig(**settings)
    except TypeError as error:
        raise NinoError(f"GraphMetanetwork: {str(error).removeprefix('MetanetConfig.__init__() ')}") from error
