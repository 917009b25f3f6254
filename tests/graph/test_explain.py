"""Prices per layer: they add up, each round and correlation is its layer's, and seconds follow the documented model."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from mpcinfer.graph import explain as module
from mpcinfer.graph.capture import capture
from mpcinfer.graph.explain import NETWORKS, explain
from mpcinfer.graph.plan import plan_inference
from mpcinfer.graph.rounds import steps
from mpcinfer.protocol.tracing import Cost
from tests.graph.conftest import Case


def two_layers() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    return capture(model, [torch.linspace(-1, 1, 12).reshape(2, 6)]).program


def test_layers_of_a_network(parties: int) -> None:
    explained = explain(two_layers(), [(5, 6)], parties=parties)
    assert [layer.path for layer in explained.layers] == ["0", "1", "2", "outputs"]
    linear, relu, _, outputs = (layer.price for layer in explained.layers)
    assert explained.layers[0].operators == ("mpc.linear",)
    # the input opened, the product truncated
    assert (linear.rounds, linear.online_bytes) == (2, (5 * 6 * 8 + 5 * 8 * 8) * (parties - 1))
    assert linear.correlations == {"FixedProduct": 1, "Truncation": 1}
    assert relu.rounds == 4
    assert outputs.rounds == outputs.online_bytes == 0 and sum(outputs.correlations.values()) == 1
    assert explained.headers == {"online_bytes": 0, "offline_bytes": 0}


def test_layers_add_up_to_the_plan(residual: Case, parties: int) -> None:
    program = residual.captured.program
    shapes = [tuple(x.shape) for x in residual.inputs(2)]
    plan, cost, _ = plan_inference(program, shapes, parties=parties)
    explained = explain(program, shapes, parties=parties)
    prices = [layer.price for layer in explained.layers]
    # two rounds of the shortcut's convolution are rounds of the branch beside it
    assert explained.total.rounds == cost.rounds == sum(p.rounds for p in prices) - 2
    assert explained.total.online_bytes == cost.bytes_sent == sum(p.online_bytes for p in prices)
    assert explained.total.offline_bytes == plan.correction_bytes() == sum(p.offline_bytes for p in prices)
    counted = Counter(type(item).__name__ for _, item in plan.entries)
    assert explained.total.correlations == dict(counted)
    assert sum((Counter(p.correlations) for p in prices), Counter()) == counted


def test_steps_are_the_rounds_in_order(parties: int) -> None:
    """The first round opens the input, the next ones carry on where it stops; bytes have their headers."""
    explained = explain(two_layers(), [(5, 6)], parties=parties, round_bytes=lambda n: n + 7)
    found = explained.steps
    assert [(s.first, s.rounds, s.layers, s.operators) for s in found] == [
        (1, 2, ("0",), ("mpc.linear",)),
        (3, 4, ("1",), ("aten.relu.default",)),
        (7, 2, ("2",), ("mpc.linear",)),
    ]
    assert found[0].online_bytes == (5 * 6 * 8 + 5 * 8 * 8 + 2 * 7) * (parties - 1)
    assert sum(s.rounds for s in found) == explained.total.rounds
    assert sum(s.online_bytes for s in found) == explained.total.online_bytes


def test_steps_add_up_to_the_plan(residual: Case, parties: int) -> None:
    program = residual.captured.program
    shapes = [tuple(x.shape) for x in residual.inputs(2)]
    _, cost, _ = plan_inference(program, shapes, parties=parties)
    found = explain(program, shapes, parties=parties).steps
    assert [s.first for s in found] == [1 + sum(s.rounds for s in found[:i]) for i in range(len(found))]
    assert sum(s.rounds for s in found) == cost.rounds and sum(s.online_bytes for s in found) == cost.bytes_sent
    paths = {node.path or node.name for node in program.nodes} | {"outputs"}
    assert all(set(s.layers) <= paths and s.layers for s in found)
    assert all(a.layers != b.layers or a.operators != b.operators for a, b in zip(found, found[1:], strict=False))


def test_rounds_that_nodes_share() -> None:
    program = two_layers()
    nodes = {node.name: node for node in program.nodes}
    first, _, last = (node.name for node in program.nodes)
    messages: list[Counter[str]] = [
        Counter({last: 8, first: 16}),
        Counter({first: 1, last: 1}),
        Counter({last: 8, "": 8}),
    ]
    shared, other = steps(Cost(3, 0, Counter(), messages), nodes, 3, lambda n: n + 7)
    assert (shared.first, shared.rounds, shared.operators) == (1, 2, ("mpc.linear",))
    assert set(shared.layers) == {"0", "2"} and shared.online_bytes == 2 * (24 + 2 + 2 * 7)
    assert (other.first, other.rounds, other.layers, other.online_bytes) == (3, 1, ("2", "outputs"), 2 * (16 + 7))


def test_headers_are_apart() -> None:
    program = two_layers()
    bare = explain(program, [(5, 6)], parties=3)
    framed = explain(program, [(5, 6)], parties=3, round_bytes=lambda n: n + 7, dealt_bytes=lambda n: n + 100)
    assert framed.headers == {"online_bytes": 7 * 2 * bare.total.rounds, "offline_bytes": 100}
    assert framed.total.online_bytes == bare.total.online_bytes + framed.headers["online_bytes"]
    assert [x.price.online_bytes for x in framed.layers] == [x.price.online_bytes for x in bare.layers]


def test_seconds_follow_the_model() -> None:
    model = nn.Linear(64, 32).eval()
    program = capture(model, [torch.linspace(-1, 1, 64 * 16).reshape(16, 64)]).program
    total = explain(program, [(16, 64)], parties=2).total
    assert total.rounds == 2 and total.online_bytes == 16 * 8 * (64 + 32)
    plan, _, _ = plan_inference(program, [(16, 64)], parties=2)
    expanded = sum(f.packed_bytes for _, k in plan.entries for f in (k.free() | k.derived()).values())
    for name, (bandwidth, round_trip) in {"LAN": (1e9, 0.5e-3), "WAN": (200e6, 40e-3)}.items():
        assert (NETWORKS[name].bandwidth, NETWORKS[name].round_trip) == (bandwidth, round_trip)
        products = 16 * 64 * 32
        online = (
            2 * (round_trip / 2 + module.ROUND)
            + 8 * total.online_bytes / bandwidth
            + products / module.MULTIPLY_ADDS
            + expanded / module.ONLINE_BYTES
        )
        assert total.online_seconds[name] == pytest.approx(online)
        offline = (
            8 * total.offline_bytes / bandwidth
            + 2 * products / module.MULTIPLY_ADDS
            + 3 * expanded / module.OFFLINE_BYTES
        )
        assert total.offline_seconds[name] == pytest.approx(offline)


def test_what_a_deployment_takes(parties: int) -> None:
    deployment = explain(two_layers(), [(1, 6)], parties=parties).deployment
    weights, biases = 6 * 8 + 8 * 3, 8 + 3
    assert deployment.parameters == weights + biases and deployment.upload == 8 * (weights + biases)
    assert (deployment.rounds, deployment.online_bytes) == (1, 8 * weights * (parties - 1))
    assert deployment.memory_of_a_party == 8 * (2 * weights + biases) and deployment.memory_of_the_dealer == 8 * weights
    no_weights = capture(nn.ReLU().eval(), [torch.ones(1, 3)]).program
    assert explain(no_weights, [(1, 3)], parties=parties).deployment.rounds == 0
