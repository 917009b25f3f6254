"""Tapes in portions: taken from the dealer as they are drawn, checked to the end, and given up when nobody draws."""

from __future__ import annotations

import gc
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import grpc
import pytest
import torch

import mpcinfer.dealer.service as service_module
import mpcinfer.party.tape as tape_module
import mpcinfer.protocol.batch as batch_module
from mpcinfer.errors import AbortedError, MpcInferError, ProtocolError, TamperingError, UnavailableError
from mpcinfer.party.epoch import Epoch
from mpcinfer.party.passing import Unwatched
from mpcinfer.party.tape import AHEAD, Tape, fetch
from mpcinfer.protocol.correlation import fields_of
from mpcinfer.protocol.multiply import Triple
from mpcinfer.protocol.tracing import Plan
from mpcinfer.protocol.truncate import Truncation
from mpcinfer.ring.kernels import MUL
from mpcinfer.ring.sharing import combine
from mpcinfer.wire.mesh import Account
from mpcinfer.wire.v1 import dealer_pb2
from tests.inprocess import InProcess, Keys, kinds, mlp, wait_for
from tests.party.test_lane import WEIGHTS, X, right
from tests.party.test_tape import KEYS, TAPE, FailedCall, FakeDealer, KeyChain, epoch
from tests.security.dealings import Table, flipped

ITEM, OTHER = Truncation((4,), 16), Triple(MUL, (4,), (4,))
COUNT = 8  # portions of an ITEM and an OTHER each


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(map(batch_module.expanded_bytes, (ITEM, OTHER)))
    monkeypatch.setattr(batch_module, "PORTION_BYTES", size)
    monkeypatch.setattr(tape_module, "HELD_BYTES", 0)


@pytest.fixture(scope="module", params=[2, 3], ids="n={}".format)
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Table:
    return Table(Keys(tmp_path_factory.mktemp("keys"), request.param), request.param)


@pytest.fixture
def plan() -> Plan:
    found = Plan(tuple((f"{i}#{j}", item) for i in range(COUNT) for j, item in enumerate((ITEM, OTHER))))
    assert len(found.portions) == COUNT > 2 * AHEAD
    return found


class Portions(FakeDealer):
    """Deals to the last of two parties, a portion in a message; what comes after `good` of them is as told."""

    def __init__(self, plan: Plan, good: int = COUNT, then: list[bytes | Exception] | None = None) -> None:
        super().__init__(1)
        keys = [KeyChain(key).next(TAPE, plan.digest()).passing for key in KEYS]
        parts = [
            b"".join(bytes(part) for batch in portion for part in batch.deal(keys, {}.__getitem__))
            for portion in plan.portions
        ]
        self.messages: list[bytes | Exception] = [*parts[:good], *(then or [])]
        self.asked = 0  # messages that the party has asked for
        self.goes_on = threading.Event()  # after the first portions
        self.goes_on.set()

    def Deal(self, request: dealer_pb2.DealRequest, timeout: float) -> Any:
        def stream() -> Iterator[dealer_pb2.DealResponse]:
            for message in self.messages:
                self.asked += 1
                if self.asked > AHEAD:
                    assert self.goes_on.wait(30)
                if isinstance(message, Exception):
                    raise message
                yield dealer_pb2.DealResponse(chunk=message)

        call = super().Deal(request, timeout)
        type(call).__iter__ = lambda _: stream()  # type: ignore[method-assign]
        return call


def taken(plan: Plan, dealer: FakeDealer, within: Epoch | None = None, **options: Any) -> Tape:
    return fetch(within or epoch(dealer), TAPE, plan, plan.digest(), {}, 5, **options)


def drawn(tape: Tape, plan: Plan) -> dict[str, Any]:
    """All of it, in the order of a run."""
    shares = {name: tape.draw(name, item) for name, item in plan.entries}
    tape.end()
    return shares


