"""The plan says what a request will need and cost, before there is one. `run_local` checks it against every run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpcinfer.graph.capture import capture
from mpcinfer.graph.plan import constants, plan_inference, plan_masks
from mpcinfer.graph.program import Constant, Program
from mpcinfer.protocol.tracing import Plan
from tests.graph.conftest import Case, Digits
from tests.inprocess import mlp
from tests.models_local import run_local
from tests.openings import assert_each_mask_opens_once


@pytest.mark.parametrize("parties", [2, 3, 5])
def test_traced_cost_is_counted_cost(residual: Case, parties: int) -> None:
    inputs = residual.inputs(3)
    _, seen = run_local(residual.captured, inputs, parties)
    plan, cost, shapes = plan_inference(residual.captured.program, [(3, 2, 6, 6)], parties=parties)
    assert shapes == [(3, 5)]
    assert (cost.rounds, cost.bytes_sent) == (seen.rounds, seen.bytes_sent)
    assert plan.correction_bytes() == seen.dealer_bytes
    assert sorted(cost.openings.elements()) == sorted(label.partition(":")[2] for label, _, _ in seen.openings)


def test_each_mask_of_a_whole_network_opens_once(residual: Case, digits: Digits) -> None:
    for captured, shape in [
        (residual.captured, (2, 2, 6, 6)),
        (capture(digits.cnn, [digits.images[:1]], reveal="top-k", k=3), (4, 1, 8, 8)),
    ]:
        for parties in (2, 3):
            plan, cost, _ = plan_inference(captured.program, [shape], parties=parties)
            assert_each_mask_opens_once(plan, cost, parties)
            assert_each_mask_opens_once(*plan_masks(captured.program, parties=parties, deployment="d"), parties)


def test_a_request_costs_nothing_for_the_size_of_the_weights() -> None:
    """Two networks, equal but for a hundred times the weights in between, that meet the same tensors."""
    small = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)).eval()
    large = nn.Sequential(nn.Conv2d(4, 4, 9, padding=4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)).eval()
    x = torch.zeros(1, 4, 8, 8)
    costs, sizes = [], []
    for model in (small, large):
        program = capture(model, [x]).program
        plan, cost, _ = plan_inference(program, [(2, 4, 8, 8)], parties=2)
        costs.append((cost.rounds, cost.bytes_sent, plan.correction_bytes()))
        sizes.append(sum(p.size for p in [program]))
    assert costs[0] == costs[1] and sizes[1] > sizes[0] + 1000


def test_masks_are_opened_once_in_one_round(residual: Case) -> None:
    program = residual.captured.program
    weights = [p for p in program.parameters if p.weight]
    plan, cost = plan_masks(program, parties=3, deployment="abc")
    assert plan.deployment == "abc" and len(plan.entries) == len(weights)
    numbers = sum(torch.zeros(p.shape).numel() for p in weights)
    assert (cost.rounds, cost.bytes_sent) == (1, 8 * numbers * 2)


def test_plans_are_the_same_every_time_and_survive_the_wire(residual: Case) -> None:
    program = residual.captured.program
    first, _, _ = plan_inference(program, [(2, 2, 6, 6)], parties=2, deployment="d")
    again, _, _ = plan_inference(Program.from_bytes(program.to_bytes()), [(2, 2, 6, 6)], parties=2, deployment="d")
    assert first == again == Plan.from_bytes(first.to_bytes())
    larger, _, _ = plan_inference(program, [(3, 2, 6, 6)], parties=2, deployment="d")
    assert larger.digest() != first.digest()
    for parties in (3, 4):  # what is dealt does not depend on how many it is dealt to
        assert plan_inference(program, [(2, 2, 6, 6)], parties=parties, deployment="d")[0] == first


def test_cost_grows_with_the_batch_and_rounds_do_not(residual: Case) -> None:
    program = residual.captured.program
    costs = [plan_inference(program, [(b, 2, 6, 6)], parties=2)[1] for b in (8, 16)]
    assert costs[0].rounds == costs[1].rounds
    assert costs[1].bytes_sent == 2 * costs[0].bytes_sent


def test_constants() -> None:
    found = constants(Program(16, (), (), (Constant("c", (2, 1), 16, (5, -7)),), (), (), ()))
    assert found["c"].value.tolist() == [[5], [-7]] and found["c"].frac_bits == 16


def test_weights_are_masked_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch, parties: int) -> None:
    """A message of all of them would be in memory several times."""
    program = mlp([4, 8, 8, 2])
    whole = plan_masks(program, parties=parties, deployment="d")
    monkeypatch.setattr("mpcinfer.graph.plan._MASKED_AT_ONCE", 50)
    parts = plan_masks(program, parties=parties, deployment="d")
    assert (
        whole[1].rounds == 1 and parts[1].rounds == 3
    )  # of 32, 64 (more than one message should hold, but not less) and 16
    assert parts[1].bytes_sent == whole[1].bytes_sent and parts[0] == whole[0]
