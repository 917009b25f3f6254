"""A tape gives each correlation once, as planned, and what the dealer sends is checked."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import torch

from mpcinfer.errors import AbortedError, MpcInferError, NotFoundError, ProtocolError, UnavailableError
from mpcinfer.party.epoch import Epoch
from mpcinfer.party.tape import Tape, fetch
from mpcinfer.protocol import batch
from mpcinfer.protocol.batch import expanded_bytes
from mpcinfer.protocol.evidence import KeptMasks
from mpcinfer.protocol.session import KeyChain, TapeKeys
from mpcinfer.protocol.tracing import Plan
from mpcinfer.protocol.truncate import Truncation
from mpcinfer.ring.sharing import combine
from mpcinfer.wire.mesh import Account
from mpcinfer.wire.v1 import dealer_pb2

ITEM = Truncation((4,), 16)
PLAN = Plan((("a#0", ITEM), ("b#0", ITEM)))
DIGEST = PLAN.digest()
KEYS = [b"0" * 32, b"1" * 32]
TAPE = b"t" * 16


class FailedCall(grpc.RpcError, grpc.Call):  # type: ignore[misc]
    """What a stub raises."""

    def __init__(self, code: grpc.StatusCode, name: str = "") -> None:
        self._code, self._name = code, name

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "said the dealer"

    def trailing_metadata(self) -> Any:
        return (("mpcinfer-error", self._name),) if self._name else ()

    add_callback = cancel = initial_metadata = is_active = time_remaining = lambda *_: None


class FakeDealer:
    """Deals to party `index`, or fails as told; keeps the requests."""

    def __init__(self, index: int, *failures: Exception | None, cut: int = 0) -> None:
        self.index, self.failures, self.cut = index, list(failures), cut
        self.requests: list[dealer_pb2.DealRequest] = []
        self.cancelled = False

    def Deal(self, request: dealer_pb2.DealRequest, timeout: float) -> Any:
        kept = dealer_pb2.DealRequest()
        kept.CopyFrom(request)
        self.requests.append(kept)
        failure = self.failures.pop(0) if self.failures else None

        def stream() -> Iterator[dealer_pb2.DealResponse]:
            if failure is not None:
                raise failure
            if self.index == 1:
                data = corrections(request.tape)
                data = data[: len(data) - self.cut]
                yield dealer_pb2.DealResponse(chunk=data[:7])
                yield dealer_pb2.DealResponse(chunk=data[7:])

        class Call:
            def __iter__(self) -> Iterator[dealer_pb2.DealResponse]:
                return stream()

            def cancel(call) -> None:  # noqa: N805
                self.cancelled = True

        return Call()


def corrections(tape: bytes) -> bytes:
    keys = [KeyChain(key).next(tape, DIGEST).passing for key in KEYS]
    parts = [part for batch in PLAN.batches for part in batch.deal(keys, {}.__getitem__)]
    return b"".join(map(bytes, parts))


def epoch(dealer: FakeDealer, broken: bool = False) -> Epoch:
    mesh: Any = SimpleNamespace(index=dealer.index, parties=2, broken=broken, alone=False, account=Account())
    return Epoch(b"s" * 16, mesh, KeyChain(KEYS[dealer.index]), dealer, [], threading.Event())


def fetched(dealer: FakeDealer, within: Epoch | None = None) -> Tape:
    return fetch(within or epoch(dealer), TAPE, PLAN, DIGEST, {}, 5)


def test_the_parties_tapes_belong_together() -> None:
    tapes = [fetched(FakeDealer(i)) for i in range(2)]
    assert tapes[0].dealer_bytes == 0 and 10 <= tapes[1].dealer_bytes - PLAN.correction_bytes() <= 20  # two frames
    for name in ("a#0", "b#0"):
        drawn = [t.draw(name, ITEM) for t in tapes]
        fields = ITEM.free() | ITEM.derived()
        values = {f: combine([d[f] for d in drawn], declared.ring) for f, declared in fields.items()}
        assert torch.equal(values["high"], (values["r"] >> 16) & ((1 << 48) - 1))


def test_a_correlation_is_drawn_once_and_as_planned() -> None:
    tape = fetched(FakeDealer(0))
    tape.draw("a#0", ITEM)
    for name, item in [("a#0", ITEM), ("c#0", ITEM), ("b#0", Truncation((4,), 15))]:
        with pytest.raises(ProtocolError):
            tape.draw(name, item)
    with pytest.raises(ProtocolError):  # what was asked for wrongly is gone as well
        tape.draw("b#0", ITEM)


def test_what_is_dealt_in_slices_is_drawn_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    large = Truncation((40,), 16)
    monkeypatch.setattr(batch, "SLICE_BYTES", expanded_bytes(large) // 3)
    plan = Plan((("a#0", large), ("b#0", ITEM)))
    assert len(plan.batches) > 2
    monkeypatch.setattr(sys.modules[__name__], "PLAN", plan)
    drawn = [fetched(FakeDealer(i)).draw("a#0", large) for i in range(2)]
    fields = large.free() | large.derived()
    values = {f: combine([d[f] for d in drawn], declared.ring) for f, declared in fields.items()}
    assert torch.equal(values["high"], (values["r"] >> 16) & ((1 << 48) - 1))


class Flooding(FakeDealer):
    """Never stops to deal."""

    def Deal(self, request: dealer_pb2.DealRequest, timeout: float) -> Any:
        class Endless(FailedCall):
            def __iter__(self) -> Iterator[dealer_pb2.DealResponse]:
                while not cancelled:
                    yield dealer_pb2.DealResponse(chunk=bytes(1 << 10))

            def cancel(self) -> None:
                cancelled.append(True)

        cancelled: list[bool] = []
        return Endless(grpc.StatusCode.CANCELLED)


def test_a_dealer_without_end_is_not_listened_to() -> None:
    with pytest.raises(ProtocolError, match="more than the plan"):
        fetched(Flooding(1))


@pytest.mark.parametrize("cut", [1, 7, -1])
def test_the_dealer_must_send_what_the_plan_says(cut: int) -> None:
    if cut < 0:
        dealer = FakeDealer(0)
        dealer.index = 1
        within = epoch(dealer)
        within.mesh.index = 0
        with pytest.raises(ProtocolError):
            fetched(dealer, within)
    else:
        with pytest.raises(ProtocolError):
            fetched(FakeDealer(1, cut=cut))


def test_a_plan_is_told_once_and_again_when_forgotten() -> None:
    dealer = FakeDealer(0, None, None, FailedCall(grpc.StatusCode.NOT_FOUND, "NotFoundError"))
    within = epoch(dealer)
    for _ in range(3):
        fetched(dealer, within)
    assert [bool(r.plan) for r in dealer.requests] == [True, False, False, True]
    assert {(r.session, r.tape, r.plan_digest) for r in dealer.requests} == {(b"s" * 16, TAPE, DIGEST)}


def test_a_plan_that_did_not_arrive_is_told_again() -> None:
    dealer = FakeDealer(0, FailedCall(grpc.StatusCode.UNAVAILABLE), FailedCall(grpc.StatusCode.NOT_FOUND))
    within = epoch(dealer)
    for kind in (UnavailableError, NotFoundError):
        with pytest.raises(kind, match="dealer"):
            fetched(dealer, within)
    fetched(dealer, within)
    assert [bool(r.plan) for r in dealer.requests] == [True] * 3


def test_a_broken_mesh_cancels_the_call() -> None:
    dealer = FakeDealer(0, FailedCall(grpc.StatusCode.CANCELLED))
    with pytest.raises(AbortedError, match="again"):
        fetched(dealer, epoch(dealer, broken=True))
    assert dealer.cancelled
    within = epoch(FakeDealer(0))
    call = SimpleNamespace(cancel=lambda: calls.append(1))
    calls: list[int] = []
    with within.cancelling(call):  # type: ignore[arg-type]
        within.check()
        assert calls == []
        within.mesh.broken = True  # type: ignore[misc]
        within.check()
        assert calls == [1]
    within.check()
    assert calls == [1]


def test_errors_of_the_dealer_keep_their_class() -> None:
    with pytest.raises(MpcInferError) as caught:
        fetched(FakeDealer(1, FailedCall(grpc.StatusCode.ABORTED, "AbortedError")))
    assert type(caught.value) is AbortedError


def test_keys_stay_out_of_representations() -> None:
    assert repr(KEYS[0]) not in repr(epoch(FakeDealer(0)))


def test_what_the_runs_of_a_tape_have_the_tape_has_no_more() -> None:
    item = Truncation((1,), 16)
    shares = {f"{run}/node#0": (item, {"r": torch.tensor([run])}) for run in range(3)}
    whole = Tape(TAPE, shares, 10, KeptMasks(TapeKeys(b"p" * 32, b"k" * 32), Plan((("node#0", item),))))
    runs = whole.runs(3)
    assert [int(run.draw("node#0", item)["r"]) for run in runs] == [0, 1, 2]
    assert len({run.id for run in runs} | {TAPE}) == 4 and [run.dealer_bytes for run in runs] == [4, 3, 3]
    for run in runs:
        with pytest.raises(ProtocolError, match="drawn before"):
            run.draw("node#0", item)
    with pytest.raises(ProtocolError, match="not on this tape"):
        whole.draw("0/node#0", item)
