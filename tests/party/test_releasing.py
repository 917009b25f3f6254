"""Answers that leave with the votes of the next step, or never."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from mpcinfer.errors import TamperingError
from mpcinfer.party.inbox import Job
from mpcinfer.party.releasing import Answer, Releasing
from mpcinfer.party.waiting import Ballot
from mpcinfer.wire.v1 import tensor_pb2

VOTE = {"error": "", "text": "", "late": False, "upload": ""}
OUTPUTS = [tensor_pb2.Tensor(shape=[1], data=bytes(8))]


class Words:
    """What all state, without signatures: each states its subjects. `agree`: whether they find that it agrees."""

    def __init__(self, agree: bool = True) -> None:
        self.agree = agree
        self.stated: list[list[dict[str, Any]]] = []

    def statement(self, epoch: Any, subjects: list[dict[str, Any]]) -> tuple[dict[str, Any], Any]:
        self.stated.append(subjects)
        return {"subjects": subjects}, SimpleNamespace(to_json=lambda: {"subjects": subjects})

    def check(self, own: Mapping[str, Any], told: Mapping[int, bytes]) -> None:
        assert all(json.loads(each) == [own] for each in told.values())
        if not self.agree:
            raise TamperingError("they differ")

    def exchange(self, epoch: Any, subjects: list[dict[str, Any]]) -> None:
        own, _ = self.statement(epoch, subjects)
        self.check(own, {})


class Mesh:
    """All say what this one says."""

    bytes_sent = 0

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def consult(self, payload: bytes, merge: Any) -> dict[int, bytes]:
        self.messages.append(json.loads(payload))
        return {0: payload, 1: payload}


@pytest.fixture
def epoch() -> Any:
    return SimpleNamespace(mesh=Mesh())


def job() -> Job:
    return Job(b"i" * 16, "generate", "client/bob", {}, None, salt=b"s" * 32)


def answer(of: Job, number: int = 1) -> Answer:
    return Answer(of, {"tape": "bb", "deployment": "cc"}, OUTPUTS, number)


def ballots() -> list[Ballot]:
    return [Ballot(SimpleNamespace(sent=0), dict(VOTE))]  # type: ignore[arg-type]


def test_an_answer_leaves_with_the_votes_of_the_next_step(epoch: Any) -> None:
    words, left = Words(), list[bytes]()
    releasing = Releasing(words)  # type: ignore[arg-type]
    said = answer(job())
    releasing.later(said, left.append)
    assert not left and not epoch.mesh.messages
    assert releasing.count(epoch, ballots()) == [{0: VOTE, 1: VOTE}]
    assert left == [said.commitment()]
    assert words.stated == [[said.subject(said.commitment())]]
    assert epoch.mesh.messages == [[VOTE, [{"subjects": words.stated[0]}]]]
    releasing.count(epoch, ballots())  # nothing is stated twice
    assert len(words.stated) == 1 and epoch.mesh.messages[1] == [VOTE] and len(left) == 1


def test_what_was_put_off_is_stated_before_what_leaves_at_once(epoch: Any) -> None:
    words, left = Words(), list[bytes]()
    releasing = Releasing(words)  # type: ignore[arg-type]
    first, second = answer(job()), answer(job(), 2)
    releasing.later(first, left.append)
    now = second.subject(second.commitment())
    releasing.now(epoch, [now])
    assert words.stated == [[first.subject(first.commitment()), now]] and left == [first.commitment()]


@pytest.mark.parametrize("at_once", [False, True])
def test_nothing_leaves_if_anything_differs(epoch: Any, at_once: bool) -> None:
    releasing, asked, left = Releasing(Words(agree=False)), job(), list[bytes]()  # type: ignore[arg-type]
    releasing.later(answer(asked), left.append)
    with pytest.raises(TamperingError):
        releasing.now(epoch, []) if at_once else releasing.count(epoch, ballots())
    assert not left
    with pytest.raises(TamperingError):
        asked.result.result(0)
    releasing.count(epoch, ballots())  # nor later
    assert not left


def test_nothing_leaves_once_the_epoch_is_over(epoch: Any) -> None:
    words, left = Words(), list[bytes]()
    releasing = Releasing(words)  # type: ignore[arg-type]
    releasing.later(answer(job()), left.append)
    releasing.end()
    releasing.count(epoch, ballots())
    assert not left and not words.stated


def test_without_witnesses_nothing_is_waited_for() -> None:
    releasing, left = Releasing(None), list[bytes]()
    releasing.later(answer(job()), left.append)
    assert left == [b""] and not releasing.needed
