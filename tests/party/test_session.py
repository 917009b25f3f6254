"""Sessions: what a text is made of, who may go on with it, and when it is forgotten."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpcinfer.errors import BusyError, ConflictError, ContextLengthError, MpcInferError, NotFoundError
from mpcinfer.graph.program import Cache
from mpcinfer.party.session import Session, Sessions, first_rows, row_bytes
from mpcinfer.protocol.evidence import KeptMasks
from mpcinfer.protocol.session import TapeKeys
from mpcinfer.protocol.tracing import Plan
from mpcinfer.protocol.types import Cached, Shared

CACHES = (Cache("keys", (1, 2, 0, 4), 16, "k", 100), Cache("values", (1, 2, 0, 4), 16, "v", 100))
TAPE = b"t" * 16


def model(id_: bytes = b"d" * 32, owner: str = "owner/alice") -> Any:
    return SimpleNamespace(id=id_, owner=owner, program=SimpleNamespace(caches=CACHES, context=100))


MODEL = model()

MASKS = KeptMasks(TapeKeys(bytes(32), bytes(32)), Plan(()))


@dataclass
class Texts:
    """Sessions of one caller, by a letter each; the rows of a token are its number."""

    sessions: Sessions

    def begin(
        self,
        name: str,
        parent: str = "",
        keep: int = 0,
        more: int = 1,
        caller: str = "client/bob",
        of: Any = MODEL,
    ) -> Session:
        id_, origin = name.encode() * 16, parent.encode() * 16
        return self.sessions.begin(id_, caller, of, origin, keep, name.encode().upper() * 16, more)

    def take_in(self, session: Session, *tokens: int) -> None:
        new = torch.tensor([tokens])
        rows = new.reshape(1, 1, -1, 1).expand(1, 2, -1, 4)
        before = session.caches(128)
        grown = [
            Cached(c.name, torch.cat([old.share, rows], 2), torch.cat([old.masked, -rows], 2), 128, 16)
            for c, old in ((c, before[c.name]) for c in CACHES)
        ]
        session.grow(grown, Shared(new), MASKS)

    def end(self, *names: str) -> list[bytes]:
        return self.sessions.forget([name.encode() * 16 for name in names])


@pytest.fixture
def texts() -> Texts:
    return Texts(Sessions(most=4, megabytes=1, idle_seconds=50))


def held(session: Session) -> list[int]:
    """The tokens that a session's rows are of: the same in every cache, what was opened too."""
    found = session.caches(128)
    shares = [found[c.name].share[0, 1, :, 2].tolist() for c in CACHES]
    masked = [(-found[c.name].masked[0, 0, :, 3]).tolist() for c in CACHES]
    assert all(rows == shares[0] for rows in (*shares, *masked)) and session.tokens.tolist() == [shares[0]]
    assert session.length == len(shares[0])
    return list(shares[0])


def test_a_text_that_grows(texts: Texts) -> None:
    a = texts.begin("a")
    assert held(a) == [] and a.use().runs == () and a.use().count == 0 and a.slot.id == b"A" * 16
    texts.take_in(a, 1, 2, 3)
    texts.take_in(a, 4)
    assert held(a) == [1, 2, 3, 4] and a.use().runs == ((0, 4),) and a.use().count == 4
    assert all(cache.capacity == 128 for cache in a.caches(128).values())


def test_forks_share_what_they_keep_and_nothing_is_numbered_twice(texts: Texts) -> None:
    a = texts.begin("a")
    texts.take_in(a, 1, 2, 3)
    b, c = texts.begin("b", "a", 2), texts.begin("c", "a", 3)
    texts.take_in(b, 7, 8)
    texts.take_in(c, 9)
    texts.take_in(a, 4)
    texts.take_in(b, 6)
    d = texts.begin("d", "b", 3)
    texts.take_in(d, 5)
    assert [held(s) for s in (a, b, c, d)] == [[1, 2, 3, 4], [1, 2, 7, 8, 6], [1, 2, 3, 9], [1, 2, 7, 5]]
    assert (a.runs, b.runs, c.runs) == (((0, 3), (6, 7)), ((0, 2), (3, 5), (7, 8)), ((0, 3), (5, 6)))
    assert d.runs == ((0, 2), (3, 4), (8, 9)) and {s.use().count for s in (a, b, c, d)} == {9}
    assert len({id(s.slot) for s in (a, b, c, d)}) == 1


