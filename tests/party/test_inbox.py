"""The queue of requests: order, limits, and who gets told what."""

from __future__ import annotations

import secrets
import threading
import time
from typing import Any

import pytest

from mpcinfer.errors import (
    AgreementError,
    BusyError,
    ConflictError,
    InputError,
    MpcInferError,
    ProtocolError,
    UnavailableError,
)
from mpcinfer.party.inbox import Inbox, Job


def job(action: str = "infer", caller: str = "client/bob", seconds: float = 60, **facts: Any) -> Job:
    return Job(secrets.token_bytes(16), action, caller, facts, None, time.monotonic() + seconds)


def test_first_come_first_served() -> None:
    inbox, jobs = Inbox(8), [job() for _ in range(5)]
    for one in jobs:
        inbox.put(one)
    assert len(inbox) == 5
    assert [inbox.next(0) for _ in range(6)] == [*jobs, None]


def test_next_waits_for_a_request_and_wakes() -> None:
    inbox, one = Inbox(8), job()
    threading.Timer(0.1, inbox.put, [one]).start()
    threading.Timer(0.05, inbox.wake).start()
    assert inbox.next(20) is one
    began = time.monotonic()
    assert inbox.next(0.05) is None and time.monotonic() - began < 10


def test_whoever_has_gone_has_an_answer_or_has_no_time_left_is_passed_over() -> None:
    inbox = Inbox(8)
    gone, answered, late, one = job(), job(), job(seconds=-1), job()
    for each in (gone, answered, late, one):
        inbox.put(each)
    inbox.discard(gone)
    answered.fail(MpcInferError("x"))
    assert inbox.next(0) is one


def test_limits_and_ids() -> None:
    inbox, one = Inbox(2), job()
    inbox.put(one)
    with pytest.raises(ConflictError, match="new id"):
        inbox.put(Job(one.id, "infer", "client/eve", {}, None, one.deadline))
    with pytest.raises(InputError, match="16"):
        inbox.put(Job(b"short", "infer", "client/bob", {}, None, one.deadline))
    inbox.put(job())
    with pytest.raises(BusyError):
        inbox.put(job())
    inbox.discard(one)
    inbox.put(one)


def test_a_stranger_with_the_same_id_cannot_discard() -> None:
    inbox, one = Inbox(8), job()
    inbox.put(one)
    inbox.discard(Job(one.id, "infer", "client/eve", {}, None))
    assert len(inbox) == 1


def test_match_finds_waits_and_compares() -> None:
    inbox, one = Inbox(8), job(model="m", version=0)
    assert inbox.match(one.id, one.digest(), 0.01) is None
    threading.Timer(0.1, inbox.put, [one]).start()
    assert inbox.match(one.id, one.digest(), 20) is one
    with pytest.raises(AgreementError):
        inbox.match(one.id, "other", 0)
    with pytest.raises(AgreementError):  # whoever sent it here is told too
        one.result.result(0)


def test_what_all_have_agreed_to_is_not_announced_again() -> None:
    inbox, one = Inbox(8), job()
    inbox.put(one)
    assert inbox.match(one.id, one.digest(), 0) is one
    one.taken = True
    with pytest.raises(ProtocolError, match="twice"):
        inbox.match(one.id, one.digest(), 0)


def test_a_request_that_is_late_elsewhere_lets_others_pass_and_is_given_up_in_the_end() -> None:
    inbox, late, other = Inbox(8), job(), job()
    inbox.put(late)
    assert inbox.next(0) is late
    inbox.postpone(late)
    inbox.put(other)
    assert inbox.next(0) is other
    assert inbox.next(5) is late
    assert not inbox.overdue(late)
    late.first_announced -= 60
    assert inbox.overdue(late) and not inbox.overdue(other)


def test_what_has_begun_to_arrive_is_expected() -> None:
    inbox = Inbox(8)
    with inbox.arriving(b"i" * 16):
        assert inbox.expects(b"i" * 16) and not inbox.expects(b"j" * 16)
    assert not inbox.expects(b"i" * 16)


def test_an_upload_may_be_late_as_long_as_its_caller_waits() -> None:
    inbox, upload = Inbox(8), job(action="deploy")
    inbox.put(upload)
    upload.first_announced = time.monotonic() - 10
    inbox.postpone(upload)
    assert not upload.result.done() and inbox.next(5) is upload


@pytest.mark.parametrize(
    "change",
    [
        {"action": "remove"},
        {"caller": "client/eve"},
        {"facts": {"model": "m", "version": 1}},
        {"facts": {"model": "m", "version": 0, "shapes": [[1, 4]]}},
        {"id": bytes(16)},
    ],
)
def test_everything_public_is_compared(change: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"id": b"i" * 16, "action": "infer", "caller": "client/bob"}
    fields["facts"] = {"model": "m", "version": 0}
    assert Job(**fields, content=1).digest() == Job(**fields, content=2, deadline=3).digest()
    assert Job(**fields, content=1).digest() != Job(**{**fields, **change}, content=1).digest()


def test_an_answer_is_given_once() -> None:
    one = job()
    one.succeed(1)
    one.succeed(2)
    one.fail(MpcInferError("late"))
    assert one.result.result(0) == 1


def test_abort_answers_what_waits_and_close_refuses_the_rest() -> None:
    inbox, jobs = Inbox(8), [job(), job()]
    for one in jobs:
        inbox.put(one)
    inbox.abort(UnavailableError("a"))
    for one in jobs:
        with pytest.raises(UnavailableError):
            one.result.result(0)
    inbox.put(last := job())
    inbox.close(UnavailableError("stopping"))
    with pytest.raises(UnavailableError, match="stopping"):
        last.result.result(0)
    with pytest.raises(UnavailableError, match="stopping"):
        inbox.put(job())
    assert inbox.next(20) is None


def test_a_share_stays_out_of_the_representation() -> None:
    assert "canary" not in repr(Job(bytes(16), "infer", "client/bob", {}, "canary"))
