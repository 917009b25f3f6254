"""The data owner's side of a text: what is remembered, when it ends, and what happens when the parties fail."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mpcinfer.client.writing as writing
from mpcinfer.client.data import Client
from mpcinfer.client.generation import Piece, Settings, StepCost
from mpcinfer.client.model import Model
from mpcinfer.client.writing import Answer, Known, Memory
from mpcinfer.errors import (
    AbortedError,
    BusyError,
    ContextLengthError,
    InputError,
    MpcInferError,
    NotFoundError,
    ProtocolError,
    UnavailableError,
)
from mpcinfer.models.vocabulary import Vocabulary
from mpcinfer.ring import prg
from mpcinfer.ring.domain import Z64
from mpcinfer.ring.sharing import combine
from mpcinfer.wire.v1 import party_pb2, tensor_pb2
from tests.client.fakes import info, spec

PARTIES = 3
LOGITS = [0.5, -1.25, 3.0]


def model(name: str = "m", version: int = 1, **more: Any) -> Model:
    ids, logits = spec("ids", 1, -1, frac_bits=0, limit=100.0), spec("logits", 1, 3)
    return Model.parse(info(name, [ids], [logits], version, **{"context": 40, "reveal": "tokens"} | more))


MODEL = model()


class Letters:
    """A tokenizer of letters: 0 is a."""

    def ids(self, text: str) -> torch.Tensor:
        return torch.tensor([ord(c) - 97 for c in text])

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(97 + i) for i in ids)


class FakeDetokenizer:
    def __init__(self, tokenizer: Any, tokens: Sequence[int]) -> None:
        self.tokenizer = tokenizer

    def feed(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))

    def flush(self) -> str:
        return ""


@dataclass
class FakeConnection:
    """Parties that answer with these tokens, one by one, after a part of the prompt; or fail, `failures` at a time."""

    tokens: list[int] = field(default_factory=list)
    failures: list[tuple[int, MpcInferError] | None] = field(default_factory=list)
    logits: bool = False
    tamper: Any = lambda step, answers: answers
    requests: list[list[Any]] = field(default_factory=list)
    forgotten: list[bytes] = field(default_factory=list)
    stopped: int = 0

    def __post_init__(self) -> None:
        self.cluster: Any = SimpleNamespace(n=PARTIES)
        self.identity: Any = None

    @contextmanager
    def stream(self, method: str, requests: Sequence[Any], *, timeout: float) -> Iterator[Any]:
        assert method == "Generate" and timeout > 0
        self.requests.append(list(requests))
        failure = self.failures.pop(0) if self.failures else None
        open_, here = [True], self

        def stop() -> None:
            here.stopped += open_[0]
            open_[0] = False

        def answers() -> Iterator[list[Any]]:
            for step, token in enumerate([None, *here.tokens]):
                if failure is not None and step == failure[0]:
                    raise failure[1]
                if not open_[0]:
                    raise AbortedError("cancelled")
                yield here.tamper(step, here._answers(token))

        try:
            yield answers(), stop
        finally:
            stop()

    def _answers(self, token: int | None) -> list[Any]:
        answers = []
        for i in range(PARTIES):
            cost = tensor_pb2.PhaseCost(seconds=1.0 + i, rounds=7, bytes_sent=100 + i, bytes_from_dealer=10 * i)
            outputs = []
            if token is not None:
                values = [torch.tensor([[token]])]
                values += [torch.tensor([LOGITS]).mul(65536).to(torch.int64)] * self.logits
                for x in values:
                    share = torch.full(x.shape, -7) if i else x + 7 * (PARTIES - 1)
                    outputs.append(tensor_pb2.Tensor(shape=x.shape, ring_bits=64, data=bytes(Z64.pack(share))))
            answers.append(party_pb2.GenerateResponse(taken=1, outputs=outputs, online=cost, offline=cost))
        return answers

    def proof(self, *_: Any) -> Any:
        """These parties sign nothing."""
        return SimpleNamespace(check=lambda answers: None)

    def forget_session(self, session: bytes) -> None:
        self.forgotten.append(session)

    def prompt(self, at: int = -1) -> list[int]:
        """What the parties were sent, added up."""
        shares = []
        for request in self.requests[at]:
            shape = tuple(request.tokens.shape)
            seed = request.tokens.seed
            shares.append(prg.expand(seed, shape, Z64) if seed else Z64.unpack(request.tokens.data, shape))
        found: list[int] = combine(shares, Z64)[0].tolist()
        return found


@pytest.fixture(autouse=True)
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "Detokenizer", FakeDetokenizer)


def answer(
    connection: FakeConnection, prompt: Sequence[int] = (1, 2, 3), memory: Memory | None = None, **how: Any
) -> Answer:
    stop, tokenizer = how.pop("end", ()), how.pop("tokenizer", Letters())
    of = how.pop("of", MODEL)
    settings = Settings(**{"max_new_tokens": 20} | how)
    return Answer(connection, memory or Memory(), of, tokenizer, prompt, settings, stop, 60.0)  # type: ignore[arg-type]


# --- memory --------------------------------------------------------------------------------------------------------


def known(id_: bytes, *tokens: int, of: Model = MODEL) -> Known:
    return Known(of, id_, tokens)


def test_the_session_that_shares_most_is_taken() -> None:
    memory = Memory()
    assert memory.longest(MODEL, [1, 2]) == (b"", 0)
    for each in (known(b"a", 1, 2, 3), known(b"b", 1, 2, 4, 5), known(b"c", 9)):
        assert memory.add(each) == []
    assert memory.longest(MODEL, [1, 2, 4, 5, 6]) == (b"b", 4)
    assert memory.longest(MODEL, [1, 2, 4, 5]) == (b"b", 3)  # a token is left to take in
    assert memory.longest(MODEL, [1, 2, 3, 7]) == (b"a", 3)
    assert memory.longest(MODEL, [1, 7]) == (b"a", 1)
    assert memory.longest(MODEL, [8]) == memory.longest(MODEL, [9]) == memory.longest(MODEL, []) == (b"", 0)
    for other in (model("other"), model(version=2), replace(MODEL, deployment_id="other")):
        assert memory.longest(other, [1, 2, 3, 4]) == (b"", 0)
    memory.drop(b"b")
    assert memory.longest(MODEL, [1, 2, 4, 5, 6]) == (b"a", 2)


def test_what_a_longer_text_contains_is_of_no_use_any_more() -> None:
    memory = Memory()
    memory.add(known(b"a", 1, 2))
    memory.add(known(b"b", 1, 3))
    memory.add(known(b"o", 1, of=model("other")))
    assert memory.add(known(b"c", 1, 2, 3)) == [b"a"]
    assert memory.add(known(b"d", 1, 2, 3)) == [b"c"]
    assert memory.longest(MODEL, [1, 3, 4]) == (b"b", 2)


def test_only_so_many_are_remembered() -> None:
    memory = Memory()
    stale = [memory.add(known(bytes([i]), i, i)) for i in range(20)]
    assert stale == [[]] * 16 + [[bytes([i])] for i in range(4)]
    assert memory.longest(MODEL, [0, 0, 1]) == (b"", 0) and memory.longest(MODEL, [4, 4, 1])[1] == 2


def test_texts_stay_out_of_reprs() -> None:
    memory = Memory()
    memory.add(known(b"a", 98765, 43210))
    assert "98765" not in repr(memory) + repr(known(b"a", 98765))


# --- answers -------------------------------------------------------------------------------------------------------


def test_an_answer_of_full_length() -> None:
    connection = FakeConnection([7, 4, 11, 11, 14])
    a = answer(connection, max_new_tokens=5, temperature=0.5, top_k=3, repetition_penalty=2.0)
    assert (a.finish, a.prompt_tokens, a.cached_tokens) == (None, 3, 0) and a.id.startswith("gen-")
    pieces = list(a)
    assert (a.text, a.tokens, a.finish) == ("hello", [7, 4, 11, 11, 14], "length")
    assert [p.text for p in pieces] == list("hello") and [p.token for p in pieces] == a.tokens
    assert pieces[0].cost == a.prompt_cost and a.prompt_cost.seconds_online == 3.0
    assert (a.prompt_cost.rounds, a.prompt_cost.bytes_sent_per_party, a.prompt_cost.bytes_sent_by_dealer) == (
        7,
        102,
        30,
    )
    assert [len(r) for r in pieces[0].received] == [8] * PARTIES
    assert connection.prompt() == [1, 2, 3] and len(connection.requests) == 1
    requests = connection.requests[0]
    assert len({r.request_id for r in requests}) == 1 and len(requests[0].request_id) == 16
    assert {(r.model, r.version, r.parent, r.keep, r.max_new_tokens) for r in requests} == {("o/m", 1, b"", 0, 5)}
    assert {(r.temperature, r.top_k, r.repetition_penalty) for r in requests} == {(2048, 3, 8192)}
    assert a.sent == tuple(r.tokens.seed or r.tokens.data for r in requests)
    with pytest.raises(InputError, match="once"):
        list(a)


def test_shares_are_fresh_for_every_request() -> None:
    connection = FakeConnection([1])
    for _ in range(2):
        list(answer(connection, max_new_tokens=1))
    first, second = connection.requests
    assert not {r.tokens.seed or r.tokens.data for r in first} & {r.tokens.seed or r.tokens.data for r in second}
    assert first[0].request_id != second[0].request_id


def test_a_token_that_ends_an_answer() -> None:
    connection = FakeConnection([7, 8, 25, 9])
    a = answer(connection, end=(25, 24))
    list(a)
    assert (a.text, a.tokens, a.finish) == ("hi", [7, 8, 25], "stop") and connection.stopped == 1


def test_a_text_that_ends_an_answer() -> None:
    connection = FakeConnection([7, 8, 23, 24, 9])
    a = answer(connection, stop=("xy",))
    assert [p.text for p in a] == ["h", "i", "", ""]
    assert (a.text, a.finish) == ("hi", "stop")
    a = answer(FakeConnection([7, 23]), stop=("xy",), max_new_tokens=2)
    list(a)
    assert (a.text, a.finish) == ("hx", "length")  # what was held back comes after all


def test_without_a_tokenizer_and_with_logits() -> None:
    a = answer(FakeConnection([1, 2], logits=True), tokenizer=None, max_new_tokens=2)
    list(a)
    assert (a.text, a.tokens) == ("", [1, 2]) and [x.tolist() for x in a.logits] == [LOGITS] * 2


@pytest.mark.parametrize("most", [0, -1])
def test_an_answer_has_a_token(most: int) -> None:
    with pytest.raises(InputError, match="at least 1"):
        answer(FakeConnection(), max_new_tokens=most)


@pytest.mark.parametrize(("length", "most", "fits"), [(21, 20, True), (22, 20, False), (40, 1, True), (41, 1, False)])
def test_a_text_fits_the_model(length: int, most: int, fits: bool) -> None:
    connection = FakeConnection()
    if fits:
        answer(connection, [1] * length, max_new_tokens=most)
    else:
        with pytest.raises(ContextLengthError, match="takes 40"):
            answer(connection, [1] * length, max_new_tokens=most)


# --- going on ------------------------------------------------------------------------------------------------------


def test_a_text_that_goes_on_is_not_sent_again() -> None:
    connection, memory = FakeConnection([4, 5]), Memory()
    first = answer(connection, [1, 2, 3], memory, max_new_tokens=2)
    list(first)
    second = answer(connection, [1, 2, 3, 4, 5, 6], memory, max_new_tokens=2)
    assert second.cached_tokens == 4 and second.prompt_tokens == 6  # nobody has asked the parties to take in the last
    list(second)
    assert connection.prompt() == [5, 6]
    request = connection.requests[1][0]
    assert (request.parent, request.keep) == (connection.requests[0][0].request_id, 4)
    assert connection.forgotten == [request.parent]
    edited = answer(connection, [1, 2, 9], memory, max_new_tokens=2)
    list(edited)
    assert edited.cached_tokens == 2 and connection.prompt() == [9] and len(connection.forgotten) == 1


def test_a_parent_that_is_gone_is_taken_in_anew() -> None:
    connection, memory = FakeConnection([4], [None, (0, NotFoundError("gone"))]), Memory()
    list(answer(connection, [1, 2, 3], memory, max_new_tokens=1))
    a = answer(connection, [1, 2, 3, 4], memory, max_new_tokens=1)
    assert a.cached_tokens == 3
    list(a)
    assert (a.tokens, a.cached_tokens) == ([4], 0) and connection.prompt() == [1, 2, 3, 4]
    assert connection.requests[2][0].request_id != connection.requests[1][0].request_id
    assert connection.requests[2][0].parent == b""


def test_a_parent_whose_memory_is_full_is_left() -> None:
    connection, memory = FakeConnection([4], [None, (0, ContextLengthError("session_mb"))]), Memory()
    list(answer(connection, [1, 2, 3], memory, max_new_tokens=1))
    list(answer(connection, [1, 2, 3, 4], memory, max_new_tokens=1))
    assert connection.prompt() == [1, 2, 3, 4] and connection.requests[2][0].parent == b""


def test_what_was_not_found_without_a_parent_is_said() -> None:
    for error in (NotFoundError("no model"), ContextLengthError("session_mb")):
        connection = FakeConnection([4], [(0, error)])
        with pytest.raises(type(error)):
            list(answer(connection))
        assert len(connection.requests) == 1


def test_a_request_that_broke_off_before_anything_came_is_sent_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(writing, "wait_until_ready", lambda *a, **k: waited.append(k["timeout"]))
    connection = FakeConnection([4], [(0, AbortedError("lost"))])
    a = answer(connection, max_new_tokens=1)
    list(a)
    assert a.tokens == [4] and len(waited) == 1 and connection.prompt() == [1, 2, 3]
    first, second = ({r.tokens.seed or r.tokens.data for r in each} for each in connection.requests)
    assert not first & second
    connection = FakeConnection([4], [(0, AbortedError("lost")), (0, AbortedError("again"))])
    with pytest.raises(AbortedError, match="again"):
        list(answer(connection))


def test_parties_that_do_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise UnavailableError("party/1 is down")

    monkeypatch.setattr(writing, "wait_until_ready", never)
    with pytest.raises(AbortedError, match=r"lost \(party/1 is down\)"):
        list(answer(FakeConnection([4], [(0, AbortedError("lost"))])))


@pytest.mark.parametrize("error", [AbortedError("lost"), BusyError("full"), UnavailableError("gone")])
def test_what_breaks_off_in_the_middle_is_not_repeated(error: MpcInferError) -> None:
    connection, memory = FakeConnection([4, 5, 6], [(2, error)]), Memory()
    a = answer(connection, memory=memory)
    with pytest.raises(type(error)):
        list(a)
    assert (a.tokens, a.finish) == ([4], None) and len(connection.requests) == 1


# --- cancelling ----------------------------------------------------------------------------------------------------


def test_cancelling_from_outside_and_by_leaving() -> None:
    connection, memory = FakeConnection([4, 5, 6, 7]), Memory()
    a = answer(connection, memory=memory)
    for piece in a:
        if piece.token == 5:
            a.cancel()
            a.cancel()
    assert (a.tokens, a.finish, connection.stopped) == ([4, 5], "cancelled", 1)
    assert memory.longest(MODEL, [1, 2, 3, 4, 5, 6])[1] == 4
    b = answer(connection, [9], memory)
    pieces = iter(b)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert (b.tokens, b.finish, connection.stopped) == ([4], "cancelled", 2)
    b.cancel()
    assert b.finish == "cancelled"


def test_cancelling_before_it_has_begun() -> None:
    connection = FakeConnection([4])
    a = answer(connection)
    a.cancel()
    assert list(a) == [] and a.finish == "cancelled" and not connection.requests


def test_cancelling_while_something_else_is_done_first() -> None:
    """As canaries are: then nothing of the text leaves."""
    connection, settings, asked = FakeConnection([4, 5, 6]), Settings(max_new_tokens=20), list[int]()
    first = Answer(connection, Memory(), MODEL, None, [7], settings, (), 60.0)  # type: ignore[arg-type]

    def cancelling(step: int, answers: list[Any]) -> list[Any]:
        asked.append(step)
        a.cancel()  # while the prompt is taken in
        return answers

    def before(answer: Answer) -> None:
        connection.tamper = cancelling
        assert answer.after(first) == []

    a = Answer(connection, Memory(), MODEL, Letters(), [1, 2, 3], settings, (), 60.0, before)  # type: ignore[arg-type]
    assert list(a) == [] and a.finish == "cancelled"
    assert first.finish == "cancelled" and asked == [0] and len(connection.requests) == 1


def test_what_is_done_first_begins_cancelled() -> None:
    connection, settings = FakeConnection([4]), Settings(max_new_tokens=20)
    first = Answer(connection, Memory(), MODEL, None, [7], settings, (), 60.0)  # type: ignore[arg-type]

    def before(answer: Answer) -> None:
        answer.cancel()
        assert answer.after(first) == []

    a = Answer(connection, Memory(), MODEL, Letters(), [1, 2, 3], settings, (), 60.0, before)  # type: ignore[arg-type]
    assert list(a) == [] and a.finish == first.finish == "cancelled" and not connection.requests


# --- parties that answer wrongly -------------------------------------------------------------------------------------


def damaged(step: int, answers: list[Any]) -> list[Any]:
    if answers[1].outputs:
        answers[1].outputs[0].data = b"short"
    return answers


def reshaped(step: int, answers: list[Any]) -> list[Any]:
    if answers[1].outputs:
        answers[1].outputs[0].shape[:] = [1]
    return answers


def missing(step: int, answers: list[Any]) -> list[Any]:
    if answers[1].outputs:
        del answers[1].outputs[:]
    return answers


def absent(step: int, answers: list[Any]) -> list[Any]:
    if answers[0].outputs:
        del answers[0].outputs[:]
    return answers


@pytest.mark.parametrize("tamper", [damaged, reshaped, missing, absent])
def test_damaged_answers(tamper: Any) -> None:
    with pytest.raises(ProtocolError, match="party/1"):
        list(answer(FakeConnection([4], tamper=tamper)))


@pytest.mark.parametrize("token", [-1, int(MODEL.inputs[0].limit)])
def test_shares_that_make_no_token(token: int) -> None:
    with pytest.raises(ProtocolError, match="no token"):
        list(answer(FakeConnection([token])))


def test_logits_that_one_party_leaves_out() -> None:
    def without(step: int, answers: list[Any]) -> list[Any]:
        del answers[0].outputs[1:]
        return answers

    with pytest.raises(ProtocolError, match="another number of outputs"):
        list(answer(FakeConnection([4], logits=True, tamper=without)))


def test_an_answer_that_ends_too_early() -> None:
    with pytest.raises(ProtocolError, match="before it was complete"):
        list(answer(FakeConnection([4, 5])))


# --- embeddings ----------------------------------------------------------------------------------------------------


def test_embed(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, vectors = spec("ids", -1, -2, frac_bits=0, limit=26.0), spec("vector", -1, 2)
    encoder = Model.parse(info("e", [ids], [vectors], vocabulary_digest=hashlib.sha256(b"v").digest()))
    client, batches = Client(None), []  # type: ignore[arg-type, var-annotated]

    def infer(name: str, x: torch.Tensor, **_: Any) -> torch.Tensor:
        batches.append(tuple(x.shape))
        return torch.stack([x.sum(1), x.amax(1)], 1).float()

    monkeypatch.setattr(client, "_model", lambda *_: encoder)
    monkeypatch.setattr(client, "_text", lambda *_: (Letters(), Vocabulary("")))
    monkeypatch.setattr(client, "infer", infer)
    found = client.embed("e", ["abc", "z", "b", "cba", "aaa"])
    assert [x.tolist() for x in found] == [[3, 2], [25, 25], [1, 1], [3, 2], [0, 0]]
    assert sorted(batches) == [(2, 1), (3, 3)]
    for wrong in (replace(encoder, vocabulary_digest=""), MODEL):
        monkeypatch.setattr(client, "_model", lambda *_, wrong=wrong: wrong)
        with pytest.raises(InputError, match="does not embed"):
            client.embed("e", ["a"])


def test_pieces_and_settings_do_not_print_what_is_private() -> None:
    piece = Piece("zebra", 4711, StepCost(0.0, 0.0, 1, 2, 3), (b"zebra",))
    assert not {"zebra", "4711"} & set(re.findall(r"\w+", repr(piece) + repr(Settings(stop=("zebra",)))))