@pytest.mark.parametrize("keep", [-1, 4])
def test_no_more_can_be_kept_than_there_is(texts: Texts, keep: int) -> None:
    texts.take_in(texts.begin("a"), 1, 2, 3)
    with pytest.raises(NotFoundError, match="3 tokens"):
        texts.begin("b", "a", keep)
    assert len(texts.sessions) == 1


def test_nothing_may_be_kept(texts: Texts) -> None:
    texts.take_in(texts.begin("a"), 1, 2, 3)
    b = texts.begin("b", "a", 0)
    texts.take_in(b, 9)
    assert held(b) == [9] and b.runs == ((3, 4),)


def test_another_caller_and_another_model_learn_nothing_of_a_session(texts: Texts) -> None:
    """Not even whether there is one."""
    texts.take_in(texts.begin("a"), 1, 2, 3)

    def answer(name: str, caller: str = "client/bob", of: Any = MODEL) -> str:
        with pytest.raises(NotFoundError) as error:
            texts.sessions.begin(b"n" * 16, caller, of, name.encode() * 16, 2, TAPE, 1)
        return str(error.value)

    nothing = answer("z")
    assert answer("a", "client/eve") == answer("a", "owner/bob") == answer("a", of=model(b"e" * 32)) == nothing
    texts.sessions.end(b"a" * 16, "client/eve")
    texts.sessions._sessions[b"a" * 16].request.set_result(None)
    assert texts.sessions.idle() == []
    texts.sessions.end(b"a" * 16, "client/bob")
    texts.sessions.end(b"z" * 16, "client/bob")
    assert texts.sessions.idle() == [b"a" * 16]


def test_an_id_is_used_once(texts: Texts) -> None:
    texts.begin("a")
    with pytest.raises(ConflictError):
        texts.begin("a")


@pytest.mark.parametrize(("keep", "more", "fits"), [(3, 97, True), (3, 98, False), (0, 100, True), (0, 101, False)])
def test_as_many_tokens_as_the_model_takes(texts: Texts, keep: int, more: int, fits: bool) -> None:
    texts.take_in(texts.begin("a"), 1, 2, 3)
    if fits:
        texts.begin("b", "a", keep, more)
    else:
        with pytest.raises(ContextLengthError, match="the model takes 100"):
            texts.begin("b", "a", keep, more)
        assert len(texts.sessions) == 1


