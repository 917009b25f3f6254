"""Rewriting a program so that an activation truncates the product that it is of, and a gate what it gates as well.

A linear layer's product has twice the fraction bits. Where only activations take it, they truncate it by the opening
that they make anyway: a round less, and 8 bytes an element. In SiLU(x) * u, with u another such product, u is
truncated by the opening that multiplies it: another 8 bytes less.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

from mpcinfer.graph.program import Node, Program, Ref
from mpcinfer.protocol.piecewise import ARGUMENT_BITS

_LINEAR = ("mpc.linear", "mpc.tied_linear")
_SLICE = "aten.slice.Tensor"
_MUL = "aten.mul.Tensor"
_GATE = "mpc.gate"
_SMOOTH = {f"aten.{name}.default": name for name in "silu sigmoid tanh erf hardswish mish gelu".split()}


@dataclass(frozen=True)
class _Gate:
    """activation(x) * u: the two nodes and what they are of."""

    activation: Node
    product: Node
    x: str
    u: str


def merge_activations(program: Program) -> Program:
    """The program with `wide` linear layers before activations, and with gates as one operator each."""
    if program.frac_bits != ARGUMENT_BITS:
        return program
    users: dict[str, list[Node]] = defaultdict(list)
    for node in program.nodes:
        for name in node.references:
            users[name].append(node)
    for kept in (*program.results, *(Ref(cache.result) for cache in program.caches)):
        users[kept.name].append(_OUTSIDE)
    nodes = {node.name: node for node in program.nodes}
    linears = [node for node in program.nodes if node.op in _LINEAR]

    def parts(linear: Node) -> list[str]:
        """The values that a linear layer's output is used as: itself, or slices."""
        return [user.name if user.op == _SLICE else linear.name for user in users[linear.name]]

    products = {part for linear in linears for part in parts(linear)}
    activations = {
        node.args[0].name: node
        for node in program.nodes
        if node.op in _SMOOTH and _reference(node) in products and users[node.args[0].name] == [node]
    }
    gates = [
        _Gate(activation, product, x, other.name)
        for x, activation in activations.items()
        for product in users[activation.name][:1]
        if len(users[activation.name]) == 1 and product.op == _MUL and len(product.args) == 2
        for other in product.args
        if isinstance(other, Ref) and other.name in products and users[other.name] == [product]
    ]
    while True:
        takers = {*activations, *(gate.u for gate in gates)}
        wide = {linear.name for linear in linears if takers.issuperset(parts(linear))}
        ready = {part for name in wide for part in parts(nodes[name])}
        left = [gate for gate in gates if {gate.x, gate.u} <= ready]
        if left == gates:
            return _rewritten(program, wide, gates)
        gates = left


# what uses a value that leaves the program
_OUTSIDE = Node("", "", (), {})


def _reference(node: Node) -> str | None:
    return node.args[0].name if node.args and isinstance(node.args[0], Ref) else None


def _rewritten(program: Program, wide: set[str], gates: list[_Gate]) -> Program:
    merged = {gate.activation.name for gate in gates}
    by_product = {gate.product.name: gate for gate in gates}
    nodes = []
    for node in program.nodes:
        if node.name in wide:
            nodes.append(replace(node, kwargs=node.kwargs | {"wide": True}))
        elif node.name in by_product:
            gate = by_product[node.name]
            function = _function(gate.activation)
            nodes.append(Node(node.name, _GATE, (Ref(gate.x), Ref(gate.u), function), {}, gate.activation.path))
        elif node.name not in merged:
            nodes.append(node)
    return replace(program, nodes=tuple(nodes))


def _function(activation: Node) -> str:
    name = _SMOOTH[activation.op]
    approximate = activation.kwargs.get("approximate", activation.args[1] if len(activation.args) > 1 else "none")
    return "gelu_tanh" if name == "gelu" and approximate == "tanh" else name
