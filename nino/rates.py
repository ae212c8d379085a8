"""The learning rate of an update, as an optimizer's parameter groups tell it."""

from __future__ import annotations

from torch.optim import Optimizer


def learning_rate_of(optimizer: Optimizer | None) -> float | None:
    """The largest learning rate of an optimizer's groups; ``None`` if it has none, or sets its own as it goes.

    Ask before a scheduler steps: afterwards it is the rate of the coming update. A rate that is a tensor on a device
    is waited for.

    Example:
        >>> import torch
        >>> weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
        >>> groups = [{"params": weights[:1]}, {"params": weights[1:], "lr": 0.5}]
        >>> learning_rate_of(torch.optim.SGD(groups, lr=0.1))
        0.5
    """
    groups = [] if optimizer is None else optimizer.param_groups
    rates = [float(group["lr"]) for group in groups if group.get("lr") is not None]
    return max(rates, default=None)
