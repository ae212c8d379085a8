"""What one must know of a nowcaster to build and use it, stored as JSON beside its weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from nino.errors import CheckpointError
from nino.numbers import set_whole

CONFIG_FORMAT = "nino-nowcaster"
CONFIG_VERSION = 1

Inputs = Literal["weights", "movements"]


@dataclass(frozen=True, kw_only=True)
class NowcasterConfig:
    """Sizes and conventions of a nowcaster."""

    kind: Literal["nino", "wnn"] = "nino"
    """``"nino"`` passes messages over the neural graph; ``"wnn"`` looks at each weight alone."""
    hidden: int = 128
    """Width of the network."""
    context: int = 5
    """Snapshots that it reads."""
    max_horizon: int = 40
    """The furthest prediction, in snapshot intervals."""
    num_positions: int = 8
    """Laplacian features per node."""
    vocabulary_size: int = 0
    """Rows of a table that is added to the word neurons (row 0 to all others); 0 if the weights have none."""
    wiring: Literal["exact", "official"] = "exact"
    """The wiring on which it was trained."""
    inputs: Inputs = "weights"
    """``"weights"``: the standardised snapshots, as published, and a movement in standard deviations of the weights.
    ``"movements"``: how far the earlier snapshots lie from the last one, in units of the parameter's own recent
    movement, then the standardised last snapshot; and a movement in that unit."""
    trend: bool = False
    """Whether each parameter's movements also go on by themselves, as far as they are correlated, and the network
    counts as much as fits that; reads movements."""

    def __post_init__(self) -> None:
        if self.kind not in ("nino", "wnn"):
            raise CheckpointError(f"kind must be 'nino' or 'wnn', got {self.kind!r}")
        if self.wiring not in ("exact", "official"):
            raise CheckpointError(f"wiring must be 'exact' or 'official', got {self.wiring!r}")
        if self.inputs not in get_args(Inputs):
            raise CheckpointError(f"inputs must be 'weights' or 'movements', got {self.inputs!r}")
        if not isinstance(self.trend, bool):
            raise CheckpointError(f"trend must be true or false, got {self.trend!r}")
        if self.trend and self.inputs != "movements":
            raise CheckpointError(f"a trend wants inputs 'movements', got {self.inputs!r}")
        for name in ("hidden", "max_horizon", "num_positions"):
            set_whole(self, name, 1, CheckpointError)
        set_whole(self, "context", 2, CheckpointError)
        set_whole(self, "vocabulary_size", 0, CheckpointError)

    def to_json(self) -> str:
        """Return the config as JSON, with its format and version; what older releases lack is left out if unused."""
        values = {name: value for name, value in asdict(self).items() if name != "trend" or value}
        return json.dumps({"format": CONFIG_FORMAT, "version": CONFIG_VERSION, **values}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str, origin: str = "config") -> NowcasterConfig:
        """Read what :meth:`to_json` wrote.

        Args:
            text: JSON.
            origin: named in errors, usually the file.

        Raises:
            CheckpointError: if it is not the config of a nowcaster that this release reads.
        """
        try:
            values: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{origin} is not JSON ({error}); expected the config.json of a nowcaster") from error
        if not isinstance(values, dict) or values.pop("format", None) != CONFIG_FORMAT:
            raise CheckpointError(f'{origin} is not the config of a nowcaster: expected "format": "{CONFIG_FORMAT}"')
        version = values.pop("version", None)
        if version != CONFIG_VERSION:
            raise CheckpointError(
                f"{origin} has version {version!r}, this release reads {CONFIG_VERSION}; upgrade nino"
            )
        unknown = sorted(set(values) - {field.name for field in fields(NowcasterConfig)})
        if unknown:
            raise CheckpointError(f"{origin} has unknown settings {unknown}; upgrade nino or remove them")
        return NowcasterConfig(**values)
