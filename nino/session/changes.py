"""What changed in a model since the last snapshot of it.

Layers are unfrozen, vocabularies grow and heads are replaced in the middle of a run. Snapshots from before that are of
another model: read together with those from after it they would show a movement that never was.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

Shapes = Mapping[str, tuple[int, ...]]
NAMES_IN_A_LINE = 2


def describe_changes(
    old: Shapes, new: Shapes, trained_before: Mapping[str, nn.Parameter], trained: Mapping[str, nn.Parameter]
) -> str:
    """Say which parameters came, went, are others than before or begin to be trained; nothing if none.

    Parameters that are no longer trained are no change: they stay where they are.

    Args:
        old: shapes of the model's parameters at the last snapshot, by name.
        new: shapes now.
        trained_before: the parameters that were trained at the last snapshot.
        trained: those that are trained now.

    Example:
        >>> describe_changes({"0.weight": (2, 3)}, {"0.weight": (4, 3), "1.bias": (4,)}, {}, {})
        'added: 1.bias; resized: 0.weight'
    """
    kept = old.keys() & new.keys()
    resized = {name for name in kept if old[name] != new[name]}
    replaced = {n for n in kept & trained_before.keys() & trained.keys() if trained[n] is not trained_before[n]}
    kinds = {
        "added": new.keys() - old.keys(),
        "removed": old.keys() - new.keys(),
        "resized": resized,
        "replaced": replaced - resized,
        "now trained": (trained.keys() & kept) - trained_before.keys() - resized,
    }
    return "; ".join(f"{kind}: {_some_of(names)}" for kind, names in kinds.items() if names)


def _some_of(names: set[str]) -> str:
    first, rest = sorted(names)[:NAMES_IN_A_LINE], len(names) - NAMES_IN_A_LINE
    return ", ".join(first) + (f" and {rest} more" if rest > 0 else "")
