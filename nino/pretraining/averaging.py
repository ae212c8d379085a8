"""The exponential average of a network's weights along its training, which is often better than where they end."""

from __future__ import annotations

from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from nino.predict.model.networks import Network


def averaged(network: Network, decay: float) -> AveragedModel:
    """An average that ``update_parameters(network)`` moves after every step; its ``module`` is a network.

    The decay grows to its final value, ``(1 + n) / (10 + n)`` after n steps: else the average would remember the
    random weights that training began with for long.
    """

    def move(average: Tensor, current: Tensor, num_steps: Tensor | int) -> Tensor:
        return average.lerp(current, 1 - min(decay, (1 + int(num_steps)) / (10 + int(num_steps))))

    return AveragedModel(network, avg_fn=move)
