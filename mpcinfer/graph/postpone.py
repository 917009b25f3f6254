"""Rewriting a program so that sums are truncated once, by the norm that follows, instead of every term by itself.

A linear layer's product has twice the fraction bits. Where it is only added to something, and such sums go into norms,
which truncate what they square anyway, it keeps them: a round and 8 bytes an element less for each such layer, and
one rounding less. That is what residual streams of transformers are.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from mpcinfer.graph.program import Node, Program, Ref

_LINEAR = ("mpc.linear", "mpc.tied_linear")
_ADD = "aten.add.Tensor"
_CENTRED = "aten.layer_norm.default"
_NORMS = (_CENTRED, "aten.rms_norm.default")
# of the length of a row and of the bits it loses: n x - sum(x), for the mean, must fit with twice the fraction bits
_CENTRED_BITS = 14


def postpone_truncations(program: Program) -> Program:
    """The program with `wide` linear layers and sums, and with `frac_bits` where what comes of them is truncated."""
    users: dict[str, list[Node]] = defaultdict(list)
    for node in program.nodes:
        for name in node.references:
            users[name].append(node)
    kept = {r.name for r in program.results} | {cache.result for cache in program.caches}

    def only_summed(node: Node) -> bool:
        return node.name not in kept and all(_takes_wide(user, node.name) for user in users[node.name])

    wide: set[str] = set()
    nodes = []
    for node in program.nodes:
        terms = [a.name for a in node.args[:2] if isinstance(a, Ref)]
        if node.op in _LINEAR and only_summed(node):
            wide.add(node.name)
            node = replace(node, kwargs=node.kwargs | {"wide": True})
        elif node.op == _ADD and wide.intersection(terms):
            if only_summed(node):
                wide.add(node.name)
            else:
                node = replace(node, kwargs=node.kwargs | {"frac_bits": program.frac_bits})
        elif node.op in _NORMS and terms[0] in wide:
            node = replace(node, kwargs=node.kwargs | {"frac_bits": program.frac_bits})
        nodes.append(node)
    return replace(program, nodes=tuple(nodes))


def _takes_wide(user: Node, name: str) -> bool:
    """Whether a node takes a number with twice the fraction bits: once, and as what it adds or normalises."""
    at = [i for i, a in enumerate(user.args) if isinstance(a, Ref) and a.name == name]
    if len(at) != user.references.count(name):
        return False
    if user.op == _ADD:
        return len(user.args) == 2 and "alpha" not in user.kwargs and all(isinstance(a, Ref) for a in user.args)
    if user.op not in _NORMS or at != [0]:
        return False
    if user.op != _CENTRED:
        return True
    count = 1
    for size in user.args[1]:
        count *= size
    return (count - 1).bit_length() + int(user.kwargs.get("shift", 0)) <= _CENTRED_BITS
