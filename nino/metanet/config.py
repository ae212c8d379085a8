"""The settings of a metanetwork: small, frozen, saved as JSON beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from nino.errors import CheckpointError, NinoError
from nino.numbers import set_whole

HEADS = ("invariant", "equivariant", "per-neuron")
VARIANTS = ("mpnn", "ng-gnn", "ng-t", "scale", "probe")
INPUTS = ("standardised", "raw")
SYMMETRIES = {"relu": "scale", "leaky_relu": "scale", "tanh": "sign", "sine": "sign", "linear": "scale"}
"""What may be done to a hidden neuron of each activation: scaled by a positive factor, or its sign turned."""


@dataclass(frozen=True, kw_only=True)
class MetanetConfig:
    """Settings of :class:`nino.metanet.GraphMetanetwork`."""

    outputs: int = 1
    """Numbers per model (``"invariant"``) or per neuron (``"per-neuron"``)."""
    head: str = "invariant"
    """``"invariant"``: one vector per model. ``"equivariant"``: a new value per weight. ``"per-neuron"``."""
    variant: str = "mpnn"
    """``"mpnn"``, ``"ng-gnn"``, ``"ng-t"``, ``"scale"`` or ``"probe"``; each is a file of this package."""
    hidden: int = 32
    layers: int = 3
    inputs: str = "standardised"
    """``"standardised"``: weights over the root mean square of their parameter, whose logarithm is told besides;
    ``"raw"``: as they are, which ``"scale"`` needs."""
    num_positions: int = 8
    """Laplacian eigenvectors per node."""
    reverse: bool = True
    """Whether messages also pass against the direction of the model."""
    edge_types: bool = True
    """Whether edges tell what they are (linear, bias, norm ...)."""
    auxiliary: bool = True
    """Whether edges that carry no parameter (residual connections, heads) are read."""
    activation: str = "relu"
    """Of the models that ``"scale"`` reads: it decides the symmetry."""
    num_probes: int = 32
    """Inputs that ``"probe"`` learns to ask with."""
    probe_shape: tuple[int, ...] | None = None
    """Of one input; by default found from the first model."""
    probe_numbers: int | None = None
    """In one output of the models; found from the first model."""
    probe_vocabulary: int | None = None
    """Of models of words: probes are random words then. Found from the first model."""
    output: str = "linear"
    """``"sigmoid"`` once trained with ``loss="bce"``: predictions lie between 0 and 1."""

    def __post_init__(self) -> None:
        for name, options in (
            ("head", HEADS),
            ("variant", VARIANTS),
            ("inputs", INPUTS),
            ("activation", tuple(SYMMETRIES)),
            ("output", ("linear", "sigmoid")),
        ):
            if getattr(self, name) not in options:
                raise NinoError(f"{name} must be one of {', '.join(options)}, got {getattr(self, name)!r}")
        for name in ("outputs", "hidden", "layers", "num_probes"):
            set_whole(self, name, 1, NinoError)
        if self.hidden % 4:
            raise NinoError(f"hidden must be a multiple of 4, got {self.hidden}")
        if self.variant == "scale" and self.inputs != "raw":
            object.__setattr__(self, "inputs", "raw")  # a standardised weight has lost its scale
        if self.probe_shape is not None:
            object.__setattr__(self, "probe_shape", tuple(self.probe_shape))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they are saved."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> MetanetConfig:
        """Read :meth:`as_dict`.

        Raises:
            CheckpointError: if it holds what this version does not know.
        """
        unknown = sorted(set(saved) - {field.name for field in fields(cls)})
        if unknown:
            raise CheckpointError(f"the metanetwork's config has the unknown setting {unknown[0]!r}; update Nino")
        return cls(**saved)
