"""Nowcasters by name, as the benchmarks take them."""

from __future__ import annotations

import torch

from nino import Nowcaster, NowcasterConfig
from nino.cli.loading import load_nowcaster as load_by_name
from nino.predict.model import build_network


def load_nowcaster(name: str) -> Nowcaster:
    """A nowcaster by name, from a published ``.pt`` file, or ``hidden-128``: random weights of the published width."""
    if name.startswith("hidden-") and name[7:].isdigit():
        torch.manual_seed(0)
        return Nowcaster(build_network(NowcasterConfig(hidden=int(name[7:]))))
    return load_by_name(name)
