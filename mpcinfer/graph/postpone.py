"""Rewriting a program so that what several operators make of a product is truncated once, at its end.

A linear layer's product has twice the fraction bits. Where it is only added to something, and such sums go into norms,
which truncate what they square anyway, it keeps them: a round and 8 bytes an element less for each such layer, and
one rounding less. That is what residual streams of transformers are.

Where it is moved, multiplied by public numbers and added up, as by rotary position embeddings, it keeps them too, and
gets as many again, if there is room: a round less, and 8 bytes for each element of the product and the linear layer.

Logits of which nothing but a token is chosen keep them, too, if they are small enough to be compared so.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mpcinfer.graph.program import Node, Program, Ref
from mpcinfer.nn import public
from mpcinfer.nn.shape import moves
from mpcinfer.protocol.truncate import OFFSET_BITS

_LINEAR = ("mpc.linear", "mpc.tied_linear")
_ADD, _MUL = "aten.add.Tensor", "aten.mul.Tensor"
_CENTRED = "aten.layer_norm.default"
_NORMS = (_CENTRED, "aten.rms_norm.default")
# of the length of a row and of the bits it loses: n x - sum(x), for the mean, must fit with twice the fraction bits
_CENTRED_BITS = 14
# what the sum of squares allows a row's numbers is below 2^(31 + bits of its length and shift): so many are left for
# that, and for the fraction bits of one number
_ROW_BITS = 31
# two logits that are below 2 to this power, in units of the last place, are compared by `nn.elementwise.width` bits
_COMPARED_BITS = 46
# what moves elements, and does not make more of them
_GROWING = ("expand.default", "repeat.default", "repeat_interleave.self_int")
_JOINS = ("aten.cat.default", "aten.concat.default", "aten.stack.default")


def postpone_truncations(program: Program, largest: Mapping[str, float]) -> Program:
    """The program with `wide` operators, and with `frac_bits` or `mpc.narrow` where what comes of them is truncated.

    largest: of each node that is secret, below what its values must be allowed to be, headroom included.
    """
    return _past_choice(_past_products(_past_sums(program), largest), largest)


def _users(program: Program) -> Mapping[str, list[Node]]:
    users: dict[str, list[Node]] = defaultdict(list)
    for node in program.nodes:
        for name in node.references:
            users[name].append(node)
    return users


def _kept(program: Program) -> set[str]:
    return {r.name for r in program.results} | {cache.result for cache in program.caches}


def _past_sums(program: Program) -> Program:
    users, kept = _users(program), _kept(program)

    def only_summed(node: Node) -> bool:
        return node.name not in kept and all(
            _takes_wide(user, node.name, program.frac_bits) or (_moves(user) and only_summed(user))
            for user in users[node.name]
        )

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
        elif _moves(node) and wide.intersection(terms):
            wide.add(node.name)
        elif node.op in _NORMS and terms[0] in wide:
            node = replace(node, kwargs=node.kwargs | {"frac_bits": program.frac_bits})
        nodes.append(node)
    return replace(program, nodes=tuple(nodes))


def _moves(node: Node) -> bool:
    """Whether it moves the elements of one value, or leaves some out."""
    return moves(node.op) and node.op not in _JOINS and node.op.removeprefix("aten.") not in _GROWING


def _takes_wide(user: Node, name: str, frac_bits: int) -> bool:
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
    bits = (count - 1).bit_length() + int(user.kwargs.get("shift", 0))
    return bits <= min(_CENTRED_BITS, _ROW_BITS - frac_bits)


def _past_products(program: Program, largest: Mapping[str, float]) -> Program:
    linears = {node.name for node in program.nodes if node.op in _LINEAR and "wide" not in node.kwargs}
    levels = _levels(program, linears, largest)
    useful = {name for name, level in levels.items() if level == 2}
    for node in reversed(program.nodes):
        if node.name in useful:
            useful.update(name for name in node.references if name in levels)
    levels = _levels(program, linears & useful, largest)
    users = _users(program)
    narrow: dict[str, str] = {}  # what those who take no more fraction bits than usual refer to
    nodes = []
    for node in program.nodes:
        if node.name not in levels:
            nodes.append(_referring(node, narrow))
            continue
        wide = {"wide": True} if node.op in (*_LINEAR, _MUL) else {}
        nodes.append(replace(node, kwargs=node.kwargs | wide))
        if any(user.name not in levels for user in users[node.name]):
            narrow[node.name] = f"{node.name}.narrow"
            nodes.append(Node(narrow[node.name], "mpc.narrow", (Ref(node.name), program.frac_bits), {}, node.path))
    return replace(program, nodes=tuple(nodes))


def _past_choice(program: Program, largest: Mapping[str, float]) -> Program:
    small = 2.0 ** (_COMPARED_BITS - 2 * program.frac_bits)
    if program.reveal != "tokens":
        return program
    used = _users(program)
    logits = {r.name for r in program.results if r.name not in used and largest.get(r.name, math.inf) < small}
    nodes = (
        replace(node, kwargs=node.kwargs | {"wide": True}) if node.name in logits and node.op in _LINEAR else node
        for node in program.nodes
    )
    return replace(program, nodes=tuple(nodes))


def _levels(program: Program, linears: set[str], largest: Mapping[str, float]) -> dict[str, int]:
    """By which multiple of the usual fraction bits more each node can have that comes of these linear layers only."""
    kept, known = _kept(program), {c.name: c.frac_bits for c in program.constants}
    levels: dict[str, int] = {}
    for node in program.nodes:
        if public.sizes_only(node.op) or (public.computes(node.op) and all(n in known for n in node.references)):
            known[node.name] = program.frac_bits if node.kwargs.get("dtype") == "float64" else 0
            continue
        level = 1 if node.name in linears else _level(node, levels, known, program.frac_bits)
        room = OFFSET_BITS - (1 + level) * program.frac_bits
        if level and node.name not in kept and largest.get(node.name, float("inf")) < 2.0**room:
            levels[node.name] = level
    return levels


def _level(node: Node, levels: Mapping[str, int], known: Mapping[str, int], frac_bits: int) -> int:
    """What `levels` make of a node if there is room; 0 for one that takes no more fraction bits than usual."""
    secret = [name for name in node.references if name not in known]
    found = {levels.get(name, 0) for name in secret}
    if len(found) != 1:
        return 0
    level = found.pop()
    others = [known[name] for name in node.references if name in known]
    if node.op == _MUL:
        return 2 if level == 1 and others == [frac_bits] else 0
    if node.op == _ADD:
        return 0 if others or len(secret) != 2 or len(node.args) != 2 or "alpha" in node.kwargs else level
    if node.op in _JOINS:
        return 0 if others else level
    return level if _moves(node) else 0


def _referring(node: Node, names: Mapping[str, str]) -> Node:
    """The node, with references to what has another name now."""
    if not any(name in names for name in node.references):
        return node

    def renamed(x: Any) -> Any:
        if isinstance(x, Ref):
            return Ref(names.get(x.name, x.name))
        if isinstance(x, list | tuple):
            return type(x)(renamed(item) for item in x)
        return {k: renamed(v) for k, v in x.items()} if isinstance(x, dict) else x

    return replace(node, args=renamed(node.args), kwargs=renamed(node.kwargs))
