"""Rewriting a program so that linear layers of one input are one: it is opened once, and they share their rounds."""

from __future__ import annotations

from collections import defaultdict

import torch

from mpcinfer.graph.program import Node, Ref

_LINEAR = "aten.linear.default"


def join_linears(nodes: list[Node], tensors: dict[str, torch.Tensor]) -> list[Node]:
    """Linear layers with known weights that have the same input become one, and slices of its output.

    The queries, keys and values of attention, a gate and what it gates. `tensors`, the plain parameters by name, gains
    the joined ones.
    """
    of_input: dict[str, list[Node]] = defaultdict(list)
    for node in nodes:
        if node.op == _LINEAR and isinstance(node.args[0], Ref) and _known(node, tensors):
            of_input[node.args[0].name].append(node)
    joined = {layers[0].name: layers for layers in of_input.values() if len(layers) > 1}
    slices = {node.name: node for layers in joined.values() for node in layers}
    out: list[Node] = []
    starts: dict[str, tuple[str, int]] = {}
    for node in nodes:
        if node.name in joined:
            whole, start = f"{node.name}.joined", 0
            out.append(_whole(whole, joined[node.name], tensors))
            for layer in joined[node.name]:
                starts[layer.name] = whole, start
                start += tensors[layer.args[1].name].shape[0]
        if node.name in slices:
            whole, start = starts[node.name]
            end = start + tensors[node.args[1].name].shape[0]
            out.append(Node(node.name, "aten.slice.Tensor", (Ref(whole), -1, start, end), {}, node.path))
        else:
            out.append(node)
    return out


def _known(node: Node, tensors: dict[str, torch.Tensor]) -> bool:
    parameters = [a for a in node.args[1:] if isinstance(a, Ref)]
    return all(a.name in tensors for a in parameters) and tensors[parameters[0].name].dim() == 2


def _whole(name: str, layers: list[Node], tensors: dict[str, torch.Tensor]) -> Node:
    weights = [tensors[layer.args[1].name] for layer in layers]
    biases = [tensors[layer.args[2].name] if len(layer.args) > 2 and layer.args[2] else None for layer in layers]
    tensors[f"{name}.weight"] = torch.cat(weights)
    args = [layers[0].args[0], Ref(f"{name}.weight")]
    if any(bias is not None for bias in biases):
        tensors[f"{name}.bias"] = torch.cat(
            [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
        )
        args.append(Ref(f"{name}.bias"))
    return Node(name, _LINEAR, tuple(args), {}, layers[0].path)
