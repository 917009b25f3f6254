"""Texts that several parties write: what they agree on in each step, and what is left when one of them does not."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

import mpcinfer.party.stepping as stepping
from mpcinfer.config import Limits
from mpcinfer.errors import BusyError, ContextLengthError
from mpcinfer.party.session import Slot
from mpcinfer.ring.domain import Z64
from mpcinfer.ring.sharing import combine, split
from mpcinfer.wire import channel
from mpcinfer.wire.v1 import party_pb2, tensor_pb2
from tests.decoders_local import captured_decoder, plain_logits, tiny_decoder, token_ids
from tests.inprocess import Caller, InProcess, wait_for
from tests.party.test_lane import Gate

MODEL = tiny_decoder(layers=1)
CAPTURED = captured_decoder(MODEL)
LIMITS = Limits(step_timeout_s=60, connect_timeout_s=10, stop_grace_s=5, max_waiting_requests=8, max_sessions=5)

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(params=[2, pytest.param(3, marks=pytest.mark.slow)], ids="n={}".format)
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[InProcess]:
    """A cluster of its own for each test, with the model "m"."""
    with InProcess(tmp_path, request.param, LIMITS) as running:
        assert [a.version for a in running.caller().deploy(CAPTURED.program, dict(CAPTURED.weights))] == [1] * running.n
        yield running


def requests(
    n: int, tokens: Sequence[int], most: int = 1, parent: bytes = b"", keep: int = 0
) -> list[party_pb2.GenerateRequest]:
    """The messages of a request, by party."""
    seeds, last = split(torch.tensor([list(tokens)]), Z64, n)
    session = secrets.token_bytes(16)
    return [
        party_pb2.GenerateRequest(
            request_id=session,
            model="m",
            parent=parent,
            keep=keep,
            max_new_tokens=most,
            tokens=tensor_pb2.Tensor(shape=[1, len(tokens)], ring_bits=64, **content),
        )
        for content in [*({"seed": s} for s in seeds), {"data": bytes(Z64.pack(last))}]
    ]


class Streams:
    """A request at all parties (but those for which there is none), answer by answer."""

    def __init__(self, caller: Caller, each: Sequence[Any]) -> None:
        self.session: bytes = next(r for r in each if r is not None).request_id
        self.calls = [
            None if r is None else stub.Generate(r, timeout=60) for stub, r in zip(caller.stubs, each, strict=True)
        ]

    def step(self) -> list[Any]:
        """The next answer of each party, None at the end, or its error."""

        def one(call: Any) -> Any:
            try:
                return None if call is None else next(call, None)
            except grpc.RpcError as error:
                return channel.from_rpc_error(error, "party")

        with ThreadPoolExecutor(len(self.calls)) as pool:
            return list(pool.map(one, self.calls))

    def cancel(self, *indices: int) -> None:
        for i in indices or range(len(self.calls)):
            self.calls[i].cancel()  # type: ignore[union-attr]

    def rest(self) -> list[Any]:
        """Tokens until the end, which is the last: None, or the parties' errors by name."""
        found: list[Any] = []
        while True:
            answers = self.step()
            if any(a is None or isinstance(a, Exception) for a in answers):
                errors = [type(a).__name__ for a in answers if isinstance(a, Exception)]
                return [*found, errors or None]
            if answers[0].outputs:
                found.append(token(answers))


def token(answers: Sequence[Any]) -> int:
    return int(combine([Z64.unpack(a.outputs[0].data, (1, 1)) for a in answers], Z64))


def write(caller: Caller, tokens: Sequence[int], most: int = 1, parent: bytes = b"", keep: int = 0) -> Streams:
    return Streams(caller, requests(caller.n, tokens, most, parent, keep))


def right(found: Sequence[int], tokens: Sequence[int]) -> bool:
    text = list(tokens)
    for each in found:
        logits = plain_logits(MODEL, text)
        if float(logits.max() - logits[each]) > 5e-3:
            return False
        text.append(each)
    return True


