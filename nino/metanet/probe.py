"""Probing (after ProbeGen, arXiv:2410.10811): ask a model with learned inputs, and read what it answers.

No graph is needed for that, and a permutation of hidden neurons cannot show. In published comparisons it beats graph
networks at a fraction of the cost, so it stands beside them. The probes come out of a deep linear map, which keeps them
alike. For a value per weight, or per neuron, the answers are told to every edge beside its weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nino.errors import NinoError
from nino.graph.calls import outputs_of
from nino.metanet.config import MetanetConfig
from nino.metanet.inputs import GraphInputs, Model
from nino.metanet.layers import Embedding, Encoded, Encoder, mlp, segment_mean

CODE = 32
IMAGE_SIZES = (32, 28, 16, 8, 64, 224)
"""Of images, tried in this order where no example tells."""
MOST_NUMBERS = 300_000
"""In one input that is guessed."""
LAYERS_ASKED = 4
"""Layers of a model whose sizes may be those of an input."""
WORDS = 8
"""In one probe of a model of words, or of a sequence of vectors."""
Kind = tuple[tuple[int, ...], int | None]
"""The shape of one input, and of words how many there are."""


def with_probes(config: MetanetConfig, model: Model, example_inputs: object = None) -> MetanetConfig:
    """Fill in what the probes' size is, from a model and what it is called with.

    Without an example, shapes that the first layers suggest are tried until the model runs on one.

    Raises:
        NinoError: if it runs on none.
    """
    if config.probe_numbers is not None:
        return config
    module = _as_module(model)
    if config.probe_shape is not None:
        kinds = [(config.probe_shape, config.probe_vocabulary)]
    else:
        kinds = _kinds(module, example_inputs)
    refused = None
    for shape, vocabulary in kinds:
        blank = torch.zeros(2, *shape, dtype=torch.float32)
        try:
            answers = _ask(module, blank.long() if vocabulary else blank)
        except NinoError as error:
            refused = refused or error
            continue
        return replace(config, probe_shape=shape, probe_vocabulary=vocabulary, probe_numbers=answers[0].numel())
    raise refused or NinoError(f"the inputs of {type(model).__name__} cannot be guessed: set probe_shape in the config")


def _as_module(model: Model) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise NinoError("variant 'probe' runs the models: give modules, not state dicts")
    return model


def _kinds(model: nn.Module, example_inputs: object) -> list[Kind]:
    """What one input may be: like the example, or by one of the first layers."""
    if isinstance(example_inputs, Mapping) and example_inputs:
        example_inputs = next(iter(example_inputs.values()))
    if isinstance(example_inputs, (tuple, list)) and example_inputs:
        example_inputs = example_inputs[0]
    if isinstance(example_inputs, Tensor):
        words = None if example_inputs.is_floating_point() else int(example_inputs.max()) + 1
        return [(tuple(example_inputs.shape[1:]), words)]
    found = [kinds for kinds in map(_kinds_of_layer, model.modules()) if kinds]
    kinds = dict.fromkeys(kind for of_layer in found[:LAYERS_ASKED] for kind in of_layer)
    reads_sequences = any(isinstance(layer, (nn.RNNBase, nn.MultiheadAttention)) for layer in model.modules())
    return sorted(kinds, key=lambda kind: reads_sequences and len(kind[0]) == 1 and kind[1] is None)


def _kinds_of_layer(layer: nn.Module) -> list[Kind]:
    """What inputs may be if this is the first layer."""
    if isinstance(layer, nn.Embedding):
        return [((WORDS,), layer.num_embeddings)]
    if isinstance(layer, (nn.RNNBase, nn.MultiheadAttention)):
        return [((WORDS, layer.input_size if isinstance(layer, nn.RNNBase) else layer.embed_dim), None)]
    if isinstance(layer, nn.Linear):
        return [((layer.in_features,), None), ((WORDS, layer.in_features), None)]
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        channels, dims = layer.in_channels, layer.weight.dim() - 2
        shapes = [(channels, *(size,) * dims) for size in IMAGE_SIZES if channels * size**dims <= MOST_NUMBERS]
        return [(shape, None) for shape in (*shapes, (channels,))]
    return []


def _ask(model: nn.Module, probes: Tensor) -> Tensor:
    """The model's answers, ``[probes, numbers]``; nothing of the model changes, and gradients flow to the probes."""
    state = {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    first = next(iter(state.values()))
    if probes.is_floating_point():
        probes = probes.to(first.device, first.dtype)
    was_training = [module for module in model.modules() if module.training]
    try:
        output = functional_call(model.eval(), state, (probes.to(first.device),))
    except Exception as error:  # whatever a model's forward may raise
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise NinoError(
            f"{type(model).__name__} does not run on probes {tuple(probes.shape)} ({reason}): pass example_inputs to "
            "fit, or set probe_shape in the config"
        ) from error
    finally:
        for module in was_training:
            module.training = True
    tensors = list(outputs_of(output))
    if not tensors:
        raise NinoError(f"{type(model).__name__} returns no floating point tensor that a probe could read")
    return tensors[0].flatten(1)


class Probe(Encoder):
    """Answers of the model to learned inputs; edges know their weight, their ends and the answers."""

    def __init__(self, config: MetanetConfig) -> None:
        super().__init__()
        if config.probe_shape is None or config.probe_numbers is None:
            raise NinoError("the size of probes is not known yet: see nino.metanet.probe.with_probes")
        hidden = config.hidden
        self.shape, self.numbers, self.vocabulary = config.probe_shape, config.probe_numbers, config.probe_vocabulary
        size = int(torch.Size(self.shape).numel())
        if self.vocabulary is None:
            self.code = nn.Parameter(torch.randn(config.num_probes, CODE))
            self.generate = nn.Sequential(nn.Linear(CODE, CODE), nn.Linear(CODE, size))
        else:
            words = torch.randint(self.vocabulary, (config.num_probes, *self.shape))
            self.register_buffer("words", words)
        self.read = nn.Linear(self.numbers, hidden)
        self.gather = mlp(config.num_probes * hidden, 2 * hidden, hidden)
        self.embed = Embedding(config)
        self.edge_out, self.node_out = mlp(4 * hidden, hidden, hidden), mlp(3 * hidden, hidden, hidden)

    def probes(self) -> Tensor:
        """``[num_probes, *shape]``."""
        if self.vocabulary is not None:
            return self.get_buffer("words")
        return self.generate(self.code * CODE**-0.5).view(-1, *self.shape) * 2

    def forward(self, inputs: GraphInputs) -> Encoded:
        """Encode nodes and edges."""
        probes = self.probes()
        answers = torch.stack([self._answer(model, probes) for model in inputs.models]).to(inputs.features)
        told = self.read(torch.asinh(answers)).relu().flatten(1)
        whole = self.gather(told)
        nodes, edges = self.embed(inputs)
        source, target = inputs.index
        owner = inputs.node_owner[source]
        edges = self.edge_out(torch.cat([edges, nodes[source], nodes[target], whole[owner]], dim=-1))
        around = segment_mean(edges, target, len(nodes))
        return Encoded(self.node_out(torch.cat([nodes, around, whole[inputs.node_owner]], dim=-1)), edges, whole=whole)

    def _answer(self, model: Model, probes: Tensor) -> Tensor:
        answers = _ask(_as_module(model), probes)
        if answers.shape[1] != self.numbers:
            raise NinoError(
                f"the probes read outputs of {self.numbers} numbers, and those of {type(model).__name__} have "
                f"{answers.shape[1]}: models of other outputs need a metanetwork of their own"
            )
        return answers
