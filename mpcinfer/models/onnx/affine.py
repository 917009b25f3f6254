"""Sums and products per channel that follow a convolution go into its weights, so that they cost nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mpcinfer.models.onnx.graph import Array, Graph, Node


def fold_affine(graph: Graph) -> None:
    """Exporters of channels-last models write biases and norms as sums and products behind a transposition."""
    uses = graph.uses()
    user = {name: node for node in graph.nodes for name in node.inputs}
    gone: dict[str, str] = {}
    for i, conv in enumerate(graph.nodes):
        if conv.op != "Conv" or any(name not in graph.known for name in conv.inputs[1:]):
            continue
        weight = graph.known[conv.inputs[1]].astype(np.float64)
        bias = graph.known[conv.inputs[2]] if len(conv.inputs) > 2 else np.zeros(len(weight))
        chain = _Chain(np.ones(len(weight)), bias.astype(np.float64), 1, weight.ndim)
        name = conv.outputs[0]
        while uses.get(name) == 1 and name in user:
            node = user[name]
            if node.op == "Transpose":
                chain.transpose(node)
            elif chain.take(node, name, graph):
                gone[node.outputs[0]] = name
            else:
                break
            name = node.outputs[0]
        if chain.taken:
            names = f"{conv.name}.weight", f"{conv.name}.bias"
            graph.known[names[0]] = (weight * chain.gain.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.float32)
            graph.known[names[1]] = chain.shift.astype(np.float32)
            graph.secret.update(names)
            graph.nodes[i] = replace(conv, inputs=(conv.inputs[0], *names))
    _rename(graph, gone)


class _Chain:
    """gain * y + shift: what has been made so far of a layer's output y, whose channels now lie along `axis`."""

    def __init__(self, gain: Array, shift: Array, axis: int, rank: int) -> None:
        self.gain, self.shift, self.axis, self.rank = gain, shift, axis, rank
        self.taken = 0

    def transpose(self, node: Node) -> None:
        self.axis = node.attributes.get("perm", list(range(self.rank))[::-1]).index(self.axis)

    def take(self, node: Node, name: str, graph: Graph) -> bool:
        """Include what a node makes of the value `name`, if that is a sum or a product per channel."""
        if node.op not in ("Add", "Sub", "Mul", "Div"):
            return False
        first = node.inputs[0] == name
        constant = self._per_channel(graph.known.get(node.inputs[1 if first else 0]))
        if constant is None or (node.op == "Div" and not first):
            return False
        if node.op == "Sub" and not first:
            self.gain, self.shift = -self.gain, constant - self.shift
        elif node.op in ("Add", "Sub"):
            self.shift = self.shift + (constant if node.op == "Add" else -constant)
        else:
            factor = constant if node.op == "Mul" else 1 / constant
            self.gain, self.shift = self.gain * factor, self.shift * factor
        self.taken += 1
        return True

    def _per_channel(self, x: Array | None) -> Array | None:
        """A constant as one number for each channel; None if it differs along other axes, or adds some."""
        if x is None or x.ndim > self.rank:
            return None
        shape = (1,) * (self.rank - x.ndim) + x.shape
        if any(s != 1 for i, s in enumerate(shape) if i != self.axis) or shape[self.axis] not in (1, len(self.gain)):
            return None
        return np.broadcast_to(x.reshape(-1).astype(np.float64), self.gain.shape)


def _rename(graph: Graph, gone: dict[str, str]) -> None:
    """Leave out the nodes whose results are now those of others."""

    def last(name: str) -> str:
        while name in gone:
            name = gone[name]
        return name

    kept = [node for node in graph.nodes if node.outputs[0] not in gone]
    graph.nodes = [replace(node, inputs=tuple(map(last, node.inputs))) for node in kept]
    graph.outputs = tuple(map(last, graph.outputs))
