"""Two tenants at once, under load: nothing that any process draws, holds or sends for one is there for the other.

The hardest case: both owners deploy the same weights, both clients send the same input, and their requests share
rounds. What is random must differ even so, in every word.
"""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mpcinfer.party.stepping as stepping
from mpcinfer.config import Limits
from mpcinfer.party.tape import Tape
from mpcinfer.protocol.correlation import fields_of
from mpcinfer.protocol.session import KeyChain, TapeKeys
from mpcinfer.ring import prg
from mpcinfer.ring.domain import Z64
from mpcinfer.wire.v1 import party_pb2
from tests.decoders_local import captured_decoder, tiny_decoder, token_ids
from tests.inprocess import Caller, InProcess, mlp, plain, random_weights, reveal
from tests.party.test_generation import Streams, requests

pytestmark = pytest.mark.timeout(240)

PROGRAM = mlp((4, 6, 3))
WEIGHTS = random_weights(PROGRAM)
X = torch.linspace(-2, 2, 12).reshape(3, 4)
TENANTS = {"client/bob": "m", "client/carol": "n"}
LOAD = 4  # requests of each, at once
LIMITS = Limits(step_timeout_s=60, connect_timeout_s=10, stop_grace_s=5, max_waiting_requests=32)


def _same_keys(self: KeyChain, tape: bytes, digest: bytes) -> TapeKeys:
    """The planted fault: a key chain that stays where it is."""
    return TapeKeys(prg.derive(self._key, "tape"), prg.derive(self._key, "kept"))


