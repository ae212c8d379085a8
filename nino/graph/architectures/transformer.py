"""What the transformer families share: the neurons of an attention layer and the output head."""

from __future__ import annotations

from nino.errors import GraphError
from nino.graph.builder import GraphBuilder
from nino.graph.ir import EdgeType, NeuronGroup

OUTPUT_HEADS = ("lm_head.weight", "score.weight", "classifier.weight")


class Attention:
    """Query, key and value neurons of one attention layer, and the nodes of its heads.

    Each of ``num_kv_heads`` key-value heads serves ``num_groups`` query heads (1 without grouped-query attention).
    A query neuron meets the key neuron of the same dimension, so these relabel together; with
    rotary embeddings they do not relabel at all. Value dimensions relabel freely within their head.

    Attributes:
        queries: neurons ``(kv, query, dim)``.
        keys: neurons ``(kv, dim)``.
        values: neurons ``(kv, value dim)``.
        read_values: the value neurons as the output projection reads them, once per query head.
    """

    def __init__(
        self,
        builder: GraphBuilder,
        name: str,
        *,
        num_kv_heads: int,
        num_groups: int,
        head_dim: int,
        rotary: bool = False,
    ) -> None:
        kv = builder.axis(f"{name}.kv", num_kv_heads)
        query = builder.axis(f"{name}.query", num_groups, within=kv)
        self.dim = builder.axis(f"{name}.dim", head_dim, permutable=not rotary, within=None if rotary else kv)
        value_dim = builder.axis(f"{name}.value_dim", head_dim, within=kv)
        heads = builder.group(f"{name}.heads", kv, query)
        self.queries = builder.group(f"{name}.queries", kv, query, self.dim)
        self.keys = builder.group(f"{name}.keys", kv, self.dim)
        self.values = builder.group(f"{name}.values", kv, value_dim)
        self.read_values = self.values.slots(kv, query, value_dim)
        seen_keys = self.keys.slots(kv, query, self.dim)
        builder.connect(f"{name}.query_heads", heads.slots(kv, query, self.dim), self.queries, EdgeType.HEAD)
        builder.connect(f"{name}.key_heads", heads.slots(kv, query, self.dim), seen_keys, EdgeType.HEAD)
        builder.connect(f"{name}.value_heads", heads.slots(kv, query, value_dim), self.read_values, EdgeType.HEAD)
        builder.connect(f"{name}.query_key", self.queries, seen_keys, EdgeType.HEAD)
        builder.connect(f"{name}.key_query", seen_keys, self.queries, EdgeType.HEAD)


def find_prefix(builder: GraphBuilder, embedding: str) -> str:
    """What precedes the base model's parameter names, found by its word embedding."""
    prefixes = [name.removesuffix(embedding) for name in builder.shapes if name.endswith(embedding)]
    if len(prefixes) != 1:
        raise GraphError(f"expected one parameter named '...{embedding}', found {len(prefixes)}")
    return prefixes[0]


def wire_output(builder: GraphBuilder, stream: NeuronGroup) -> None:
    """Wire the output head, if the model has one that is not tied to the word embedding."""
    for name in OUTPUT_HEADS:
        if name in builder:
            outputs = builder.group("outputs", builder.axis("outputs", builder.shapes[name][0], permutable=False))
            builder.dense(name, stream, outputs)
            builder.optional_fan_out(name.replace("weight", "bias"), outputs, EdgeType.BIAS)