def test_rows_that_were_changed_take_memory_too(texts: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    assert row_bytes(MODEL.program) == 16 * 16 and texts.sessions.rows(MODEL.program) == 4096
    monkeypatch.setattr(texts.sessions, "rows", lambda program: 10)
    texts.take_in(texts.begin("a", more=8), *range(8))
    texts.begin("b", "a", 1, 2)
    with pytest.raises(ContextLengthError, match="session_mb"):
        texts.begin("c", "a", 1, 3)


def test_busy_when_all_are_being_worked_on(texts: Texts) -> None:
    sessions = [texts.begin(name) for name in "abcd"]
    with pytest.raises(BusyError):
        texts.begin("e")
    assert texts.sessions.idle() == []
    sessions[2].request.set_exception(MpcInferError("cancelled"))
    assert texts.sessions.idle() == [b"c" * 16]  # so that there is room again
    texts.end("c")
    texts.begin("e")


BOB, ALICE = "client/bob", "owner/alice"
CLARAS = model(b"c" * 32, "owner/clara")


def test_a_client_has_its_part_whoever_owns_the_models() -> None:
    texts = Texts(Sessions(most=4, megabytes=1, idle_seconds=50, most_of_caller=2))
    first = texts.begin("a")
    texts.begin("b", of=CLARAS)
    with pytest.raises(BusyError, match="2 sessions of yours are in use; end one"):
        texts.begin("c", of=CLARAS)
    texts.begin("d", caller="client/eve").request.set_result(None)
    assert texts.sessions.idle([(BOB, ALICE)]) == []  # Eve's rests, and makes no room for Bob's
    first.request.set_result(None)
    assert texts.sessions.idle([(BOB, ALICE)]) == [b"a" * 16]
    assert texts.sessions.idle([("client/eve", ALICE)]) == []
    texts.end("a")
    texts.begin("c")


def test_an_owner_has_his_part_whoever_asks_his_models() -> None:
    texts = Texts(Sessions(most=6, megabytes=1, idle_seconds=50, most_of_owner=2))
    first = texts.begin("a")
    second = texts.begin("b", caller="client/eve", of=model(b"e" * 32))  # another model of hers
    for caller in (BOB, "client/dan"):
        with pytest.raises(BusyError, match="2 sessions of this owner's models are in use.* end one of yours"):
            texts.begin("c", caller=caller)
    third = texts.begin("d", of=CLARAS)  # other owners have room
    third.request.set_result(None)
    assert texts.sessions.idle([(BOB, ALICE)]) == []  # and their texts stay
    for session in (first, second):
        session.request.set_result(None)
    assert texts.sessions.idle([(BOB, ALICE)]) == [b"a" * 16]
    assert texts.sessions.idle([(BOB, ALICE), ("client/dan", ALICE)]) == [b"a" * 16, b"b" * 16]
    assert texts.sessions.idle([(BOB, "owner/clara")]) == []
    texts.end("a")
    texts.begin("c", caller="client/dan")


def test_what_rested_longest_goes_first_and_all_that_rests_too_long(
    texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for name in "abc":
        session = texts.begin(name)
        session.touched = now[0] = now[0] + 10
        session.request.set_result(None)
    assert texts.sessions.idle() == []
    now[0] += 5
    texts.take_in(texts.sessions._sessions[b"a" * 16], 1)  # touched
    texts.begin("d")
    assert texts.sessions.idle() == [b"b" * 16]
    now[0] += 46
    assert texts.sessions.idle() == [b"b" * 16, b"c" * 16]
    now[0] += 50
    assert texts.sessions.idle() == [b"a" * 16, b"b" * 16, b"c" * 16]  # d is being worked on


def test_a_slot_is_left_when_the_last_of_its_sessions_is(texts: Texts) -> None:
    texts.take_in(texts.begin("a"), 1, 2)
    b = texts.begin("b", "a", 1)
    texts.begin("c")
    assert texts.end("a", "x") == []
    texts.take_in(b, 5)
    assert held(b) == [1, 5]
    assert texts.end("b") == [b"A" * 16]
    assert texts.end("c", "c") == [b"C" * 16] and len(texts.sessions) == 0


def test_an_epoch_that_ends_leaves_nothing(texts: Texts) -> None:
    texts.take_in(texts.begin("a"), 1)
    texts.sessions.end(b"a" * 16, "client/bob")
    texts.sessions.clear()
    assert len(texts.sessions) == 0 and texts.sessions.idle() == []
    with pytest.raises(NotFoundError):
        texts.begin("b", "a", 1)


def test_no_share_in_a_text_about_a_session(texts: Texts) -> None:
    a = texts.begin("a")
    texts.take_in(a, 987654321)
    a.token = Shared(torch.tensor([[987654321]]))
    assert "987654321" not in repr(replace(a)) + repr(a.slot) and "tensor" not in repr(a) + repr(a.slot)


def test_first_rows() -> None:
    runs = ((0, 3), (5, 6), (8, 10))
    assert [first_rows(runs, count) for count in range(7)] == [
        (),
        ((0, 1),),
        ((0, 2),),
        ((0, 3),),
        ((0, 3), (5, 6)),
        ((0, 3), (5, 6), (8, 9)),
        runs,
    ]
