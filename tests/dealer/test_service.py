"""Who may call the dealer, over mutual TLS."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mpcinfer.config import PROTOCOL_VERSION, Limits
from mpcinfer.dealer.dealing import Dealer
from mpcinfer.dealer.server import build
from mpcinfer.dealer.service import _use, _uses
from mpcinfer.errors import AbortedError, AgreementError, ConfigError, ForbiddenError, InputError, MpcInferError
from mpcinfer.protocol.cache import MOST_TIMES, CacheUse
from mpcinfer.protocol.tracing import Plan
from mpcinfer.protocol.truncate import Truncation
from mpcinfer.wire import channel
from mpcinfer.wire.v1 import dealer_pb2, dealer_pb2_grpc
from tests.inprocess import Keys

PLAN = Plan((("t#0", Truncation((300_000,), 16)),))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("dealer"), 2, Limits(connect_timeout_s=10, step_timeout_s=10))


@pytest.fixture(scope="module", autouse=True)
def dealer(keys: Keys) -> Iterator[Dealer]:
    dealer, server = build(keys.node("dealer"))
    server.start()
    server.set_serving(True)
    yield dealer
    server.stop()


@pytest.fixture
def connect(keys: Keys) -> Iterator[Any]:
    opened: list[grpc.Channel] = []

    def connect(role: str) -> grpc.Channel:
        opened.append(channel.connect(keys.cluster.dealer, keys.cluster, keys.identity(role), timeout=20))
        return opened[-1]

    yield connect
    for one in opened:
        one.close()


def joining(keys: Keys, index: int, session: bytes = b"s" * 16, **changes: Any) -> dealer_pb2.JoinRequest:
    fields: dict[str, Any] = {
        "session": session,
        "index": index,
        "nonce": secrets.token_bytes(32),
        "public_key": X25519PrivateKey.generate().public_key().public_bytes_raw(),
        "cluster_digest": keys.cluster.digest(),
        "protocol_version": PROTOCOL_VERSION,
    }
    return dealer_pb2.JoinRequest(**{**fields, **changes})


def refused(call: Any, request: Any) -> MpcInferError:
    try:
        answer = call(request, timeout=30)
        list(answer) if hasattr(answer, "__next__") else None
    except grpc.RpcError as error:
        return channel.from_rpc_error(error, "dealer")
    raise AssertionError("not refused")


@pytest.mark.parametrize("role", ["client/bob", "owner/alice"])
def test_only_parties_join_and_ask_for_tapes(keys: Keys, connect: Any, role: str) -> None:
    stub = dealer_pb2_grpc.DealerServiceStub(connect(role))
    for error in (
        refused(stub.Join, joining(keys, 0)),
        refused(stub.Deal, dealer_pb2.DealRequest(session=b"s" * 16, tape=b"t" * 16)),
        refused(stub.Forget, dealer_pb2.ForgetRequest(session=b"s" * 16, slots=[b"t" * 16])),
    ):
        assert type(error) is ForbiddenError and role in str(error)
    assert stub.DealerStatus(dealer_pb2.DealerStatusRequest(), timeout=20).package_version


def test_a_party_speaks_for_itself_only(keys: Keys, connect: Any) -> None:
    stub = dealer_pb2_grpc.DealerServiceStub(connect("party/1"))
    for error in (
        refused(stub.Join, joining(keys, 0)),
        refused(stub.Deal, dealer_pb2.DealRequest(session=b"s" * 16, index=0, tape=b"t" * 16)),
    ):
        assert type(error) is ForbiddenError and "party 0" in str(error)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"cluster_digest": b"x" * 32}, AgreementError),
        ({"protocol_version": PROTOCOL_VERSION + 1}, AgreementError),
        ({"nonce": b""}, InputError),
        ({"public_key": b"x"}, InputError),
        ({"session": b"x"}, InputError),
    ],
)
def test_who_disagrees_is_told(keys: Keys, connect: Any, changes: dict[str, Any], kind: type[Exception]) -> None:
    stub = dealer_pb2_grpc.DealerServiceStub(connect("party/0"))
    assert type(refused(stub.Join, joining(keys, 0, **changes))) is kind


def test_a_session_the_dealer_does_not_know_must_be_formed_anew(connect: Any) -> None:
    stub = dealer_pb2_grpc.DealerServiceStub(connect("party/0"))
    request = dealer_pb2.DealRequest(session=b"?" * 16, index=0, tape=b"t" * 16, plan_digest=PLAN.digest())
    assert type(refused(stub.Deal, request)) is AbortedError


def test_corrections_come_in_chunks_to_the_last_party_only(keys: Keys, connect: Any) -> None:
    stubs = [dealer_pb2_grpc.DealerServiceStub(connect(f"party/{i}")) for i in range(2)]
    session = secrets.token_bytes(16)

    def work(i: int) -> list[int]:
        stubs[i].Join(joining(keys, i, session), timeout=20)
        request = dealer_pb2.DealRequest(
            session=session, index=i, tape=b"t" * 16, plan_digest=PLAN.digest(), plan=PLAN.to_bytes()
        )
        return [len(part.chunk) for part in stubs[i].Deal(request, timeout=30)]

    with ThreadPoolExecutor(2) as pool:
        first, last = pool.map(work, range(2))
    assert first == []
    assert sum(last) == PLAN.correction_bytes() and max(last) <= 1 << 20 and len(last) > 1
    status = stubs[0].DealerStatus(dealer_pb2.DealerStatusRequest(), timeout=20)
    assert (status.tapes, status.bytes_sent, status.session_ready) == (1, PLAN.correction_bytes(), True)


def test_a_call_that_is_cancelled_while_it_waits_frees_its_worker_and_burns_the_tape(
    keys: Keys, connect: Any, dealer: Dealer
) -> None:
    stubs = [dealer_pb2_grpc.DealerServiceStub(connect(f"party/{i}")) for i in range(2)]
    session = secrets.token_bytes(16)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda i: stubs[i].Join(joining(keys, i, session), timeout=20), range(2)))

    def asking(i: int) -> dealer_pb2.DealRequest:
        return dealer_pb2.DealRequest(
            session=session, index=i, tape=b"u" * 16, plan_digest=PLAN.digest(), plan=PLAN.to_bytes()
        )

    def until(happened: Callable[[], bool]) -> None:
        ends = time.monotonic() + 20
        while not happened() and time.monotonic() < ends:
            time.sleep(0.01)
        assert happened()

    waiting = stubs[0].Deal(asking(0), timeout=30)
    until(lambda: b"u" * 16 in dealer._session.tapes)  # type: ignore[union-attr]
    waiting.cancel()
    until(lambda: b"u" * 16 in dealer._session.spent)  # type: ignore[union-attr]
    assert "again" in str(error := refused(stubs[1].Deal, asking(1))) or "ask for a new one" in str(error)


def test_health_is_answered(connect: Any) -> None:
    stub = health_pb2_grpc.HealthStub(connect("client/bob"))
    answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=20)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_configuration_for_a_party_is_refused(keys: Keys) -> None:
    with pytest.raises(ConfigError, match="mpcinfer party"):
        build(keys.node("party/0"))


def test_a_port_in_use_is_refused(keys: Keys) -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        build(keys.node("dealer"))


def test_no_call_takes_a_tensor() -> None:
    """What parties may tell the dealer: ids, digests, plans and numbers of rows; no message has room for a share."""
    allowed = {
        "JoinRequest": {"session", "index", "nonce", "public_key", "cluster_digest", "protocol_version"},
        "DealRequest": {"session", "index", "tape", "plan_digest", "plan", "caches", "signed", "beside"},
        "CacheUse": {"slot", "runs", "count", "times"},
        "ForgetRequest": {"session", "slots", "deployment"},
        "DealerStatusRequest": set(),
        "WitnessRequest": {"session", "index", "cluster_digest", "protocol_version"},
        "CorrectedRequest": {"session", "index", "tape"},
    }
    taken = [method.input_type for method in dealer_pb2.DESCRIPTOR.services_by_name["DealerService"].methods]
    taken += [f.message_type for message in taken for f in message.fields if f.message_type is not None]
    assert {message.name: {f.name for f in message.fields} for message in taken} == allowed


@pytest.mark.parametrize(
    ("slot", "runs", "count"),
    [
        (b"short", [], 0),
        (b"s" * 16, [0], 1),
        (b"s" * 16, [0, 2], 1),
        (b"s" * 16, [1, 1], 1),
        (b"s" * 16, [1, 0], 1),
    ],
)
def test_rows_that_cannot_be_are_refused(slot: bytes, runs: list[int], count: int) -> None:
    with pytest.raises(InputError):
        _use(dealer_pb2.CacheUse(slot=slot, runs=runs, count=count))


def test_rows_arrive_as_they_were_meant() -> None:
    use = CacheUse(b"s" * 16, ((0, 2), (5, 9)), 9)
    numbers = [n for run in use.runs for n in run]
    assert _use(dealer_pb2.CacheUse(slot=use.slot, runs=numbers, count=use.count)) == use
    for times in (3, MOST_TIMES):
        assert _use(dealer_pb2.CacheUse(slot=use.slot, count=9, times=times)) == CacheUse(use.slot, (), 9, times)
    with pytest.raises(InputError):
        _use(dealer_pb2.CacheUse(slot=use.slot, count=9, times=MOST_TIMES + 1))


def test_rows_of_several_texts_arrive_as_they_were_meant() -> None:
    own, other = dealer_pb2.CacheUse(slot=b"s" * 16, count=9), dealer_pb2.CacheUse(slot=b"t" * 16, runs=[0, 2], count=2)
    whole = _uses(dealer_pb2.DealRequest(caches=own, beside=[other]))
    assert whole == CacheUse(b"s" * 16, (), 9, beside=(CacheUse(b"t" * 16, ((0, 2),), 2),))
    other.times = 2
    with pytest.raises(InputError, match="equally often"):
        _uses(dealer_pb2.DealRequest(caches=own, beside=[other]))
