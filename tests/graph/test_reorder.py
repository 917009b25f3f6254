"""max_pool(relu(x)) becomes relu(max_pool(x)), only where that is the same and saves work."""

from __future__ import annotations

import torch
from torch import nn

from mpcinfer.graph.capture import capture
from mpcinfer.graph.plan import plan_inference
from mpcinfer.graph.program import Node, Ref
from mpcinfer.graph.reorder import pool_before_relu


def _ops(nodes: list[Node]) -> list[tuple[str, str]]:
    return [(n.name, n.op.split(".")[1]) for n in nodes]


def test_swaps_a_relu_that_only_the_pool_uses() -> None:
    nodes = [
        Node("a", "aten.relu.default", (Ref("x"),), {}, "relu"),
        Node("b", "aten.max_pool2d.default", (Ref("a"), [2, 2]), {}, "pool"),
        Node("c", "aten.neg.default", (Ref("b"),), {}, "neg"),
    ]
    swapped = pool_before_relu(nodes, ["c"])
    assert _ops(swapped) == [("a", "max_pool2d"), ("b", "relu"), ("c", "neg")]
    assert swapped[0].args == (Ref("x"), [2, 2]) and swapped[1].args == (Ref("a"),)


def test_leaves_a_relu_that_something_else_uses_too() -> None:
    nodes = [
        Node("a", "aten.relu.default", (Ref("x"),), {}, "relu"),
        Node("b", "aten.max_pool2d.default", (Ref("a"), [2, 2]), {}, "pool"),
    ]
    assert pool_before_relu(nodes, ["a", "b"]) == nodes


def test_a_network_sends_less() -> None:
    def cost(*layers: nn.Module) -> int:
        program = capture(nn.Sequential(*layers).eval(), (torch.zeros(1, 1, 8, 8),)).program
        return plan_inference(program, [(1, 1, 8, 8)], parties=2)[1].bytes_sent

    assert cost(nn.ReLU(), nn.MaxPool2d(2)) == cost(nn.MaxPool2d(2), nn.ReLU())
