"""Gains of norms that become part of the linear layers behind them, so that norms neither open nor multiply by them."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from mpcinfer.graph.program import Node, Ref

# which arguments of a norm are its gain and its bias
_NORMS: dict[str, tuple[int, ...]] = {"aten.layer_norm.default": (2, 3), "aten.rms_norm.default": (2,)}
_LINEAR = "aten.linear.default"
_MOST = 16  # binary places that numbers are moved by


def fold_gains(nodes: list[Node], tensors: dict[str, torch.Tensor], results: Collection[str]) -> list[Node]:
    """Norms over the last axis that only linear layers with known weights use lose gain and bias, which these take.

    (n g + b) W.T = n (W g).T + W b. Gains are seldom near 1, and then n and W g are no longer of the sizes for which
    their precision was chosen, one too fine, the other too coarse. So the norm yields 2^-down n, the layers have
    2^down W g, and 2^down is near the inverse of the gain's root mean square: as precise as before.

    `tensors`, the plain parameters by name, gains the new ones and loses those that nothing uses any more.
    """
    users: dict[str, list[Node]] = defaultdict(list)
    uses = Counter(name for node in nodes for name in node.references)
    for node in nodes:
        for name in set(node.references):
            users[name].append(node)
    changed: dict[str, Node] = {}
    for node in nodes:
        layers = users[node.name]
        if node.op not in _NORMS or node.name in results or not _has_gain(node, tensors):
            continue
        if not layers or not all(_takes(layer, node.name, tensors, uses) for layer in layers):
            continue
        gain, *bias = (_parameter(node, at, tensors) for at in _NORMS[node.op])
        assert gain is not None
        down = _places(gain)
        args = [None if at in _NORMS[node.op] else a for at, a in enumerate(node.args)]
        changed[node.name] = replace(node, args=tuple(args), kwargs=node.kwargs | {"down": down})
        for layer in layers:
            changed[layer.name] = _with(layer, gain, bias[0] if bias else None, down, tensors)
    return [changed.get(node.name, node) for node in nodes]


def _has_gain(norm: Node, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether it is over one axis, with a gain that is known, as its bias is if it has one."""
    parameters = [a for a in norm.args[2:4] if isinstance(a, Ref)]
    known = all(a.name in tensors for a in parameters)
    return len(norm.args[1]) == 1 and known and _parameter(norm, 2, tensors) is not None


def _takes(layer: Node, norm: str, tensors: dict[str, torch.Tensor], uses: Counter[str]) -> bool:
    """Whether it is a linear layer of the norm's result, with a weight of its own."""
    if layer.op != _LINEAR or layer.args[0] != Ref(norm) or layer.references.count(norm) != 1:
        return False
    parameters = [a.name for a in layer.args[1:] if isinstance(a, Ref)]
    known = all(name in tensors for name in parameters)
    return known and tensors[parameters[0]].dim() == 2 and uses[parameters[0]] == 1


def _parameter(node: Node, at: int, tensors: dict[str, torch.Tensor]) -> torch.Tensor | None:
    argument = node.args[at] if len(node.args) > at else None
    return tensors[argument.name] if isinstance(argument, Ref) else None


def _places(gain: torch.Tensor) -> int:
    size = float(gain.square().mean().sqrt())
    return max(-_MOST, min(_MOST, round(-math.log2(size)))) if 0 < size < math.inf else 0


def _with(
    layer: Node, gain: torch.Tensor, shift: torch.Tensor | None, down: int, tensors: dict[str, torch.Tensor]
) -> Node:
    """The layer of what the norm yields now."""
    args: list[Any] = [*layer.args[:3], None][:3]
    bias = _parameter(layer, 2, tensors)
    weight = tensors.pop(args[1].name)  # before the new one, which may have the same name
    args[1] = Ref(f"{layer.name}.folded")
    tensors[args[1].name] = weight * (gain * 2.0**down)
    if shift is not None:
        args[2] = Ref(f"{layer.name}.folded_bias")
        tensors[args[2].name] = weight @ shift if bias is None else weight @ shift + bias
    return replace(layer, args=tuple(args))
