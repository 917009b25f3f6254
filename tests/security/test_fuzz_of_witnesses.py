"""A party and its witness that send each other nonsense: no crash, no hang, no growth, errors of ours, a new epoch."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from mpcinfer.client.cluster import Connection
from mpcinfer.errors import AbortedError, DeadlineError, MpcInferError, UnavailableError
from mpcinfer.wire.mesh import CONTROL, OPENING, Link
from mpcinfer.wire.v1 import party_pb2
from tests.inprocess import Caller, InProcess, mlp, plain, random_weights, reveal
from tests.security.mutations import Draw
from tests.security.test_fuzz import GROWTH, LIMITS, SLOW, fuzz, resident

pytestmark = pytest.mark.timeout(300)

PROGRAM = mlp()
WEIGHTS = random_weights(PROGRAM)
X = torch.linspace(-2, 2, 8).reshape(2, 4)
JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["error", "text", "late", "upload", "models", "payload", "key"]), inner)
    ),
    max_leaves=6,
).map(lambda value: json.dumps(value).encode())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    with InProcess(tmp_path_factory.mktemp("fuzzed"), 2, LIMITS, witnesses=(0, 1)) as running:
        running.caller().deploy(PROGRAM, WEIGHTS)
        yield running


@pytest.fixture(scope="module")
def caller(cluster: InProcess) -> Caller:
    return cluster.caller()


@pytest.fixture(scope="module")
def owner(cluster: InProcess) -> Iterator[Connection]:
    """As real callers do, it gives up at all hosts once one has failed."""
    with Connection(cluster.keys.cluster, cluster.keys.identity("owner/alice"), timeout=20) as connection:
        yield connection


def link(cluster: InProcess, role: str) -> Link | None:
    """From a party to its witness, or the other way round, while there is an epoch."""
    host = next(each for each in cluster.holders if each.role == role)
    mesh: Any = host.lane._epoch.mesh if host.lane._epoch is not None else None
    found: Link | None = getattr(mesh, "_witness", None) or getattr(mesh, "_link", None)
    return found


def works(cluster: InProcess, caller: Caller, owner: Connection) -> None:
    """Whether a right request is answered, and right; an epoch may just be ending."""
    for left in range(5, -1, -1):
        cluster.wait_ready()
        try:
            assert (
                float((reveal(owner.call("Infer", caller.inferences(X), timeout=30)) - plain(WEIGHTS, X)).abs().max())
                < 1e-3
            )
            return
        except (UnavailableError, AbortedError):
            if not left:
                raise


@pytest.mark.parametrize("kind", [CONTROL, OPENING], ids=["control", "opening"])
@pytest.mark.parametrize(("examples", "seconds"), [pytest.param(2, 0.0), SLOW])
def test_nonsense_between_a_party_and_its_witness(
    cluster: InProcess,
    caller: Caller,
    owner: Connection,
    monkeypatch: pytest.MonkeyPatch,
    kind: int,
    examples: int,
    seconds: float,
) -> None:
    real, wrong, culprits, skip = Link.send, list[bytes](), list[Link | None](), [0]
    failed: list[MpcInferError] = []

    def send(self: Link, of: int, payload: bytes) -> None:
        if of == kind and wrong and self in culprits and len(payload) > 2:
            if not skip[0]:
                payload = wrong.pop()
            skip[0] -= 1
        real(self, of, payload)

    monkeypatch.setattr(Link, "send", send)
    roles = ["party/0", "party/1"] if kind == OPENING else [host.role for host in cluster.holders]

    def one(draw: Draw) -> None:
        works(cluster, caller, owner)
        culprits[:] = [link(cluster, draw(st.sampled_from(roles)))]
        skip[0] = draw(st.integers(0, 6))
        sent = draw(st.binary(max_size=200) | JSON_LIKE)
        wrong[:] = [sent]
        refresh = party_pb2.RefreshModelRequest(request_id=secrets.token_bytes(16), name="m")
        try:
            if draw(st.booleans()):
                owner.call("RefreshModel", [refresh] * 2, timeout=30)
            else:
                owner.call("Infer", caller.inferences(X), timeout=30)
        except MpcInferError as error:
            assert not isinstance(error, DeadlineError), (sent, error)
            failed.append(error)
        finally:
            wrong.clear()

    before = resident()
    fuzz(one, examples, seconds, seed=11)
    works(cluster, caller, owner)
    assert resident() - before < GROWTH
    assert failed, "nothing of this was noticed"