@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "as it is drawn"])
@pytest.mark.parametrize("rate", [0.0, 0.5], ids=["", "audited"])
def test_the_portions_of_all_parties_belong_together(table: Table, plan: Plan, rate: float, ahead: bool) -> None:
    for each in table.epochs:
        each.audit_rate = rate
    tape = secrets.token_bytes(16)
    tapes = table.each(lambda i: fetch(table.epochs[i], tape, plan, plan.digest(), {}, 20, ahead=ahead))
    shares = [drawn(tape, plan) for tape in tapes]
    for name, item in plan.entries:
        fields = {f: declared for each in fields_of(item) for f, declared in each.items()}
        values = {f: combine([s[name][f] for s in shares], declared.ring) for f, declared in fields.items()}
        if item == ITEM:
            assert torch.equal(values["high"], (values["r"] >> 16) & ((1 << 48) - 1))
        else:
            assert torch.equal(values["c"], values["a"] * values["b"])
    assert tapes[-1].dealer_bytes > plan.correction_bytes() and (rate > 0 or tapes[0].dealer_bytes == 0)


def test_a_wrong_bit_in_the_last_portion_is_found(table: Table, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in table.epochs:
        each.audit_rate = 0.5
    honest, last = table.dealer._dealt, plan.batches[-1]

    def dealt(batch: Any, *more: Any) -> list[memoryview]:
        parts = list(honest(batch, *more))
        return [flipped(parts[0]), *parts[1:]] if batch == last else parts

    assert table.audited(table.fetched(plan)) == [None] * table.n
    monkeypatch.setattr(table.dealer, "_dealt", dealt)
    found = table.audited(table.fetched(plan))
    assert all(isinstance(each, TamperingError) and "Triple" in str(each) for each in found)


def test_no_more_is_taken_than_may_be_there(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    dealer = Portions(plan)
    tape, here = taken(plan, dealer), []
    for name, item in plan.entries:
        tape.draw(name, item)
        place = plan.places[name]
        here.append(dealer.asked)
        assert place < here[-1] <= place + AHEAD + 1
    tape.end()
    assert dealer.asked == COUNT and not dealer.cancelled
    assert tape.dealer_bytes > plan.correction_bytes()

    monkeypatch.setattr(tape_module, "AHEAD", COUNT)  # this test can fail
    dealer = Portions(plan)
    taken(plan, dealer)
    assert dealer.asked == COUNT


def test_what_is_not_large_is_there_before(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape_module, "HELD_BYTES", plan.expanded_bytes)
    dealer = Portions(plan)
    tape = taken(plan, dealer)
    assert dealer.asked == COUNT and tape.dealer_bytes > plan.correction_bytes()
    drawn(tape, plan)
    assert tape.waited == 0.0


def test_what_is_drawn_out_of_order_is_waited_for(plan: Plan) -> None:
    tape = taken(plan, Portions(plan))
    for name, item in reversed(plan.entries):
        tape.draw(name, item)
    for name in ("0#0", f"{COUNT - 1}#0", "unknown"):
        with pytest.raises(ProtocolError, match="not on this tape"):
            tape.draw(name, ITEM)
    tape.end()


@pytest.mark.parametrize(
    ("then", "kind", "text"),
    [
        ([], ProtocolError, "another amount"),
        ([b"\0" * 7], ProtocolError, "another amount"),
        ([FailedCall(grpc.StatusCode.UNAVAILABLE)], UnavailableError, "dealer"),
    ],
    ids=["missing", "short", "dead"],
)
def test_a_portion_that_does_not_come(plan: Plan, then: Any, kind: type[MpcInferError], text: str) -> None:
    good = AHEAD + 2
    tape = taken(plan, Portions(plan, good, then))
    entries = list(plan.entries)
    for name, item in entries[: 2 * good]:
        tape.draw(name, item)
    with pytest.raises(kind, match=text):
        tape.draw(*entries[2 * good])
    with pytest.raises(kind, match=text):
        tape.end()


def test_a_party_that_leaves_between_portions(plan: Plan) -> None:
    dealer = Portions(plan, AHEAD + 1, [FailedCall(grpc.StatusCode.CANCELLED)])
    within = epoch(dealer)
    tape = taken(plan, dealer, within)
    within.mesh.broken = True  # type: ignore[misc]
    with pytest.raises(AbortedError, match="again"):
        drawn(tape, plan)


def test_a_portion_that_is_too_long(plan: Plan) -> None:
    tape = taken(plan, Portions(plan, COUNT, [b"\0"]))
    for name, item in plan.entries:
        tape.draw(name, item)
    with pytest.raises(ProtocolError, match="more than the plan"):
        tape.end()


def test_what_nobody_draws_is_not_waited_for(plan: Plan) -> None:
    dealer = Portions(plan)
    tape = taken(plan, dealer)
    assert not dealer.cancelled and any(thread.name == "tape" for thread in threading.enumerate())
    del tape
    gc.collect()
    wait_for(lambda: dealer.cancelled)
    wait_for(lambda: not any(thread.name == "tape" for thread in threading.enumerate()))
    assert dealer.asked < COUNT


# --- fetched ahead ---------------------------------------------------------------------------------------------------


def test_what_is_fetched_ahead_comes_before_it_is_drawn_and_is_expanded_as_it_is(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    expanded: list[str] = []
    honest = batch_module.Batch.expand

    def expand(self: Any, *args: Any, **options: Any) -> Any:
        expanded.extend(self.names)
        return honest(self, *args, **options)

    monkeypatch.setattr(batch_module.Batch, "expand", expand)
    dealer = Portions(plan)
    dealer.goes_on.clear()
    tape = taken(plan, dealer, ahead=True)
    dealer.goes_on.set()
    wait_for(lambda: tape.complete)
    assert dealer.asked == COUNT and len(expanded) <= 2 * (AHEAD + 1) and tape.large
    assert 0 < tape.beside < 30
    assert set(drawn(tape, plan)) == set(expanded) == {name for name, _ in plan.entries}
    assert tape.dealer_bytes > plan.correction_bytes()
    tape.waited += 30  # for what was still coming: that is counted once
    assert tape.beside == 0


def test_what_came_while_the_first_portions_were_waited_for_is_not_counted_twice(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = batch_module.Batch.expand

    def expand(self: Any, *args: Any, **options: Any) -> Any:
        wait_for(lambda: not any(thread.name == "gather" for thread in threading.enumerate()))
        return honest(self, *args, **options)

    monkeypatch.setattr(batch_module.Batch, "expand", expand)
    tape = taken(plan, Portions(plan), ahead=True)
    assert tape.complete and tape.large and tape.beside == 0


def test_a_dealer_that_fails_while_nobody_draws(plan: Plan) -> None:
    dealer = Portions(plan, AHEAD + 2, [FailedCall(grpc.StatusCode.UNAVAILABLE)])
    tape = taken(plan, dealer, ahead=True)
    wait_for(lambda: tape.complete)
    entries = list(plan.entries)
    for name, item in entries[: 2 * (AHEAD + 2)]:
        tape.draw(name, item)
    for _ in range(2):
        with pytest.raises(UnavailableError, match="dealer"):
            tape.draw(*entries[2 * (AHEAD + 2)])


class Recorder(Unwatched):
    """What is passed on to a witness, and whether it is told that this was all."""

    ends: ClassVar[list[str]] = []

    def end(self) -> None:
        self.ends.append("end")

    def cancel(self) -> None:
        self.ends.append("cancel")


@pytest.mark.parametrize("good", [COUNT, COUNT - 1])
def test_a_witness_is_not_told_that_what_broke_off_was_all(
    plan: Plan, good: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recorder, "ends", [])
    dealer = Portions(plan, good, [] if good == COUNT else [FailedCall(grpc.StatusCode.UNAVAILABLE)])
    within = epoch(dealer)
    within.passing = Recorder
    if good == COUNT:
        drawn(taken(plan, dealer, within), plan)
    else:
        with pytest.raises(UnavailableError):
            taken(plan, dealer, within)
    assert Recorder.ends == ["end" if good == COUNT else "cancel"]


def test_what_comes_is_counted_for_what_it_was_asked_for(plan: Plan) -> None:
    own, within = Account(), epoch(Portions(plan))
    tape = taken(plan, within.dealer, within, ahead=True, account=own)
    drawn(tape, plan)
    assert own.dealer_bytes == tape.dealer_bytes > 0 and own.dealer_seconds > 0
    assert within.mesh.account == Account()


def test_what_was_fetched_ahead_in_vain_is_not_listened_to_any_more(plan: Plan) -> None:
    """A dealer that never stops to deal, and a tape that nobody wants."""

    class Endless(Portions):
        def Deal(self, request: dealer_pb2.DealRequest, timeout: float) -> Any:
            def stream() -> Iterator[dealer_pb2.DealResponse]:
                yield from (dealer_pb2.DealResponse(chunk=message) for message in self.messages)  # type: ignore[arg-type]
                while not self.cancelled:
                    time.sleep(0.001)
                    yield dealer_pb2.DealResponse(chunk=bytes(8))

            call = super().Deal(request, timeout)
            type(call).__iter__ = lambda _: stream()
            return call

    dealer = Endless(plan)
    tape = taken(plan, dealer, ahead=True)
    assert not dealer.cancelled and not tape.complete
    del tape
    gc.collect()
    wait_for(lambda: dealer.cancelled)
    wait_for(lambda: not any(thread.name in ("tape", "gather") for thread in threading.enumerate()))


# --- in a cluster ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[2, pytest.param(3, marks=pytest.mark.slow)], ids="n={}".format)
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[InProcess]:
    with InProcess(tmp_path, request.param) as running:
        yield running


def test_a_dealer_that_fails_while_its_tape_is_used(cluster: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    caller = cluster.caller()
    caller.deploy(mlp(), WEIGHTS)
    assert right(caller.infer(X))
    assert cluster.dealer is not None
    honest, begun, failed = cluster.dealer._dealt, threading.Event(), threading.Event()
    draw = Tape.draw

    def dealt(batch: Any, *more: Any) -> list[memoryview]:
        if any(name.startswith("linear1") for name in batch.names) and not failed.is_set():
            begun.wait(30)
            failed.set()
            raise RuntimeError("gone")
        return honest(batch, *more)

    def drawing(self: Tape, name: str, item: Any) -> Any:
        found = draw(self, name, item)
        begun.set()
        return found

    x = torch.cat([X, X])  # of another shape, so that no tape is ready
    new_epoch = cluster.new_epoch()
    monkeypatch.setattr(Tape, "draw", drawing)
    monkeypatch.setattr(cluster.dealer, "_dealt", dealt)
    monkeypatch.setattr(service_module, "CHUNK", 16)
    answers = kinds(caller.infer(x))
    assert begun.is_set() and failed.is_set() and "InferResponse" not in answers
    new_epoch()
    assert right(caller.infer(x), x)


def test_a_request_does_not_wait_for_what_is_fetched_ahead(cluster: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is large comes while something else is asked for and dealt; nothing more is fetched ahead meanwhile."""
    caller = cluster.caller()
    caller.deploy(mlp(), WEIGHTS)
    assert cluster.dealer is not None
    honest, goes_on, seen = cluster.dealer._dealt, threading.Event(), list[Any]()

    def dealt(batch: Any, *more: Any) -> Any:
        if batch.names[0].startswith("linear1") and getattr(batch.item, "x", ())[:1] == (len(X),):
            seen.append(batch)
            if len(seen) > 1:
                goes_on.wait(60)
        return honest(batch, *more)

    monkeypatch.setattr(cluster.dealer, "_dealt", dealt)
    monkeypatch.setattr(service_module, "CHUNK", 1)
    assert right(caller.infer(X))
    wait_for(lambda: len(seen) == 2)
    last = cluster.parties[cluster.n - 1].lane.pool
    assert right(caller.infer(X[:1]), X[:1])
    assert last.coming and len(last) == 0 and sum(len(shelf.tapes) for shelf in last.shelves().values()) == 1
    goes_on.set()
    wait_for(lambda: not last.coming and len(last) > 1)
    assert right(caller.infer(X))
