"""Activation matching: neurons are alike that fire alike, instead of having like weights.

Layers whose parameter named ``weight`` leads to permutable neurons are watched while both models run on the same
inputs. What comes out is a labelled tensor like a parameter, ``[*axes, samples]``, and is matched in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from nino.alignment.terms import Term
from nino.graph.calls import Calls
from nino.graph.ir import Axis, EdgeBlock, NeuralGraph

CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)


def activation_terms(
    graph: NeuralGraph, model_a: nn.Module, model_b: nn.Module, example_inputs: Any, known: Mapping[str, Axis]
) -> list[Term]:
    """What both models' layers give on some inputs, as terms of the matching.

    Args:
        graph: of both.
        model_a: the first.
        model_b: the second.
        example_inputs: many samples are better than few.
        known: the axes that can be reordered, by name.
    """
    blocks: dict[str, list[EdgeBlock]] = {}
    for block in graph.parameter_blocks:
        module = str(block.parameter).rpartition(".")[0]
        axes = [axis.root for axis in block.target.axes]
        if str(block.parameter) == f"{module}.weight" and any(axis.name in known for axis in axes):
            blocks.setdefault(module, []).append(block)
    seen_a, seen_b = (_outputs(model, blocks, example_inputs) for model in (model_a, model_b))
    terms = []
    for module, of_module in blocks.items():
        if module in seen_a and module in seen_b:
            for block in of_module:
                part_a, part_b = (_part(block, seen[module]) for seen in (seen_a, seen_b))
                if part_a is not None and part_b is not None:
                    terms.append(Term(tuple(axis.root for axis in block.target.axes), part_a, part_b))
    return terms


def _outputs(model: nn.Module, wanted: Mapping[str, Any], example_inputs: Any) -> dict[str, Tensor]:
    """Outputs of modules as ``[channels, samples]``."""
    seen: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                channels = 1 if isinstance(module, CHANNELS_FIRST) and output.dim() > 1 else -1
                seen[name] = output.detach().movedim(channels, 0).flatten(1).double().cpu()

        return module.register_forward_hook(hook)

    modules = dict(model.named_modules())
    handles = [watch(name, modules[name]) for name in wanted if name in modules]
    was_training = model.training
    try:
        with torch.no_grad():
            Calls.of(example_inputs).run(model.eval())
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return seen


def _part(block: EdgeBlock, output: Tensor) -> Tensor | None:
    """A module's output of the neurons that a block leads to, ``[*target axes, samples]``, standardised."""
    axes = block.target.axes
    size = prod(axis.size for axis in axes)
    ranges = [(start, length) for _, start, length in block.narrow if length == size]
    if block.target.fixed or not output.shape[1]:
        return None
    if len(output) != size:
        if len(ranges) != 1 or sum(ranges[0]) > len(output):
            return None
        output = output.narrow(0, *ranges[0])
    in_storage = [axis for axis in block.layout if axis in axes]
    if len(in_storage) != len(axes):
        return None
    values = output.reshape([axis.size for axis in in_storage] + [-1])
    values = values.permute([in_storage.index(axis) for axis in axes] + [len(axes)])
    centred = values - values.mean(-1, keepdim=True)
    return centred / centred.norm(dim=-1, keepdim=True).clamp_min(1e-12)
