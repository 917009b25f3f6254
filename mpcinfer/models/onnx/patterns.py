"""Whole operators in place of the many that exporters write for them: far cheaper, and more accurate, over shares.

A group of nodes between a value x and a result is recognised by what it computes on sample values, so that the order
and the association of its sums and products don't matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from mpcinfer.models.onnx.affine import fold_affine
from mpcinfer.models.onnx.graph import Graph, Node
from mpcinfer.models.onnx.table import lookup

_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Pow", "Neg", "Sqrt", "Reciprocal")
_CURVES = ("Erf", "Tanh", "Sigmoid", "HardSigmoid", "Softplus", "Exp", "Log", "Clip")
_MEANS = ("ReduceMean",)
# of nodes, more than any exporter takes for one of these functions
_LARGEST = 16

_ACTIVATIONS: dict[tuple[str, str], Callable[[torch.Tensor], torch.Tensor]] = {
    ("Gelu", "none"): functional.gelu,
    ("Gelu", "tanh"): lambda x: functional.gelu(x, approximate="tanh"),
    ("SiLU", ""): functional.silu,
    ("Mish", ""): functional.mish,
    ("HardSwish", ""): functional.hardswish,
}
_NORMS: dict[str, Callable[..., torch.Tensor]] = {
    "LayerNormalization": functional.layer_norm,
    "RMSNormalization": functional.rms_norm,
}
_LARGEST_EPSILON = 1e-2


def simplify(graph: Graph) -> None:
    """Rewrite the graph in place; what it computes stays the same, but for rounding."""
    graph.drop_unused()
    fold_affine(graph)
    _recognise(graph)
    graph.drop_unused()
    _append_affine(graph)
    graph.drop_unused()


# activations and norms


@dataclass(frozen=True)
class _Group:
    """Nodes, last first, that make the result of the first of them out of one value, `x`, and public numbers."""

    x: str
    nodes: tuple[Node, ...]

    def has(self, ops: tuple[str, ...]) -> bool:
        return any(node.op in ops for node in self.nodes)

    def __call__(self, graph: Graph, x: torch.Tensor) -> Any:
        values: dict[str, Any] = {self.x: x}
        for node in reversed(self.nodes):
            operands = [values.get(n, graph.number(n)) if n else None for n in node.inputs]
            operator = lookup(node.op, graph.opset)
            assert operator is not None
            axes = {"axes": graph.known[node.inputs[1]]} if node.op in _MEANS and len(node.inputs) > 1 else {}
            values[node.outputs[0]] = operator.function(*operands[: 1 if axes else None], **node.attributes, **axes)
        return values[self.nodes[0].outputs[0]]

    def numbers(self, graph: Graph) -> list[float]:
        found = (graph.number(name) for node in self.nodes for name in node.inputs)
        return [number for number in found if number is not None]


def _recognise(graph: Graph) -> None:
    made_by = {name: (i, node) for i, node in enumerate(graph.nodes) for name in node.outputs}
    for i, root in enumerate(graph.nodes):
        if root.op not in ("Mul", "Div"):
            continue
        found = list(filter(None, (_whole(graph, group) for group in _groups(graph, root, made_by))))
        if found:  # a LayerNorm ends in the RMSNorm of what is left without the mean
            graph.nodes[i] = next((node for node in found if node.op == "LayerNormalization"), found[0])


def _groups(graph: Graph, root: Node, made_by: dict[str, tuple[int, Node]]) -> Iterator[_Group]:
    """The groups that end in a node, smallest first: the open ends of each but the last are expanded, latest first."""
    ends = {root.outputs[0]}
    nodes: list[Node] = []
    while len(nodes) < _LARGEST and not ends.isdisjoint(made_by):
        _, node = max((made_by[name] for name in ends if name in made_by), key=lambda made: made[0])
        if node.op not in (*_ARITHMETIC, *_CURVES, *_MEANS) or len(node.outputs) != 1:
            return
        nodes.append(node)
        ends.discard(node.outputs[0])
        for position, name in enumerate(node.inputs):
            axes = node.op in _MEANS and position == 1
            if name and not axes and graph.number(name) is None:
                ends.add(name)
        if len(ends) == 1:
            yield _Group(next(iter(ends)), tuple(nodes))


def _whole(graph: Graph, group: _Group) -> Node | None:
    """The operator that computes the same as a group, if one does."""
    root = group.nodes[0]
    if group.has(_CURVES) and not group.has(_MEANS):
        x = torch.linspace(-8, 8, 257, dtype=torch.float64)
        values = group(graph, x)
        for (op, approximate), function in _ACTIVATIONS.items():
            if torch.allclose(values, function(x), rtol=0, atol=1e-5):
                attributes = {"approximate": approximate} if approximate else {}
                return Node(op, root.name, (group.x,), root.outputs, attributes)
    if group.has(_MEANS) and not group.has(_CURVES):
        row = torch.tensor([-2.0, 3.0, 0.5, -1.25, 0.75, 4.0, 1.0], dtype=torch.float64)
        # the last row is so small that epsilon matters
        rows = torch.stack([row, row + 5, row.flip(0) * 0.001])
        # where onnx could not tell the rank, "axis 1" may be the last one or not
        leads = [[1] * (graph.ranks[group.x] - 2)] if group.x in graph.ranks else [[], [2]]
        try:
            tried = [(x, group(graph, x)) for x in (rows.expand(*lead, 3, 7) for lead in leads)]
        except IndexError:
            return None
        for op, norm in _NORMS.items():
            for epsilon in (e for e in group.numbers(graph) if 0 <= e <= _LARGEST_EPSILON):
                if all(
                    values.shape == x.shape and torch.allclose(values, norm(x, [7], eps=epsilon), rtol=1e-5, atol=1e-7)
                    for x, values in tried
                ):
                    return Node(op, root.name, (group.x,), root.outputs, {"axis": -1, "epsilon": epsilon})
    return None


def _append_affine(graph: Graph) -> None:
    """A gain and an offset that follow a norm become its own."""
    uses = graph.uses()
    norms: dict[str, int] = {}
    for i, node in enumerate(graph.nodes):
        position = {"Mul": 1, "Add": 2}.get(node.op)
        for norm, vector in (node.inputs, node.inputs[::-1]) if position else ():
            at = norms.get(norm)
            if at is None or uses[norm] > 1 or vector not in graph.known or graph.known[vector].ndim != 1:
                continue
            whole = graph.nodes[at]
            if len(whole.inputs) == position and (position == 1 or whole.op == "LayerNormalization"):
                graph.nodes[i] = replace(whole, inputs=(*whole.inputs, vector), outputs=node.outputs)
        if graph.nodes[i].op in _NORMS and graph.nodes[i].attributes.get("axis", -1) == -1:
            norms[graph.nodes[i].outputs[0]] = i
