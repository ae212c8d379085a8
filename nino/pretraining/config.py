"""The settings of a training of a nowcaster."""

from __future__ import annotations

from dataclasses import dataclass, field

from nino.errors import NinoError
from nino.numbers import as_number, as_whole, set_whole
from nino.pretraining.objective import LOSSES, Loss
from nino.pretraining.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """How a nowcaster is trained; the defaults follow the published recipe where it fits small machines."""

    steps: int = 5000
    """Updates of the nowcaster."""
    batch: int = 1
    """Windows per batch of the family with the largest graphs; smaller graphs come up to eight times as often."""
    accumulate: int = 1
    """Unions that a batch is computed in, one after another: a batch is as many times as large."""
    sampling: Sampling = field(default_factory=Sampling)
    """What a step looks at of a window."""
    loss: Loss = "absolute"
    """See :mod:`nino.pretraining.objective`."""
    lr: float = 3e-3
    weight_decay: float = 1e-2
    clip: float = 5.0
    """Largest gradient norm."""
    ema: float = 0.0
    """Decay of the exponential average of the weights that is evaluated and saved; 0 for the weights themselves."""
    seed: int = 0
    workers: int = 1
    """Processes that read batches ahead."""
    evaluate_every: int = 250
    """Updates between evaluations, each of which also saves."""
    validation_windows: int = 6
    """Windows per held-out run."""
    mixed_precision: str = "no"
    """``"no"`` or ``"bf16"``."""
    wandb: bool = False
    """Log to Weights & Biases."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "evaluate_every", "validation_windows"):
            set_whole(self, name, 1, NinoError)
        if as_whole(self.workers, 0) is None:
            raise NinoError(f"workers must be a whole number, 0 for none; got {self.workers!r}")
        for name in ("lr", "weight_decay"):
            if as_number(getattr(self, name), 0) is None:
                raise NinoError(f"{name} must be a number of at least 0, got {getattr(self, name)!r}")
        if not as_number(self.clip, 0):
            raise NinoError(f"clip must be a positive number, got {self.clip!r}")
        if self.mixed_precision not in ("no", "bf16"):
            raise NinoError(f"mixed_precision must be 'no' or 'bf16', got {self.mixed_precision!r}")
        if self.loss not in LOSSES:
            raise NinoError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        ema = as_number(self.ema, 0)
        if ema is None or ema >= 1:
            raise NinoError(f"ema must be at least 0 and less than 1, got {self.ema!r}")
