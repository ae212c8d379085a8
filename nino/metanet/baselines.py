"""What a metanetwork must be compared with: methods that know nothing of how a model is connected."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nino.errors import NinoError
from nino.metanet.inputs import Model
from nino.metanet.layers import mlp
from nino.metanet.training import MOST_GRADIENT, batches_of, rate_factor

BATCH, WEIGHT_DECAY = 16, 1e-2
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


def flat(model: Model) -> Tensor:
    """All weights in one vector, in the model's order."""
    tensors = model.parameters() if isinstance(model, nn.Module) else model.values()
    return torch.cat([tensor.detach().float().flatten() for tensor in tensors])


def statistics(model: Model) -> np.ndarray:
    """StatNN's features (arXiv:2002.11448), of one length for all architectures.

    Mean, deviation and quantiles of every parameter; of these the mean, deviation and extremes over all parameters, and
    those of the first two and the last two as they are.
    """
    tensors = list(model.parameters()) if isinstance(model, nn.Module) else list(model.values())
    rows = []
    for tensor in tensors:
        values = tensor.detach().double().flatten().numpy()
        rows.append([values.mean(), values.std(), *np.quantile(values, QUANTILES)])
    table = np.array(rows)
    sizes = [np.log(len(tensors)), np.log(sum(tensor.numel() for tensor in tensors))]
    ends = [table[index % len(table)] for index in (0, 1, -2, -1)]
    return np.concatenate([table.mean(0), table.std(0), table.min(0), table.max(0), *ends, sizes])


def fit_statistics(models: Sequence[Model], targets: Tensor, seed: int = 0) -> Callable[[Sequence[Model]], Tensor]:
    """Gradient boosting on :func:`statistics`; returns what predicts.

    Raises:
        NinoError: if there are no models.
    """
    from sklearn.ensemble import GradientBoostingRegressor

    if not models:
        raise NinoError("fit_statistics needs at least one model: the zoo is empty")
    regressor = GradientBoostingRegressor(
        n_estimators=300, max_depth=4, learning_rate=0.05, subsample=0.7, random_state=seed
    )
    regressor.fit(np.stack([statistics(model) for model in models]), targets.numpy())
    return lambda others: torch.from_numpy(regressor.predict(np.stack([statistics(model) for model in others])))


class Dmc(nn.Module):
    """A 1-D CNN over the flat vector of weights, averaged at the end, so that any length will do (DMC)."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(4):
            layers += [nn.Conv1d(channels if index else 1, channels, 8, stride=4, padding=4), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = mlp(channels, channels, 1)

    def forward(self, weights: Tensor) -> Tensor:
        """``[weights]`` to ``[1]``."""
        return self.head(self.body(weights[None, None]).mean(-1)[0])


class DeepSets(nn.Module):
    """One network for every weight, the mean of all through another."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.each, self.all = mlp(1, hidden, hidden), mlp(hidden, hidden, 1)

    def forward(self, weights: Tensor) -> Tensor:
        """``[weights]`` to ``[1]``."""
        return self.all(self.each(weights[:, None]).mean(0))


def fit_flat(
    net: nn.Module,
    models: Sequence[Model],
    targets: Tensor,
    steps: int = 2000,
    seed: int = 0,
    lr: float = 2e-3,
) -> Callable[[Sequence[Model]], Tensor]:
    """Train a network on flat vectors as :func:`nino.metanet.fit` trains, with ``"bce"``; returns what predicts.

    Raises:
        NinoError: if there are no models.
    """
    if not models:
        raise NinoError("fit_flat needs at least one model: the zoo is empty")
    vectors = [flat(model) for model in models]
    scale = torch.cat(vectors).square().mean().sqrt()
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
    for step, chosen in enumerate(batches_of(len(models), BATCH, steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = lr * rate_factor(step, steps)
        outputs = torch.stack([net(vectors[index] / scale) for index in chosen])[:, 0]
        loss = F.binary_cross_entropy_with_logits(outputs, targets[chosen].float())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), MOST_GRADIENT)
        optimizer.step()

    @torch.no_grad()
    def predict(others: Sequence[Model]) -> Tensor:
        return torch.stack([net(flat(model) / scale)[0].sigmoid() for model in others])

    return predict