def held(cluster: InProcess) -> list[set[bytes]]:
    return [set(p.lane._sessions._sessions) for p in cluster.parties.values()]


def slots(cluster: InProcess) -> dict[bytes, int]:
    """The dealer's, and how many rows it has masks of."""
    assert cluster.dealer is not None and cluster.dealer._session is not None
    return {s: next(iter(stores.values())).count for s, stores in cluster.dealer._session.slots.items()}


def epoch(cluster: InProcess) -> Any:
    return cluster.parties[0].former.current


def test_what_was_fetched_ahead_is_skipped_if_the_text_takes_another_turn(cluster: InProcess) -> None:
    caller, text = cluster.caller(), token_ids(6)
    first = write(caller, text, 30)
    first.step()
    first.cancel()
    # the step that is being done goes on to its end
    wait_for(lambda: not any(len(p.inbox) or p.lane._busy for p in cluster.parties.values()))
    session = cluster.parties[0].lane._sessions._sessions[first.session]
    # a step that had begun when its caller went is finished
    wait_for(lambda: not any(p.lane._busy for p in cluster.parties.values()))
    written, ahead = session.length, cluster.parties[0].lane._sessions.ahead()
    assert ahead >= 1
    fork = write(caller, [9, 8], 3, first.session, 4)
    assert right(fork.rest()[:-1], [*text[:4], 9, 8])
    # two new rows and two tokens' rows, and those that were never written: their masks are no other rows'
    assert list(slots(cluster).values()) == [written + ahead + 2 + 2]
    assert {s.slot.count for p in cluster.parties.values() for s in p.lane._sessions._sessions.values()} == {
        written + ahead + 2 + 2
    }


