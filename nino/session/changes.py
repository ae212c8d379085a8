"""What changed in a model since the last snapshot of it.

Layers are unfrozen, vocabularies grow and heads are replaced in the middle of a run. Snapshots from before that are of
another model: read together with those from after it they would show a movement that never was.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

Shapes = Mapping[str, tuple[int, ...]]
NAMES_IN_A_LINE = 2


def describe_changes(
    old: Shapes,
    new: Shapes,
    trained_before: Mapping[str, nn.Parameter],
    trained: Mapping[str, nn.Parameter],
    not_held: Collection[str] = (),
) -> str:
    """Say which parameters came, went, are others than before or begin to be trained; nothing if none.

    Parameters that are frozen are no change: they stay where they are. If they are not, but the optimizer does not hold
    what is in their place now, they are trained by mistake no more.

    Args:
        old: shapes of the model's parameters at the last snapshot, by name.
        new: shapes now.
        trained_before: the parameters that were trained at the last snapshot.
        trained: those that are trained now.
        not_held: names of those that are not frozen, but that the optimizer does not hold.

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
        "not in the optimizer, so not trained": {n for n in not_held if n in trained_before or n not in old},
    }
    return "; ".join(f"{kind}: {_some_of(names)}" for kind, names in kinds.items() if names)


def _some_of(names: set[str]) -> str:
    first, rest = sorted(names)[:NAMES_IN_A_LINE], len(names) - NAMES_IN_A_LINE
    return ", ".join(first) + (f" and {rest} more" if rest > 0 else "")
