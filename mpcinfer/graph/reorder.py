"""Rewriting a program into one that computes the same with fewer comparisons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from mpcinfer.graph.program import Node, Ref

_RELU = "aten.relu.default"
_MAX_POOLS = ("aten.max_pool1d.default", "aten.max_pool2d.default")


def pool_before_relu(nodes: list[Node], results: Collection[str]) -> list[Node]:
    """max_pool(relu(x)) as relu(max_pool(x)): equal, and the ReLU meets only what the pool has left.

    Done where nothing else uses the ReLU's result. For windows of 2 x 2 this saves 43 % of the comparisons.
    """
    uses = Counter(name for node in nodes for name in node.references)
    uses.update(results)
    relus = {node.name: node for node in nodes if node.op == _RELU and uses[node.name] == 1}
    out: list[Node] = []
    for node in nodes:
        source = node.args[0] if node.args else None
        if node.op in _MAX_POOLS and isinstance(source, Ref) and source.name in relus:
            relu = relus[source.name]
            out.remove(relu)
            # the names stay with the results, so whoever refers to the pool now gets the ReLU of it
            out.append(Node(relu.name, node.op, (relu.args[0], *node.args[1:]), node.kwargs, node.path))
            out.append(Node(node.name, _RELU, (Ref(relu.name),), relu.kwargs, relu.path))
        else:
            out.append(node)
    return out
