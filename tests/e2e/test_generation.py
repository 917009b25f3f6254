"""A language model that writes under encryption, by processes over mutual TLS: what clients get, and nobody else."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from mpcinfer import Client, ModelOwner
from mpcinfer.client.cluster import Connection
from mpcinfer.client.local import LocalCluster
from mpcinfer.client.writing import Answer
from mpcinfer.errors import (
    AbortedError,
    BusyError,
    ContextLengthError,
    InputError,
    MpcInferError,
    NotFoundError,
    UnavailableError,
)
from mpcinfer.models.decoder import Decoder
from mpcinfer.ring import prg
from mpcinfer.ring.domain import Z64
from mpcinfer.wire import channel
from mpcinfer.wire.v1 import party_pb2, tensor_pb2
from tests.decoders_local import captured_decoder, plain_logits, tiny_decoder, token_ids
from tests.inprocess import wait_for
from tests.scanner import Needles, files_below, open_files, read_memory, scan_files

ERROR = 2e-3
SESSIONS = 6
MANY = 4  # runs of a tensor's numbers in a row

pytestmark = pytest.mark.timeout(300)


@dataclass
class Scene:
    """A running cluster with a tiny random decoder, once as "tiny" and once, revealing tokens only, as "closed"."""

    cluster: LocalCluster
    model: Decoder

    def client(self, name: str = "bob") -> Client:
        return Client.connect(self.cluster.cluster_path, f"client/{name}")

    def right(self, answer: Answer, prompt: Sequence[int]) -> bool:
        """Whether an answer is the greedy one, its logits too."""
        text = list(prompt)
        assert len(answer.logits) == len(answer.tokens) > 0
        for token, logits in zip(answer.tokens, answer.logits, strict=True):
            expected = plain_logits(self.model, text)
            assert float((logits - expected).abs().max()) < ERROR
            assert float(expected.max() - expected[token]) < 2 * ERROR
            text.append(token)
        return True

    def status(self) -> list[Any]:
        with self.client() as bob:
            return bob.status()


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids=lambda n: f"n={n}")
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    cluster = LocalCluster(
        tmp_path_factory.mktemp("generation") / "local",
        parties=request.param,
        clients=["bob", "eve"],
        limits={"max_sessions": SESSIONS, "step_timeout_s": 60.0, "connect_timeout_s": 5.0},
        log_level="debug",
    )
    model = tiny_decoder(context=96)
    try:
        cluster.start(timeout=120)
        with ModelOwner.connect(cluster.cluster_path) as owner:
            for name, reveal in (("tiny", "logits"), ("closed", "tokens")):
                owner.upload(captured_decoder(model, reveal), name=name)
        yield Scene(cluster, model)
    finally:
        cluster.stop()


@pytest.fixture
def bob(scene: Scene) -> Iterator[Client]:
    with scene.client() as client:
        yield client


def test_an_answer_and_what_follows_it(scene: Scene, bob: Client) -> None:
    text = token_ids(40)
    answer = bob.generate("tiny", text, max_new_tokens=4)
    pieces = list(answer)
    assert [p.token for p in pieces] == answer.tokens and scene.right(answer, text)
    assert (answer.finish, answer.cached_tokens, answer.prompt_tokens) == ("length", 0, 40)
    assert answer.prompt_cost.rounds > 0  # of a prompt's first part, which no token was chosen after
    assert all(p.cost.rounds > 0 and len(set(p.received)) == scene.cluster.cluster.n for p in pieces)
    more = [*text, *answer.tokens, 3, 4]
    followed = bob.generate("tiny", more, max_new_tokens=3, stream=False)
    assert followed.cached_tokens == 43 and scene.right(followed, more)
    edited = [*text[:20], 7, 8, 9]
    other = bob.generate("tiny", edited, max_new_tokens=3, stream=False)
    assert other.cached_tokens == 20 and scene.right(other, edited)
    again = bob.generate("tiny", [*more, *followed.tokens, 5], max_new_tokens=2, stream=False)
    assert again.cached_tokens == len(more) + 2  # the edit has left the text it was made of as it was
    assert scene.right(again, [*more, *followed.tokens, 5])


@pytest.mark.slow
def test_answers_of_one_beginning_at_the_same_time(scene: Scene, bob: Client) -> None:
    text = token_ids(9, 1)
    assert scene.right(bob.generate("tiny", text, max_new_tokens=1, stream=False), text)
    texts = [[*text, i] for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda t: bob.generate("tiny", t, max_new_tokens=3, stream=False), texts))
    assert all(map(scene.right, answers, texts)) and [a.cached_tokens for a in answers] == [9] * 3


def test_texts_of_two_clients_at_the_same_time(scene: Scene) -> None:
    """Evaluated in one run as far as they can be: each is right, and each client has its own."""
    texts = [token_ids(9, 1), token_ids(4, 2), token_ids(20, 3), token_ids(9, 4)]

    def ask(which: tuple[int, list[int]]) -> Answer:
        i, text = which
        with scene.client(("bob", "eve")[i % 2]) as client:
            return client.generate("tiny", text, max_new_tokens=6, stream=False)

    with ThreadPoolExecutor(len(texts)) as pool:
        answers = list(pool.map(ask, enumerate(texts)))
    assert all(map(scene.right, answers, texts)) and all(len(a.tokens) == 6 for a in answers)


@pytest.mark.slow
def test_chance_and_penalties(bob: Client) -> None:
    text = token_ids(5, 2)
    greedy = bob.generate("closed", text, max_new_tokens=3, stream=False).tokens
    drawn = [bob.generate("closed", text, max_new_tokens=3, stream=False, temperature=4.0).tokens for _ in range(3)]
    assert len({tuple(t) for t in [*drawn, greedy]}) > 1
    assert bob.generate("closed", text, max_new_tokens=3, stream=False, temperature=4.0, top_k=1).tokens == greedy
    assert len(bob.generate("closed", text, max_new_tokens=2, stream=False, repetition_penalty=8.0).tokens) == 2


def test_logits_leave_only_where_the_owner_says_so(scene: Scene, bob: Client) -> None:
    text = token_ids(6, 3)
    answer = bob.generate("closed", text, max_new_tokens=2, stream=False)
    assert answer.logits == [] and answer.tokens == bob.generate("tiny", text, max_new_tokens=2, stream=False).tokens
    answers = raw(scene, "bob", "closed", [1, 2])
    assert [len(a.outputs) for party in answers for a in party] == [1] * len(answers)


def test_cancelling_frees_the_lane_and_what_was_taken_in_stays(scene: Scene, bob: Client) -> None:
    text = token_ids(12, 4)
    answer = bob.generate("tiny", text, max_new_tokens=80)
    for i, _ in enumerate(answer):
        if i == 1:
            answer.cancel()
    assert answer.finish == "cancelled" and 2 <= len(answer.tokens) < 80
    wait_for(lambda: all(s.requests_waiting == 0 for s in scene.status()), 20)
    for piece in bob.generate("tiny", token_ids(7, 5), max_new_tokens=80):
        assert piece.token >= 0
        break  # leaving is cancelling
    wait_for(lambda: all(s.requests_waiting == 0 for s in scene.status()), 20)
    followed = bob.generate("tiny", [*text, answer.tokens[0], 1], max_new_tokens=2, stream=False)
    assert followed.cached_tokens == 13 and scene.right(followed, [*text, answer.tokens[0], 1])


@pytest.mark.slow
def test_more_texts_than_are_kept(scene: Scene, bob: Client) -> None:
    """The oldest are forgotten, and taken in anew when needed."""
    texts = [[i, *token_ids(3, 6)] for i in range(SESSIONS + 1)]
    for text in texts:
        assert scene.right(bob.generate("tiny", text, max_new_tokens=1, stream=False), text)
    text = [*texts[0], 1]
    answer = bob.generate("tiny", text, max_new_tokens=1, stream=False)
    assert answer.cached_tokens == 0 and scene.right(answer, text)


def test_refusals(bob: Client) -> None:
    for error, call in {
        ContextLengthError: lambda: bob.generate("tiny", token_ids(50), max_new_tokens=48),
        NotFoundError: lambda: bob.generate("none", [1]),
        InputError: lambda: bob.generate("tiny", "a text"),
    }.items():
        with pytest.raises(error):
            call()
    for wrong in ([], [50], [-1]):
        with pytest.raises(MpcInferError):
            bob.generate("tiny", wrong)
    with pytest.raises(InputError, match="language model"):
        bob.infer("tiny", torch.tensor([[1, 2]]))


# --- at the level of messages --------------------------------------------------------------------------------------


def raw(
    scene: Scene, who: str, model: str, tokens: Sequence[int], parent: bytes = b"", keep: int = 0, **more: Any
) -> list[Any]:
    """The answers of all parties to a request, or errors."""
    session = secrets.token_bytes(16)
    with Connection.to(scene.cluster.cluster_path, f"client/{who}") as connection:
        n = connection.cluster.n

        def one(index: int) -> Any:
            share = torch.tensor([list(tokens)]) * (index == 0)
            request = party_pb2.GenerateRequest(
                **{"request_id": session, "model": model, "parent": parent, "keep": keep, "max_new_tokens": 1} | more,
                tokens=tensor_pb2.Tensor(shape=share.shape, ring_bits=64, data=share.numpy().tobytes()),
            )
            link = connection._links[index]
            assert link is not None
            try:
                return list(link.stub.Generate(request, timeout=60))
            except grpc.RpcError as error:
                return channel.from_rpc_error(error, f"party/{index}")

        with ThreadPoolExecutor(n) as pool:
            return list(pool.map(one, range(n)))


def test_a_session_of_another_client_is_refused_as_if_it_were_not_there(scene: Scene, bob: Client) -> None:
    text = token_ids(6, 7)
    answer = bob.generate("tiny", text, max_new_tokens=2, stream=False)

    def refused(who: str, model: str, parent: bytes) -> list[str]:
        answers = raw(scene, who, model, [1], parent, 3)
        assert all(type(a) is NotFoundError for a in answers), answers
        return [str(a) for a in answers]

    stolen = refused("eve", "tiny", answer._session)
    assert stolen == refused("eve", "tiny", b"n" * 16) == refused("bob", "closed", answer._session)
    with Connection.to(scene.cluster.cluster_path, "client/eve") as eve:
        eve.call("EndSession", [party_pb2.EndSessionRequest(session=answer._session)] * eve.cluster.n, timeout=10)
    assert not [a for a in raw(scene, "bob", "tiny", [1], answer._session, 3) if isinstance(a, Exception)]


def test_requests_that_should_not_be(scene: Scene) -> None:
    for more, tokens, kind in (
        ({"keep": 1}, [1], "InputError"),
        ({"top_k": 1 << 24}, [1], "InputError"),
        ({"temperature": 1 << 20}, [1], "InputError"),
        ({"repetition_penalty": 1}, [1], "InputError"),
        ({"max_new_tokens": 97}, [1], "ContextLengthError"),
        ({"max_new_tokens": 1 << 31}, [1], "ContextLengthError"),
        ({}, [], "ShapeError"),
        ({"request_id": b"short"}, [1], "InputError"),
        ({"parent": b"x" * 16, "keep": 1 << 31}, [1], "ContextLengthError"),
    ):
        answers = raw(scene, "bob", "tiny", tokens, **more)  # type: ignore[arg-type]
        assert {type(a).__name__ for a in answers} == {kind}, (more, answers)


def test_a_text_may_be_taken_in_only(scene: Scene) -> None:
    answers = raw(scene, "bob", "tiny", token_ids(40), max_new_tokens=0)
    assert [[(a.taken, len(a.outputs)) for a in party] for party in answers] == [[(32, 0), (40, 0)]] * len(answers)


# --- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", [pytest.param(role, marks=pytest.mark.slow) for role in ("party/1", "dealer")])
def test_a_process_that_dies_in_the_middle(scene: Scene, bob: Client, role: str) -> None:
    text = token_ids(8, 8)
    answer = bob.generate("tiny", text, max_new_tokens=80, timeout=60)
    began = 0.0
    with pytest.raises((AbortedError, UnavailableError)):
        for i, _ in enumerate(answer):
            if i == 1:
                scene.cluster.kill(role)
                began = time.monotonic()
    assert began and time.monotonic() - began < 30 and answer.finish is None
    scene.cluster.restart(role)
    wait_for(lambda: all(s.state == "ready" for s in scene.status()))
    more = [*text, answer.tokens[0], 1]
    followed = bob.generate("tiny", more, max_new_tokens=2, stream=False)
    assert followed.cached_tokens == 0 and scene.right(followed, more)  # what was kept is gone with the epoch


# --- nothing in the clear --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_share_and_no_token_leaves_memory(scene: Scene, bob: Client) -> None:
    """Nothing of a prompt or an answer in logs, stores, open files and status; nothing in the clear in any memory."""
    model = scene.model
    text = [int(i) for i in torch.randperm(50, generator=torch.Generator().manual_seed(9))[:24]]
    answer = bob.generate("tiny", text, max_new_tokens=8, stream=False)
    plain, shares = Needles(), Needles()
    plain.add_integers("prompt", torch.tensor(text))
    plain.add_integers("logits", torch.stack([(x * 65536).round().to(torch.int64) for x in answer.logits]))
    plain.add_reals("logits", torch.stack(answer.logits))
    for name, parameter in model.named_parameters():
        plain.add_reals(f"weight {name}", parameter)
    # token ids are small numbers, so only a sequence of them is anything to look for
    numbers = [np.array(ids, kind) for ids in (text, answer.tokens) for kind in ("<i8", "<i4", "<i2")]
    sequences = [ids[start : start + 6].tobytes() for ids in numbers for start in range(0, len(ids) - 5, 8)]
    assert any(
        sequences[0] in block.tobytes() for block in read_memory(os.getpid(), everything=False)
    )  # those who look, find
    for index, sent in enumerate(answer.sent):
        shares.add_raw(f"party/{index}'s share of the prompt, as it was sent", sent)
        last = index == len(answer.sent) - 1
        share = Z64.unpack(sent, (24,)) if last else prg.expand(sent, (24,), Z64)
        shares.add_integers(f"party/{index}'s share of the prompt", share)
    both = plain | shares
    for role in scene.cluster.logs:
        found = scan_files([*open_files(scene.cluster.pid(role)), scene.cluster.logs[role]], both)
        assert not found, (role, found)
        for block in read_memory(scene.cluster.pid(role), everything=False):
            # two small numbers side by side lie about by chance: of a tensor many runs would be found
            assert not [label for label, count in plain.in_bytes(block).items() if count >= MANY], role
            held = block.tobytes()
            assert not any(sequence in held for sequence in sequences), role
    stores = [scene.cluster.directory / f"party-{i}-store" for i in range(scene.cluster.cluster.n)]
    assert not scan_files([path for store in stores for path in files_below(Path(store))], both)
    said = "\n".join(map(str, scene.status()))
    assert "tiny" in said and not both.in_text(said)


@pytest.mark.slow
def test_too_many_at_a_time_are_told_so(scene: Scene, bob: Client) -> None:
    running = [bob.generate("tiny", [i, 2, 3], max_new_tokens=60) for i in range(SESSIONS)]
    try:
        pieces = [iter(answer) for answer in running]  # which end with what holds them
        with ThreadPoolExecutor(SESSIONS) as pool:
            assert all(pool.map(lambda each: next(each).token >= 0, pieces))
            with pytest.raises(BusyError):
                bob.generate("tiny", [40, 2, 3], max_new_tokens=1, stream=False)
    finally:
        for answer in running:
            answer.cancel()
    wait_for(lambda: all(s.requests_waiting == 0 for s in scene.status()), 30)
    text = [41, 2, 3]
    assert scene.right(bob.generate("tiny", text, max_new_tokens=1, stream=False), text)