def test_rows_that_are_not_skipped_are_noticed(cluster: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: parties that forget that the dealer has counted on."""
    caller, text = cluster.caller(), token_ids(6)
    first = write(caller, text, 30)
    first.step()
    first.cancel()
    wait_for(lambda: not any(len(p.inbox) for p in cluster.parties.values()))
    monkeypatch.setattr(Slot, "skip", lambda slot, rows: None)
    fork = write(caller, [9, 8], 3, first.session, 4)
    assert fork.rest()[-1] is not None


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_texts_that_are_written_at_the_same_time_share_rounds(tmp_path: Path, n: int) -> None:
    with InProcess(tmp_path, n, replace(LIMITS, max_sessions=16)) as cluster:
        cluster.caller().deploy(CAPTURED.program, dict(CAPTURED.weights))
        together(cluster)


def together(cluster: InProcess) -> None:
    caller, text = cluster.caller(), token_ids(6)
    alone = write(caller, text, 4)
    found = alone.rest()
    mesh = epoch(cluster).mesh
    before = mesh.rounds
    again = write(caller, text, 4).rest()
    of_one = mesh.rounds - before
    assert right(found[:-1], text) and right(again[:-1], text)
    gate = Gate(cluster.parties[1].lane)
    first = write(caller, text, 1)
    assert gate.reached.wait(60)
    texts = [token_ids(6), [7, 3, 9, 2], token_ids(6)]
    streams = [write(caller, each, 4) for each in texts]
    fork = write(caller, [5], 4, alone.session, 7)  # grows from the same rows as the next one: not in one step
    other = write(caller, [8], 4, alone.session, 7)
    wait_for(lambda: all(len(p.inbox) == 6 for p in cluster.parties.values()))
    gate.open.set()
    assert first.rest()[-1] is None
    before = mesh.rounds
    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda s: s.rest(), [*streams, fork, other]))
    grown = [*texts, [*text, found[0], 5], [*text, found[0], 8]]
    assert all(a[-1] is None and len(a) == 5 and right(a[:-1], t) for a, t in zip(answers, grown, strict=True))
    assert mesh.rounds - before <= 2.5 * of_one


def test_tapes_are_fetched_ahead(cluster: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token's, two tokens', then four at a time; none for tokens beyond the last, or with other plans."""
    fetched: list[int] = []
    real_deal, real_ahead = stepping.Stepping.deal, stepping.Stepping.ahead

    def deal(by: stepping.Stepping, *args: Any, **kwargs: Any) -> Any:
        fetched.append(0)
        return real_deal(by, *args, **kwargs)

    def ahead(by: stepping.Stepping, *args: Any, **kwargs: Any) -> Any:
        found = real_ahead(by, *args, **kwargs)
        fetched.append(len(found.digests))
        return found

    caller, text = cluster.caller(), token_ids(6)
    assert write(caller, text, 1).rest()[-1] is None  # opens the masks of the weights
    monkeypatch.setattr(stepping.Stepping, "deal", deal)
    monkeypatch.setattr(stepping.Stepping, "ahead", ahead)
    for most, runs in ((4, [0, 1, 2]), (13, [0, 1, 2, 4, 4, 1])):
        fetched.clear()
        *found, end = write(caller, text, most).rest()
        assert end is None and len(found) == most and right(found, text)
        assert sorted(fetched) == sorted(runs * cluster.n)
    assert list(slots(cluster).values()) == [6, 6 + 3, 6 + 12]
    text = token_ids(28, 1)  # the cache gets more room after four tokens, and a step another plan
    fetched.clear()
    assert right(write(caller, text, 8).rest()[:-1], text)
    assert sorted(fetched) == sorted([0, 1, 2, 1, 2, 1] * cluster.n)


def test_without_a_pool_each_token_is_dealt_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[int] = []
    real_ahead = stepping.Stepping.ahead

    def ahead(by: stepping.Stepping, *args: Any, **kwargs: Any) -> Any:
        found = real_ahead(by, *args, **kwargs)
        fetched.append(len(found.digests))
        return found

    with InProcess(tmp_path, 2, replace(LIMITS, pool_mb=0)) as cluster:
        caller, text = cluster.caller(), token_ids(6)
        caller.deploy(CAPTURED.program, dict(CAPTURED.weights))
        monkeypatch.setattr(stepping.Stepping, "ahead", ahead)
        assert right(write(caller, text, 8).rest()[:-1], text)
        assert fetched == [1] * 7 * 2


def test_a_text_its_fork_and_its_end(cluster: InProcess) -> None:
    caller, text = cluster.caller(), token_ids(6)
    first = write(caller, text, 3)
    *found, end = first.rest()
    assert end is None and len(found) == 3 and right(found, text)
    fork = write(caller, [9, 8], 2, first.session, 4)
    assert right(fork.rest()[:-1], [*text[:4], 9, 8])
    again = write(caller, [found[2], 5], 1, first.session, 8)
    assert right(again.rest()[:-1], [*text, *found, 5])
    assert held(cluster) == [{first.session, fork.session, again.session}] * cluster.n
    assert list(slots(cluster).values()) == [6 + 2 + 2 + 1 + 2]
    for session in (first.session, fork.session, again.session):
        assert len(slots(cluster)) == 1
        caller.at_all("EndSession", [party_pb2.EndSessionRequest(session=session)] * cluster.n)
        wait_for(lambda session=session: not any(session in ids for ids in held(cluster)), 20)
    wait_for(lambda: not slots(cluster), 20)


def test_cancelling_leaves_what_was_taken_in_and_the_lane_goes_on(cluster: InProcess) -> None:
    caller, text, before = cluster.caller(), token_ids(5, 1), epoch(cluster)
    running = write(caller, text, 50)
    found = [token(running.step()) for _ in range(2)]
    running.cancel()
    wait_for(lambda: not any(len(p.inbox) for p in cluster.parties.values()), 20)
    assert held(cluster) == [{running.session}] * cluster.n
    more = write(caller, [found[1], 3], 1, running.session, len(text) + 1)
    assert right(more.rest()[:-1], [*text, *found, 3]) and epoch(cluster) is before


@pytest.mark.parametrize("where", [0, 1])
def test_a_request_that_is_lost_at_one_party_ends_at_all(cluster: InProcess, where: int) -> None:
    caller, before = cluster.caller(), epoch(cluster)
    running = write(caller, token_ids(5, 2), 50)
    assert running.step()[0].outputs
    running.cancel(where)
    others = [call for i, call in enumerate(running.calls) if i != where]
    running.calls = others
    if where:
        assert set(running.rest()[-1]) == {"AbortedError"}
    else:  # party 0 announces it no more
        wait_for(lambda: not len(cluster.parties[0].inbox), 20)
        running.cancel()
    wait_for(lambda: not any(len(p.inbox) for p in cluster.parties.values()), 20)
    assert write(caller, [1, 2]).rest()[-1] is None and epoch(cluster) is before


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("error", [BusyError("full"), ContextLengthError("too long")])
def test_a_session_that_one_party_refuses_is_nowhere(
    cluster: InProcess, where: int, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its limits may be its own: no party keeps what another one does not have."""
    caller, before = cluster.caller(), epoch(cluster)
    sessions = cluster.parties[where].lane._sessions

    def refusing(*_: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(sessions, "begin", refusing)
        for _ in range(LIMITS.max_sessions + 1):
            assert write(caller, [1, 2]).rest() == [[type(error).__name__] * cluster.n]
    assert held(cluster) == [set()] * cluster.n and not slots(cluster)
    assert write(caller, [1, 2]).rest()[-1] is None and epoch(cluster) is before


@pytest.mark.parametrize("strict", [0, 1])
def test_one_party_that_keeps_the_limit_of_an_owners_sessions_is_enough(
    cluster: InProcess, strict: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever it is, and whoever asks: the others have lost theirs here."""
    for index, party in cluster.parties.items():
        monkeypatch.setattr(party.lane._sessions, "_most_of_owner", 1 if index == strict else 64)
    running = write(cluster.caller(), [1, 2, 3], 40)
    assert running.step()[0].outputs
    refused = write(cluster.caller("client/bob"), [1, 2]).step()
    assert all(isinstance(e, BusyError) and "of this owner's models are in use" in str(e) for e in refused)
    assert held(cluster) == [{running.session}] * cluster.n
    running.cancel()


def test_a_session_that_is_forgotten_while_it_is_written_ends_its_request_only(cluster: InProcess) -> None:
    caller, before = cluster.caller(), epoch(cluster)
    running = write(caller, token_ids(5, 3), 50)
    assert running.step()[0].outputs
    real = [p.lane._sessions.idle for p in cluster.parties.values()][0]
    leader = cluster.parties[0].lane._sessions
    leader.idle = lambda *_: [running.session]  # type: ignore[method-assign]
    assert set(running.rest()[-1]) == {"NotFoundError"}
    leader.idle = real  # type: ignore[method-assign]
    assert held(cluster) == [set()] * cluster.n
    assert write(caller, [1, 2]).rest()[-1] is None and epoch(cluster) is before


def test_one_id_is_one_session(cluster: InProcess) -> None:
    caller = cluster.caller()
    each = requests(cluster.n, [1, 2])
    assert Streams(caller, each).rest()[-1] is None
    assert Streams(caller, each).rest() == [["ConflictError"] * cluster.n]
    assert held(cluster) == [{each[0].request_id}] * cluster.n


def test_parties_that_were_asked_for_other_texts_refuse(cluster: InProcess) -> None:
    caller, before = cluster.caller(), epoch(cluster)
    first = write(caller, [1, 2, 3])
    assert first.rest()[-1] is None
    dealt = slots(cluster)
    for change in (
        {"keep": 2}, {"parent": b"p" * 16}, {"max_new_tokens": 2}, {"temperature": 1}, {"top_k": 1},
        {"repetition_penalty": 5000}, {"version": 1},
    ):  # fmt: skip
        each = requests(cluster.n, [1, 2], 1, first.session, 1)
        for name, value in change.items():
            setattr(each[-1], name, value)
        assert set(Streams(caller, each).rest()[-1]) == {"AgreementError"}, change
    each = requests(cluster.n, [1, 2], 1, first.session, 1)
    each[-1].tokens.CopyFrom(tensor_pb2.Tensor(shape=[1, 3], ring_bits=64, data=bytes(24)))
    assert set(Streams(caller, each).rest()[-1]) == {"AgreementError"}
    assert slots(cluster) == dealt and epoch(cluster) is before
    assert held(cluster) == [{first.session}] * cluster.n


def test_another_caller_cannot_go_on_with_a_text(cluster: InProcess) -> None:
    caller, eve = cluster.caller("client/bob"), cluster.caller("client/carol")
    first = write(caller, [1, 2, 3])
    first.rest()
    assert write(eve, [4], 1, first.session, 2).rest() == [["NotFoundError"] * cluster.n]
    assert write(eve, [4], 1, b"n" * 16, 2).rest() == [["NotFoundError"] * cluster.n]
    eve.at_all("EndSession", [party_pb2.EndSessionRequest(session=first.session)] * cluster.n)
    assert write(caller, [4], 1, first.session, 2).rest()[-1] is None


def test_sessions_end_with_the_epoch(cluster: InProcess) -> None:
    caller = cluster.caller()
    first = write(caller, [1, 2, 3])
    first.rest()
    for breaks in (lambda: cluster.crash(1), cluster.stop_dealer):
        wait = cluster.new_epoch()
        breaks()
        if cluster.dealer is None:
            cluster.start_dealer()
        else:
            cluster.start_party(1)
        wait()
        assert held(cluster) == [set()] * cluster.n and not slots(cluster)
        caller = cluster.caller()
        assert write(caller, [4], 1, first.session, 2).rest() == [["NotFoundError"] * cluster.n]
        first = write(caller, [1, 2, 3])
        assert first.rest()[-1] is None


def test_a_step_that_breaks_off_ends_the_epoch(cluster: InProcess) -> None:
    caller = cluster.caller()
    running = write(caller, [1, 2, 3], 50)
    assert running.step()[0].outputs
    gate = Gate(cluster.parties[1].lane)
    assert gate.reached.wait(30)
    wait = cluster.new_epoch()
    cluster.stop_dealer()
    cluster.start_dealer()
    epoch(cluster).close()
    gate.open.set()
    assert running.rest()[-1] is not None
    wait()
    assert held(cluster) == [set()] * cluster.n
    assert write(cluster.caller(), [1, 2]).rest()[-1] is None


def test_no_opening_of_texts_ever_repeats(cluster: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text over and over: forks, edits, cancels, sessions that are refused, other epochs."""
    opened: list[int] = []
    rows: list[bytes] = []
    real = stepping._exchange

    def exchange(current: Any, batch: Any, sealed: Any) -> Any:
        answers = real(current, batch, sealed)

        def noted() -> list[torch.Tensor]:
            values: list[torch.Tensor] = answers()
            if current.mesh.index == 0:
                for opening, value in zip(batch, values, strict=True):
                    if opening.ring.bits == 64:
                        opened.extend(value.reshape(-1).tolist())
                    if "RowMask" in opening.label:
                        rows.extend(bytes(r.numpy().tobytes()) for r in value.reshape(-1, value.shape[-1]))
            return values

        return noted

    monkeypatch.setattr(stepping, "_exchange", exchange)
    text = [3] * 4

    def texts(caller: Caller) -> None:
        first = write(caller, text, 2)
        first.rest()
        write(caller, [3], 1, first.session, 3).rest()
        write(caller, [3], 1, first.session, 3).rest()
        write(caller, [3], 1, b"n" * 16, 3).rest()
        cancelled = write(caller, [3], 50, first.session, 3)
        cancelled.step()
        cancelled.cancel()
        write(caller, text, 1).rest()

    texts(cluster.caller())
    wait = cluster.new_epoch()
    cluster.stop_dealer()
    cluster.start_dealer()
    wait()
    texts(cluster.caller())
    assert len(rows) > 50 and len(set(rows)) == len(rows)
    assert len(opened) > 5000 and len(set(opened)) == len(opened)
