"""The zoo of image classifiers: its networks with their graphs, and how they are split into tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nino import NeuralGraph
from nino.errors import NinoError
from tasks.zoo_models import SIZE, WIDTHS, Architecture, build

TASKS = ("all", "tenth", "width", "architecture")
SPLIT_SEED = 0


@dataclass(frozen=True)
class Member:
    """A trained network of the zoo."""

    architecture: Architecture
    model: nn.Module
    graph: NeuralGraph
    accuracy: float
    seed: int = 0
    """Of the part of the zoo."""


def load_zoo(folder: Path) -> list[Member]:
    """All networks of a folder, in the order of their groups.

    Raises:
        NinoError: if there are none.
    """
    members, graphs = [], {}
    for path in sorted(folder.glob("group-*.pt")):
        group = torch.load(path)
        architecture = Architecture(**group["architecture"])
        for run in group["runs"]:
            model = build(architecture)
            model.load_state_dict(run["state"])
            if architecture not in graphs:
                graphs[architecture] = NeuralGraph.from_model(model, example_inputs=images())
            members.append(Member(architecture, model.eval(), graphs[architecture], run["accuracy"], group["seed"]))
    if not members:
        raise NinoError(f"{folder} holds no zoo: run scripts/metanet_make_zoo.py first")
    return members


def images() -> Tensor:
    """What the networks are called with."""
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


Split = dict[str, list[Member]]


def split(zoo: list[Member], task: str) -> Split:
    """Networks to train on, to choose rates by, and to report on.

    ``"all"``: of a zoo of one seed 70 / 10 / 20 per cent, by network. Of several seeds the first is for choosing: nine
    of ten of its networks, the tenth, and those of all other seeds, which whoever tunes a method does not look at.
    ``"tenth"``: a tenth of these to train on, the same to report on. ``"width"``: trained on the narrower half of each
    family's widths, reported on the wider. ``"architecture"``: trained on all but vision transformers, reported on
    these.
    """
    order = torch.randperm(len(zoo), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    shuffled = [zoo[index] for index in order]
    if task in ("all", "tenth"):
        chosen_by = min(member.seed for member in zoo)
        others = [member for member in shuffled if member.seed != chosen_by]
        known = [member for member in shuffled if member.seed == chosen_by]
        first, second = (0.9, 1.0) if others else (0.7, 0.8)
        cuts = round(first * len(known)), round(second * len(known))
        train = known[: cuts[0]] if task == "all" else known[: cuts[0] // 10]
        return {"train": train, "validation": known[cuts[0] : cuts[1]], "test": known[cuts[1] :] + others}
    is_far: Callable[[Member], bool] = (
        _is_wide if task == "width" else lambda member: member.architecture.family == "vit"
    )
    near = [member for member in shuffled if not is_far(member)]
    far = [member for member in shuffled if is_far(member)]
    cut = round(0.9 * len(near))
    return {"train": near[:cut], "validation": near[cut:], "test": far}


def _is_wide(member: Member) -> bool:
    widths = WIDTHS[member.architecture.family]
    return member.architecture.width > widths[(len(widths) - 1) // 2]