class Transcripts:
    """All that the parties draw, open, receive and answer, by sort: words of 64 bits, strings of 16 bytes or more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.words: dict[str, list[np.ndarray[Any, Any]]] = defaultdict(list)
        self.strings: dict[str, list[bytes]] = defaultdict(list)
        self.together = 0  # rounds that requests of both tenants shared
        shared_round, begin, following = stepping._shared_round, Tape.__init__, KeyChain.next
        here = self

        def round_(epoch: Any, rounds: Sequence[Any]) -> Callable[[], list[torch.Tensor]]:
            answers = shared_round(epoch, rounds)  # type: ignore[arg-type]
            openings = [opening for each in rounds for opening in each.openings]
            here.together += len({id(each.part) for each in rounds}) > 1

            def opened() -> list[torch.Tensor]:
                values = answers()
                for opening, value in zip(openings, values, strict=True):
                    here._take("sent", opening.ring, opening.masked)
                    if epoch.mesh.index == 0:
                        here._take("opened", opening.ring, value)
                return values

            return opened

        def drawn(self: Tape, id_: bytes, shares: Any, *more: Any) -> None:
            begin(self, id_, shares, *more)
            for item, tensors in shares.values():
                free, derived = fields_of(item)
                for name, tensor in tensors.items():
                    here._take("drawn", {**free, **derived}[name].ring, tensor)

        def key(self: KeyChain, tape: bytes, digest: bytes) -> TapeKeys:
            found = following(self, tape, digest)
            here.strings["tape"].append(tape)
            return found

        monkeypatch.setattr(stepping, "_shared_round", round_)
        monkeypatch.setattr(Tape, "__init__", drawn)
        monkeypatch.setattr(KeyChain, "next", key)

    def _take(self, sort: str, ring: Any, tensor: torch.Tensor) -> None:
        if ring == Z64:
            self.words[sort].append(tensor.contiguous().numpy().reshape(-1).copy())
        elif len(packed := bytes(ring.pack(tensor))) >= 16:
            self.strings[sort].append(packed)

    def message(self, sort: str, tensor: Any) -> None:
        """What a client was sent, or sent."""
        if tensor.seed:
            self.strings[sort].append(tensor.seed)
        else:
            self.words[sort].append(np.frombuffer(tensor.data, "<i8"))

    def repeated(self) -> set[str]:
        """The sorts in which anything occurs twice."""
        found = set()
        for sort, parts in self.words.items():
            every = np.concatenate(parts)
            assert len(every) >= 20, sort
            if len(np.unique(every)) < len(every):
                found.add(sort)
        # each tape is named to the chains of both parties and, twice, of the dealer
        tapes = self.strings.pop("tape")
        assert len(tapes) == 4 * len(set(tapes))
        return found | {sort for sort, parts in self.strings.items() if len(set(parts)) < len(parts)}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[InProcess]:
    with InProcess(tmp_path, 2, LIMITS) as running:
        for owner, name in (("owner/alice", "m"), ("owner/eve", "n")):
            answers = running.caller(owner).deploy(PROGRAM, WEIGHTS, name)
            assert [a.version for a in answers] == [1, 1]
        yield running


def load(cluster: InProcess, transcripts: Transcripts) -> None:
    """Requests of both tenants, all at once, all with the same input, all answered right."""
    callers = [(cluster.caller(client), name) for client, name in TENANTS.items() for _ in range(LOAD)]

    def ask(which: tuple[Caller, str]) -> tuple[list[Any], list[Any]]:
        caller, name = which
        messages = caller.inferences(X, name)
        return messages, caller.at_all("Infer", messages)

    with ThreadPoolExecutor(len(callers)) as pool:
        for messages, answers in pool.map(ask, callers):
            assert float((reveal(answers) - plain(WEIGHTS, X)).abs().max()) < 1e-3
            transcripts.strings["request"].append(messages[0].request_id)
            for message, answer in zip(messages, answers, strict=True):
                transcripts.message("uploaded", message.inputs[0])
                transcripts.message("answered", answer.outputs[0])


def test_nothing_is_shared(cluster: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    transcripts = Transcripts(monkeypatch)
    load(cluster, transcripts)
    load(cluster, transcripts)
    assert set(transcripts.words) == {"sent", "opened", "drawn", "uploaded", "answered"}
    assert transcripts.together, "no requests shared a round: this was no load"
    assert not transcripts.repeated()
    # the same weights, each under masks of its own
    masked = [
        torch.cat([w.masked.flatten() for w in model.weights.values()]).numpy()
        for model in cluster.parties[0].catalogue.models()
    ]
    assert len(masked) == 2 and not np.intersect1d(*masked).size


def test_a_key_that_serves_two_requests_is_noticed(cluster: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KeyChain, "next", _same_keys)
    transcripts = Transcripts(monkeypatch)
    load(cluster, transcripts)
    load(cluster, transcripts)
    assert {"sent", "opened", "drawn"} & transcripts.repeated() == {"sent", "opened", "drawn"}


def test_an_input_shared_from_one_seed_is_noticed(cluster: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpcinfer.ring.sharing.secrets.token_bytes", lambda n: b"\x07" * n)
    drawn = iter(range(1 << 20))
    monkeypatch.setattr("tests.inprocess.secrets.token_bytes", lambda n: next(drawn).to_bytes(n, "big"))
    messages = [cluster.caller("client/bob").inferences(X), cluster.caller("client/carol").inferences(X, "n")]
    transcripts = Transcripts(monkeypatch)
    for pair in messages:
        for message in pair:
            transcripts.message("uploaded", message.inputs[0])
    assert len(np.unique(np.concatenate(transcripts.words["uploaded"]))) <= X.numel() * 2


def test_a_session_is_of_no_use_to_another_client(cluster: InProcess) -> None:
    captured = captured_decoder(tiny_decoder(layers=1))
    assert [a.version for a in cluster.caller().deploy(captured.program, dict(captured.weights), "g")] == [1, 1]
    bob, carol = cluster.caller("client/bob"), cluster.caller("client/carol")

    def ask(caller: Caller, parent: bytes = b"", keep: int = 0) -> tuple[bytes, list[Any]]:
        each = requests(2, token_ids(3), 1, parent, keep)
        for message in each:
            message.model = "g"
        streams = Streams(caller, each)
        return streams.session, streams.rest()

    session, written = ask(bob)
    assert written[-1] is None
    for stranger in (carol, cluster.caller("owner/alice"), cluster.caller("owner/eve")):
        assert ask(stranger, session, 2)[1] == [["NotFoundError", "NotFoundError"]]
        unknown = ask(stranger, secrets.token_bytes(16), 2)[1]
        assert unknown == [["NotFoundError", "NotFoundError"]]  # no different from one that nobody has
    carol.at_all("EndSession", [party_pb2.EndSessionRequest(session=session)] * 2)
    assert ask(bob, session, 2)[1][-1] is None  # it is still there
