"""The networks that nowcast: NiNo over the neural graph, and WNN per weight."""

from nino.predict.model.config import NowcasterConfig
from nino.predict.model.networks import EdgeInputs, NiNo, Wnn, build_network

__all__ = ["EdgeInputs", "NiNo", "NowcasterConfig", "Wnn", "build_network"]
