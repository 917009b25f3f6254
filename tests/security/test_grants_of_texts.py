"""Grants of language models: tokens to one, revocation between two tokens; and what no message can ask for."""

from __future__ import annotations

import dataclasses
import itertools
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpcinfer.config import Limits
from mpcinfer.graph.capture import capture
from mpcinfer.party.ledger import Account
from mpcinfer.trust.grant import Budget, Grant, Terms
from mpcinfer.wire.v1 import party_pb2, tensor_pb2
from tests.decoders_local import token_ids
from tests.inprocess import Caller, InProcess, kinds
from tests.party.test_generation import CAPTURED, Streams, requests, write
from tests.security.test_grants import NOON, at

LIMITS = Limits(step_timeout_s=60, connect_timeout_s=10, stop_grace_s=5, max_waiting_requests=16)

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[InProcess]:
    with InProcess(tmp_path, 2, LIMITS) as running:
        at(running, NOON)
        yield running


def deployed(cluster: InProcess, terms: Terms) -> tuple[Caller, Grant]:
    alice = cluster.caller()
    grant = alice.grant(CAPTURED.program, "m", terms)
    answers = alice.deploy(CAPTURED.program, dict(CAPTURED.weights), grant=grant)
    assert kinds(answers) == ["DeployResponse"] * cluster.n
    return alice, grant


def spent(cluster: InProcess) -> set[tuple[int, int]]:
    return {p.ledger.used(Account("owner/alice", "m", "client/bob"), 0) for p in cluster.parties.values()}


def test_tokens_are_counted_to_one(cluster: InProcess) -> None:
    """Those of the prompt and those of the answer, each once."""
    deployed(cluster, Terms(budgets=(Budget("tokens", 10, 86400), Budget("queries", 3, 86400))))
    bob, text = cluster.caller("client/bob"), token_ids(5)
    assert len(write(bob, text, 3).rest()) == 4 and spent(cluster) == {(1, 8)}
    found = write(bob, text[:1], 9).rest()  # one of the prompt and one of the answer, and then no more
    assert len(found) == 2 and found[-1] == ["BudgetError"] * 2 and spent(cluster) == {(2, 10)}
    assert write(bob, text, 1).rest() == [["BudgetError"] * 2] and spent(cluster) == {(2, 10)}
    at(cluster, NOON + 86400)
    assert len(write(bob, text, 5).rest()) == 6
    assert spent(cluster) == {(3, 20)}


def test_a_session_that_is_gone_costs_nothing(cluster: InProcess) -> None:
    deployed(cluster, Terms(budgets=(Budget("queries", 2, 86400),)))
    bob = cluster.caller("client/bob")
    assert write(bob, [1, 2], 1, secrets.token_bytes(16), 2).rest() == [["NotFoundError"] * 2]
    assert spent(cluster) == {(0, 0)}


def test_revoked_between_two_tokens(cluster: InProcess) -> None:
    alice, grant = deployed(cluster, Terms())
    bob = cluster.caller("client/bob")
    running = write(bob, token_ids(3), 40)
    assert all(hasattr(a, "outputs") for a in running.step())
    assert kinds(alice.set_grant(grant.replaced(revoked=True))) == ["SetGrantResponse"] * 2
    found = running.rest()
    assert found[-1] == ["GrantError"] * 2 and len(found) < 39
    # the clock does the same
    alice.set_grant(grant.replaced().replaced(terms=Terms(not_after=NOON + 5)))
    running = write(bob, token_ids(3), 40)
    assert all(hasattr(a, "outputs") for a in running.step())
    at(cluster, NOON + 5)
    assert running.rest()[-1] == ["GrantError"] * 2


# --- what is revealed ------------------------------------------------------------------------------------------------


def test_nobody_can_ask_for_more_than_is_revealed(cluster: InProcess) -> None:
    """It is the program that is evaluated, and the program ends in the argmax: no message names another result."""
    torch.manual_seed(0)
    captured = capture(nn.Linear(4, 6).eval(), (torch.zeros(1, 4),), reveal="argmax")
    alice = cluster.caller()
    assert kinds(alice.deploy(captured.program, captured.weights, "classes")) == ["DeployResponse"] * 2
    bob, x = cluster.caller("client/bob"), torch.randn(3, 4)

    def leaks(answers: list[Any]) -> bool:
        outputs = [list(a.outputs) for a in answers if not isinstance(a, Exception)]
        return any([(list(o.shape), o.frac_bits) for o in found] != [([3], 0)] for found in outputs)

    assert not leaks(bob.infer(x, "classes"))
    shapes = tensor_pb2.Tensor(shape=[3, 6], frac_bits=16, data=bytes(144))
    tries: list[Any] = [
        lambda r: r.inputs.append(shapes),
        lambda r: r.inputs.pop(),
        lambda r: setattr(r, "model", "alice/classes/logits"),
        lambda r: setattr(r, "version", 2),
        lambda r: setattr(r, "token", "logits"),
        lambda r: setattr(r.inputs[0], "ring_bits", 16),
        # fields that this version does not know: numbers 7 to 40, as varints and as texts
        *(lambda r, n=n, t=t: r.MergeFromString(field(n, t)) for n, t in itertools.product((8, 15, 40), (0, 2))),
    ]
    for change in tries:
        messages = bob.inferences(x, "classes")
        for message in messages:
            change(message)
        assert not leaks(bob.at_all("Infer", messages, timeout=20))
    # neither a grant nor a request to generate changes what is evaluated
    assert kinds(alice.set_grant(changed_reveal(alice, captured.program))) == ["GrantError"] * 2
    # planted: a program that reveals logits is another program, which these checks see
    logits = capture(nn.Linear(4, 6).eval(), (torch.zeros(1, 4),), reveal="logits")
    assert kinds(alice.deploy(logits.program, logits.weights, "logits")) == ["DeployResponse"] * 2
    assert leaks(bob.infer(x, "logits"))


def field(number: int, kind: int) -> bytes:
    """An unknown field of a message: a number (0) or a text (2)."""
    tag = number << 3 | kind
    head = bytes([tag]) if tag < 128 else bytes([tag & 127 | 128, tag >> 7])
    return head + (b"\1" if kind == 0 else b"\6logits")


def changed_reveal(alice: Caller, program: Any) -> Grant:
    return dataclasses.replace(alice.grant(program, "classes").replaced(), reveals="logits")


def test_a_writer_of_tokens_answers_with_tokens(cluster: InProcess) -> None:
    deployed(cluster, Terms())
    messages = [
        party_pb2.GenerateRequest.FromString(r.SerializeToString() + field(40, 2)) for r in requests(2, [1, 2], 2)
    ]
    running = Streams(cluster.caller("client/bob"), messages)
    seen, answers = 0, running.step()
    while all(isinstance(a, party_pb2.GenerateResponse) for a in answers):
        expected = 1 if CAPTURED.program.reveal == "tokens" else 2
        assert all(len(a.outputs) in (0, expected) for a in answers)
        seen += bool(answers[0].outputs)
        answers = running.step()
    assert seen == 2
