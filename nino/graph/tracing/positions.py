"""Values whose numbers are positions along an index (``argmax``, ``topk``), and what becomes of them.

Such numbers change when the axis is relabelled. That does no harm as long as they are only copied about and used to
read along the same axis; arithmetic with them tells positions apart.
"""

from __future__ import annotations

from nino.graph.tracing.indices import Index, pin
from nino.graph.tracing.recorder import Call, Value
from nino.graph.tracing.rules.common import names, reason_of

COPIES = names(
    "view _unsafe_view reshape alias detach clone _to_copy contiguous unsqueeze squeeze expand permute transpose t "
    "select slice split split_with_sizes unbind lift_fresh"
)
READS = names("index _unsafe_index index_select gather embedding")
WRITES = names("scatter scatter_add scatter_reduce index_add index_copy index_fill index_put _unsafe_index_put")


class Positions:
    """Which values hold positions, and along what."""

    def __init__(self) -> None:
        self._along: dict[Value, Index] = {}

    def of(self, value: Value) -> Index | None:
        """The index along which a value's numbers are positions."""
        return self._along.get(value)

    def note(self, value: Value, index: Index) -> None:
        """A value's numbers are positions along an index."""
        self._along[value] = index

    def pin(self, value: Value, reason: str) -> None:
        """Pin what a value's numbers are positions along."""
        if value in self._along:
            pin(self._along[value], reason)

    def follow(self, call: Call) -> None:
        """Hand positions on to copies; pin what they lie along where something else is done with them."""
        read_at = [call.arguments.get(name) for name in ("index", "indices")]
        read_at = [one for given in read_at for one in (given if isinstance(given, (list, tuple)) else [given])]
        for value in call.inputs:
            if value not in self._along:
                continue
            is_read_at = any(one is value for one in read_at) and call.name in READS | WRITES
            is_read_from = call.inputs[0] is value and call.name in READS
            if call.name in COPIES or is_read_from:
                for output in call.outputs:
                    self.note(output, self._along[value])
            elif not is_read_at:
                self.pin(value, f"{reason_of(call)} computes with positions along it")
