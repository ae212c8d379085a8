"""Snapshots of a model's weights, and where and in what format they live.

``store`` is what sessions use; ``memory`` and ``disk`` are the places, ``copying`` brings weights from a CUDA device to
the host beside the training, ``folder`` is a folder that no other process touches.
"""

from nino.snapshots.store import SnapshotStore

__all__ = ["SnapshotStore"]
