"""Several requests in one run: every operator gives each of them what it gets alone, and nothing of another one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import mpcinfer.graph.lifted as lifted_module
from mpcinfer.graph.capture import Captured
from mpcinfer.graph.interpret import interpret_several
from mpcinfer.graph.plan import plan_inference
from mpcinfer.nn import lookup
from mpcinfer.protocol.local import Transcript
from mpcinfer.protocol.types import Shared
from mpcinfer.ring.codec import FixedPoint
from tests.models_local import deploy_local, plaintext
from tests.nn.operators import GROUPS, prepared

Request = list[torch.Tensor]


def run_several(captured: Captured, requests: Sequence[Request], parties: int) -> list[list[torch.Tensor]]:
    """The outputs of each; the run must cost what was planned."""
    program = captured.program
    world, holdings = deploy_local(captured, parties)
    world.transcript = Transcript()
    codec = FixedPoint(program.frac_bits)
    shares = [
        [
            world.share(codec.encode(x), v.frac_bits) if v.frac_bits else world.share(x.to(torch.int64))
            for v, x in zip(program.inputs, inputs, strict=True)
        ]
        for inputs in requests
    ]
    own = [[[s[i] for s in inputs] for inputs in shares] for i in range(parties)]
    outputs: list[list[list[Shared]]] = world.run(
        lambda ctx, held, xs: interpret_several(program, ctx, held, xs), holdings, own, weights=holdings
    )
    shapes = [tuple(x.shape) for x in requests[0]]
    plan, cost, made = plan_inference(program, shapes, parties=parties, count=len(requests))
    assert (world.transcript.rounds, world.transcript.bytes_sent) == (cost.rounds, cost.bytes_sent)
    assert world.transcript.dealer_bytes == plan.correction_bytes()
    assert made == [x.shape for x in outputs[0][0]]
    return [
        [
            world.reveal([outputs[i][r][j] for i in range(parties)]).to(torch.float64) / 2**declared.frac_bits
            for j, declared in enumerate(program.outputs)
        ]
        for r in range(len(requests))
    ]


def others(inputs: Request) -> list[Request]:
    """The inputs, and others that an operator takes as well: the same numbers in other orders."""
    return [inputs, [x.flip(0, -1) if x.dim() > 1 else x.flip(0) for x in inputs], [x.roll(1, -1) for x in inputs]]


FEW = ("elementwise", "shape", "linear", "softmax", "embedding")  # what does not take long


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in sorted(GROUPS)]
)
def test_every_operator_keeps_requests_apart(name: str) -> None:
    assert wrongs(name, 2) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "norm"])
def test_three_parties(name: str) -> None:
    assert wrongs(name, 3) == []


@pytest.mark.parametrize(
    ("name", "op", "fault"),
    [
        ("shape", "aten.flip.default", lambda args, kwargs: ([args[0].value, [0]], {})),
        ("linear", "mpc.linear", lambda args, kwargs: ([args[0].value.map(lambda t: t.roll(1, 0)), *args[1:]], {})),
    ],
)
def test_an_operator_that_reaches_along_the_axis_is_noticed(
    name: str, op: str, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(lifted_module._PREPARE, op, fault)
    assert wrongs(name, 2)


def wrongs(name: str, parties: int) -> list[str]:
    """Which functions of a group give some of several requests something else than alone."""
    group, model, captured = prepared(name)
    requests = others(group.inputs())
    found = run_several(captured, requests, parties)
    wrong = []
    for r, (inputs, outputs) in enumerate(zip(requests, found, strict=True)):
        for of, got, want in zip(group.functions, outputs, plaintext(model, inputs), strict=True):
            error = float((got - want).abs().max()) * 2**16 if got.shape == want.shape else float("inf")
            if not error <= group.exceptions.get(of, group.ulps):
                wrong.append(f"{of}, request {r}: {error:.2f} ULP")
    return wrong


def test_the_table_has_operators_only() -> None:
    assert [name for name in [*lifted_module._PREPARE, *lifted_module._OF_ROWS] if lookup(name) is None] == []
