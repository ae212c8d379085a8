"""Two ways to compute the same nowcast: edge by edge (the definition) and block by block (the default)."""

from nino.predict.engine.blockwise import predict_blockwise
from nino.predict.engine.edgewise import graph_inputs, predict_edgewise

__all__ = ["graph_inputs", "predict_blockwise", "predict_edgewise"]
