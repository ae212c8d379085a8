"""Nowcasts outside the training process: from saved checkpoints to a new one that training resumes from."""

from nino.checkpoints.models import model_from_config, model_from_factory
from nino.checkpoints.nowcast import CheckpointNowcast, nowcast_checkpoints

__all__ = ["CheckpointNowcast", "model_from_config", "model_from_factory", "nowcast_checkpoints"]
