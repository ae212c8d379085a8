"""Errors on held-out runs, beside those of baselines that need no learning: by family, and by how far ahead."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from nino.pretraining.objective import Measure, baselines, errors_by_horizon
from nino.pretraining.sampling import Sampling
from nino.pretraining.windows import WindowSource

HORIZONS = (1, 5, 10, 20, 40)
"""Reported one by one, where the nowcaster looks so far and runs are long enough."""
SAMPLING = Sampling(max_outputs=4096)
MEASURES: dict[Measure, str] = {"absolute": "", "squared": "/squared"}


@torch.no_grad()
def validate(network: nn.Module, source: WindowSource, windows_per_run: int, device: torch.device) -> dict[str, float]:
    """Mean absolute error per family and horizon, of the network and of its baselines, on the same windows every time.

    Returns:
        ``{"<family>/nowcaster": ..., "<family>/copy": ..., "<family>/linear": ...}`` over all horizons, and the same of
        some horizons alone: ``"<family>/nowcaster@5"``; and of the squared error: ``"<family>/nowcaster/squared@5"``.
    """
    totals: dict[str, list[Tensor]] = defaultdict(list)
    for family, members in sorted(source.by_family.items()):
        generator = torch.Generator().manual_seed(0)
        for _ in range(windows_per_run * len(members)):
            window = source.load(source.draw(family, generator), generator, SAMPLING).to(device)
            for name, predicted in {"nowcaster": network(window.inputs, window.horizons), **baselines(window)}.items():
                for measure, suffix in MEASURES.items():
                    errors = torch.stack(errors_by_horizon(predicted, window, measure))
                    totals[f"{family}/{name}{suffix}"].append(errors)
    result = {}
    for name, pairs in totals.items():
        errors, counts = torch.stack(pairs).cpu().double().sum(0)
        result[name] = float(errors.sum() / counts.sum())
        known = [horizon for horizon in HORIZONS if horizon <= len(counts) and counts[horizon - 1]]
        result |= {f"{name}@{horizon}": float(errors[horizon - 1] / counts[horizon - 1]) for horizon in known}
    return result
