"""One name for each role of a model's tensor: a weight of fixed products here, a plain secret or public there."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch

from mpcinfer.errors import RangeError
from mpcinfer.graph.fold import imprecise
from mpcinfer.graph.program import Node, Ref

EMBEDDING = "aten.embedding.default"
# position of the operand that may be a fixed weight
_WEIGHT_AT = {
    "mpc.linear": 1,
    "mpc.tied_linear": 1,
    "mpc.affine": 1,
    "aten.conv1d.default": 1,
    "aten.conv1d.padding": 1,
    "aten.conv2d.default": 1,
    "aten.conv2d.padding": 1,
    "aten.conv_transpose1d.default": 1,
    "aten.conv_transpose2d.input": 1,
    "aten.matmul.default": 1,
    "aten.mm.default": 1,
    "aten.mul.Tensor": 1,
    "aten.embedding.default": 0,
}
# operators that take a public tensor as it is; any other gets it as one more secret
_TAKES_PUBLIC = """
    aten.add.Tensor aten.sub.Tensor aten.rsub.Tensor aten.mul.Tensor
    aten.embedding.default aten.index.Tensor aten.index_select.default aten.gather.default
    aten.masked_fill.Scalar aten.masked_fill.Tensor aten.where.self aten.where.ScalarSelf aten.where.ScalarOther
    aten.lt.Tensor aten.le.Tensor aten.gt.Tensor aten.ge.Tensor aten.eq.Tensor aten.ne.Tensor
    aten.logical_and.default aten.logical_or.default aten.logical_xor.default
    aten.bitwise_and.Tensor aten.bitwise_or.Tensor aten.bitwise_xor.Tensor
    aten.__and__.Tensor aten.__or__.Tensor aten.__xor__.Tensor
    aten.maximum.default aten.minimum.default aten.max.other aten.min.other
    aten.clamp.Tensor aten.clamp_min.Tensor aten.clamp_max.Tensor aten.scaled_dot_product_attention.default
""".split()


def lay_out(
    nodes: Sequence[Node],
    tensors: dict[str, torch.Tensor],
    public: set[str],
    opened: Collection[str],
    frac_bits: int,
) -> tuple[list[Node], set[str]]:
    """The nodes, referring to tensors by a name for each role, and the names of those that are weights.

    tensors: all parameters and constants by name, and public: those of them that are no secret; both gain new names.
    opened: nodes that yield public numbers. Weights of linear layers are stored [in, out], the way the kernels read
    fastest, unless they are the table of an embedding too: then they are one secret, with one mask. RangeError for
    divisors whose inverses the fraction bits cannot hold.
    """
    layout = _Layout(tensors, public, opened, frac_bits)
    layout.tables = {
        node.args[0].name
        for node in nodes
        if node.op == EMBEDDING and layout.tensor(node.args[0]) is not None and not layout.is_public(node.args[1])
    }
    laid_out: list[Node] = []
    for node in nodes:
        parts = [node] if node.name in opened else layout.divided(node)
        laid_out += [part if part.name in opened else layout.node(part) for part in parts]
    return laid_out, layout.weights


class _Layout:
    def __init__(
        self, tensors: dict[str, torch.Tensor], public: set[str], opened: Collection[str], frac_bits: int
    ) -> None:
        self._tensors = tensors
        self._frac_bits = frac_bits
        self._public = public
        self._opened = opened
        self.tables: set[str] = set()  # of embeddings by secret indices
        self.weights: set[str] = set()

    def divided(self, node: Node) -> list[Node]:
        """A node, or for a division by known numbers products with their inverses: with a number from 1/2 to 1 and then
        with a power of two, both as secret as the divisor, where the inverse itself has too few bits.
        """
        divisor = self.tensor(node.args[1]) if node.op == "aten.div.Tensor" else None
        if divisor is None:
            return [node]
        name, inverse = node.args[1].name, 1 / divisor.double()
        if not imprecise(inverse, self._frac_bits).any():
            factors = {"inverse": inverse}
        else:
            exponent = torch.frexp(inverse).exponent.clamp(-self._frac_bits, 0)
            power = torch.ldexp(torch.ones_like(inverse), exponent)
            factors = {"mantissa": inverse / power, "power": power}
            if imprecise(factors["mantissa"], self._frac_bits).any():
                raise RangeError(
                    f"{node.path} divides by so large numbers that {self._frac_bits} fraction bits hold too little of "
                    "their inverses: scale the inputs down before they are shared"
                )
        nodes, x = list[Node](), node.args[0]
        for what, factor in factors.items():
            self._tensors[f"{name}.{what}"] = factor.to(divisor.dtype if divisor.is_floating_point() else torch.float32)
            if name in self._public:
                self._public.add(f"{name}.{what}")
            last = len(nodes) + 1 == len(factors)
            product = node.name if last else f"{node.name}_{what}"
            nodes.append(Node(product, "aten.mul.Tensor", (x, Ref(f"{name}.{what}")), {}, node.path))
            x = Ref(product)
        return nodes

    def node(self, node: Node) -> Node:
        op, args = node.op, list(node.args)
        if op == "aten.linear.default" and isinstance(args[1], Ref) and args[1].name in self.tables:
            op = "mpc.tied_linear"
        elif op == "aten.linear.default" and self.tensor(args[1]) is not None:
            stored = f"{args[1].name}.T"
            self._tensors[stored] = self._tensors[args[1].name].t()
            op, args[1] = "mpc.linear", Ref(stored)
        if op == "aten.mul.Tensor" and self.tensor(args[0]) is not None:
            args.reverse()
        for i, argument in enumerate(args):
            tensor = self.tensor(argument)
            if tensor is None or (argument.name in self._public and op in _TAKES_PUBLIC):
                continue
            weight = i == _WEIGHT_AT.get(op) and not (op == EMBEDDING and self.is_public(args[1]))
            if weight or argument.name in self._public:
                args[i] = Ref(f"{argument.name}.{'weight' if weight else 'secret'}")
                self._tensors[args[i].name] = tensor
            if weight:
                self.weights.add(args[i].name)
        return replace(node, op=op, args=tuple(args))

    def is_public(self, argument: Any) -> bool:
        return isinstance(argument, Ref) and (argument.name in self._public or argument.name in self._opened)

    def tensor(self, argument: Any) -> torch.Tensor | None:
        return self._tensors.get(argument.name) if isinstance(argument, Ref) else None
