"""Several tenants on one cluster: each sees its own, whoever brings the request."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jwt
import pytest
import torch

from mpcinfer.client.data import Client
from mpcinfer.config import Limits
from mpcinfer.config.issuer import Issuer
from mpcinfer.errors import BudgetError, ForbiddenError, IdentityError, NotFoundError, SignatureError
from mpcinfer.trust.grant import Budget, Terms
from mpcinfer.wire.v1 import party_pb2
from tests.inprocess import Caller, InProcess, kinds, mlp, plain, random_weights, reveal
from tests.party.test_accounts import KEYS, claims, jwks, token, unsigned
from tests.party.test_generation import CAPTURED, write

PROGRAM = mlp()
WEIGHTS = random_weights(PROGRAM)
X = torch.linspace(-2, 2, 4).reshape(1, 4)
LIMITS = Limits(
    step_timeout_s=60, connect_timeout_s=10, stop_grace_s=5, max_waiting_requests=16, max_sessions_of_client=2
)
GATEWAY = "client/carol"

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    running = InProcess(tmp_path_factory.mktemp("accounts"), 2, LIMITS)
    file = running.keys.directory / "jwks.json"
    file.write_text(jwks("rsa"))
    running.keys.issuers = (Issuer("corp", "https://idp.example", "mpcinfer", str(file), (GATEWAY,)),)
    with running:
        alice = running.caller()
        budget = (Budget("queries", 2, 366 * 86400),)
        grant = alice.grant(PROGRAM, "x", Terms(("jwt/corp/ann",), budget))
        assert kinds(alice.deploy(PROGRAM, WEIGHTS, "x", grant=grant)) == ["DeployResponse"] * 2
        grant = alice.grant(CAPTURED.program, "m", Terms(("client/bob", "jwt/corp/*")))
        assert kinds(alice.deploy(CAPTURED.program, dict(CAPTURED.weights), grant=grant)) == ["DeployResponse"] * 2
        yield running


def ask(caller: Caller, *tokens: str) -> list[Any]:
    requests = caller.inferences(X, "x")
    for request, text in zip(requests, tokens, strict=False):
        request.token = text
    return caller.at_all("Infer", requests, timeout=20)


def test_subjects_have_what_is_granted_to_them_and_budgets_of_their_own(cluster: InProcess) -> None:
    carol, bob = cluster.caller(GATEWAY), cluster.caller("client/bob")
    ann, ben = token(), token(sub="ben")
    assert (reveal(ask(carol, ann, ann)) - plain(WEIGHTS, X)).abs().max() < 1e-3
    # who is not named sees nothing: another subject, the gateway itself, and a client who stole a token
    assert kinds(ask(carol, ben, ben)) == kinds(ask(carol)) == ["NotFoundError"] * 2
    assert kinds(ask(bob, ann, ann)) == ["ForbiddenError"] * 2
    # not the same subject at all parties
    assert "InferResponse" not in kinds(ask(carol, ann, ben)) and "InferResponse" not in kinds(ask(carol, ann))
    bad: list[tuple[str, str]] = [
        ("SignatureError", unsigned({"alg": "none", "kid": "rsa"})),
        ("SignatureError", token("other", kid="rsa")),
        ("SignatureError", token("other")),
        ("IdentityError", token(aud="other")),
        ("IdentityError", token(exp=int(time.time()) - 600)),
    ]
    for kind, text in bad:
        answers = ask(carol, text, text)
        assert kinds(answers) == [kind] * 2 and not any(text in str(a) for a in answers)
    assert (reveal(ask(carol, ann, ann)) - plain(WEIGHTS, X)).abs().max() < 1e-3
    assert kinds(ask(carol, ann, ann)) == ["BudgetError"] * 2


def test_the_client_brings_tokens_with_every_call(cluster: InProcess) -> None:
    where, who = cluster.keys.directory / "cluster.toml", cluster.keys.identity(GATEWAY)
    with Client.connect(where, who, token=lambda: token()) as ann, Client.connect(where, who) as gateway:
        assert [m.name for m in ann.models()] == ["m", "x"] and gateway.models() == []
        with pytest.raises(BudgetError):
            ann.infer("x", X)
        with pytest.raises(NotFoundError):
            gateway.infer("x", X)
        assert len(ann.generate("m", [1, 2], max_new_tokens=2, stream=False).tokens) == 2
    for text, error in (("x", SignatureError), (token(aud="x"), IdentityError)):
        with Client.connect(where, who, token=text) as bad, pytest.raises(error):
            bad.models()
    with Client.connect(where, cluster.keys.identity("client/bob"), token=token()) as thief:
        with pytest.raises(ForbiddenError):
            thief.models()


def test_sessions_of_a_client_are_its_own_and_leave_room(cluster: InProcess) -> None:
    bob = cluster.caller("client/bob")
    running = [write(bob, [1, 2, 3], 40) for _ in range(2)]
    assert all(all(hasattr(a, "outputs") for a in one.step()) for one in running)
    assert write(bob, [1, 2], 1).rest() == [["BusyError"] * 2]
    assert len(write(cluster.caller(), [1, 2], 1).rest()) == 2  # others have room
    for one in running:
        one.cancel()
    # what rests makes room for what its own client begins
    for _ in range(4):
        while write(bob, [4, 5], 1).rest() == [["BusyError"] * 2]:
            time.sleep(0.05)
    assert sum(s.caller == "client/bob" for s in cluster.parties[0].lane._sessions._sessions.values()) <= 2
    with pytest.raises(jwt.InvalidSignatureError):  # the tests' own tokens are what a library verifies
        jwt.decode(token("other"), KEYS["rsa"].public_key(), ["RS256"], audience=claims()["aud"])


def test_a_client_that_waits_often_leaves_room(tmp_path: Path) -> None:
    limits = replace(LIMITS, max_waiting_of_client=1)
    with InProcess(tmp_path, 2, limits) as cluster:
        service_party = cluster.parties[0]
        gate = service_party.lane.wait_ready
        bob, alice = cluster.caller("client/bob"), cluster.caller()
        first = bob.stubs[0].ListModels(party_pb2.ListModelsRequest(), timeout=20)
        assert not first.models
        inside, leave = threading.Event(), threading.Event()

        def wait_ready(timeout: float) -> None:
            inside.set()
            assert leave.wait(30)
            gate(timeout)

        service_party.lane.wait_ready = wait_ready  # type: ignore[method-assign]
        waiting = bob.stubs[0].ListModels.future(party_pb2.ListModelsRequest(), timeout=60)
        assert inside.wait(30)
        second = bob.at_all("ListModels", [party_pb2.ListModelsRequest(), None])
        assert kinds(second)[0] == "BusyError"
        other = alice.stubs[0].ListModels.future(party_pb2.ListModelsRequest(), timeout=60)
        leave.set()
        assert not waiting.result().models and not other.result().models
