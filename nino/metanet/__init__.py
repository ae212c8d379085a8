"""Graph metanetworks: networks that read, predict and edit the weights of other networks."""

from nino.metanet.config import MetanetConfig
from nino.metanet.ghn import GhnConfig, GraphHyperNetwork, fit_hypernetwork
from nino.metanet.inputs import GraphInputs, union
from nino.metanet.network import GraphMetanetwork
from nino.metanet.training import FitReport, fit

__all__ = [
    "FitReport",
    "GhnConfig",
    "GraphHyperNetwork",
    "GraphInputs",
    "GraphMetanetwork",
    "MetanetConfig",
    "fit",
    "fit_hypernetwork",
    "union",
]
