"""Canaries against parties that look for them, parties that tamper, and sets that are not what they seem.

Stated guarantee: a tampered request is caught with probability p q, p being the rate of canaries and q the chance that
what was done to the request changes a canary's answer beyond its tolerance.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mpcinfer.client.audit as audit_module
import mpcinfer.client.data as data_module
import mpcinfer.client.writing as writing_module
import mpcinfer.party.stepping as stepping
from mpcinfer.client.audit import Audit
from mpcinfer.client.cluster import Connection
from mpcinfer.client.data import Client
from mpcinfer.client.generation import Settings
from mpcinfer.client.model import Model
from mpcinfer.client.writing import Answer, Memory
from mpcinfer.errors import MpcInferError, SignatureError, TamperingError
from mpcinfer.protocol.context import Opening
from mpcinfer.ring import prg
from mpcinfer.ring.domain import Z64
from mpcinfer.ring.sharing import combine
from mpcinfer.trust import canaries
from mpcinfer.trust.canaries import CanarySet, Example, Text
from mpcinfer.trust.signing import Signed, Signer
from mpcinfer.wire.v1 import party_pb2, tensor_pb2
from tests.client.fakes import FakeCluster, info, spec
from tests.client.fakes import running as running_fakes
from tests.inprocess import InProcess, mlp, plain, random_weights

PARTIES = 3
ONE = 65536
ROWS = Model.parse(info("m", [spec("x", -1, 3)], [spec("y", -1, 3)]))
WRITES = Model.parse(
    info("m", [spec("ids", 1, -1, frac_bits=0, limit=100.0)], [spec("l", 1, 3)], context=40, reveal="tokens")
)
CANARY, OWN = torch.tensor([[7.0, 7.0, 7.0]]), torch.tensor([[1.0, -2.0, 3.0]])


def canary_set(model: Model) -> CanarySet:
    example = Example(((CANARY * ONE).long(),), ((CANARY * ONE).long(),))
    whose = model.name, model.version, model.deployment_id, model.owner
    return CanarySet(*whose, (100,), (example,), (Text((7, 7, 7), (5, 5, 5, 5)),))


@dataclass
class Wire:
    """All that the parties of a client see, in order, under a clock of its own; they answer with the input."""

    model: Model
    seen: list[tuple[float, list[Any]]] = field(default_factory=list)  # the time that a caller allows, the messages
    forgotten: list[bytes] = field(default_factory=list)
    now: float = 0.0
    cluster: Any = field(default_factory=lambda: SimpleNamespace(n=PARTIES))
    identity: Any = None

    def models(self, name: str, timeout: float) -> list[Model]:
        self.now += 0.25
        return [self.model]

    def call(self, method: str, requests: Sequence[Any], *, timeout: float) -> list[Any]:
        assert method == "Infer"
        self.now += 1.0
        self.seen.append((timeout, list(requests)))
        x = value([r.inputs[0] for r in requests])
        outputs = [x, torch.zeros_like(x), torch.zeros_like(x)]
        return [party_pb2.InferResponse(version=1, outputs=[tensor(output, frac_bits=16)]) for output in outputs]

    @contextmanager
    def stream(self, method: str, requests: Sequence[Any], *, timeout: float) -> Iterator[Any]:
        assert method == "Generate"
        self.seen.append((timeout, list(requests)))

        def answers() -> Iterator[list[Any]]:
            for _ in range(requests[0].max_new_tokens):
                self.now += 1.0
                tokens = [torch.tensor([[5]]), torch.zeros(1, 1).long(), torch.zeros(1, 1).long()]
                yield [party_pb2.GenerateResponse(outputs=[tensor(token)]) for token in tokens]

        yield answers(), lambda: None

    def proof(self, *_: Any) -> Any:
        """These parties sign nothing."""
        return SimpleNamespace(check=lambda answers: None)

    def forget_session(self, session: bytes) -> None:
        self.forgotten.append(session)

    def canaries(self) -> list[bool]:
        """Which of the requests were canaries, which only all parties together can tell."""
        part = "inputs" if self.model.context == 0 else "tokens"
        messages = [[getattr(r, part) for r in requests] for _, requests in self.seen]
        values = [value([m if part == "tokens" else m[0] for m in each]) for each in messages]
        return [bool((x == (7 if part == "tokens" else 7 * ONE)).all()) for x in values]


def value(shares: Sequence[Any]) -> torch.Tensor:
    """What all parties' shares add up to."""
    return combine(
        [prg.expand(s.seed, tuple(s.shape), Z64) if s.WhichOneof("content") == "seed" else unpacked(s) for s in shares],
        Z64,
    )


def unpacked(share: Any) -> torch.Tensor:
    return Z64.unpack(share.data, tuple(share.shape))


def tensor(x: torch.Tensor, frac_bits: int = 0) -> Any:
    return tensor_pb2.Tensor(shape=x.shape, ring_bits=64, frac_bits=frac_bits, data=bytes(Z64.pack(x)))


@pytest.fixture(params=["infer", "generate"])
def wire(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Wire:
    """Coins and choices from a seed, and a clock that only the parties' work moves on."""
    wire = Wire(ROWS if request.param == "infer" else WRITES)
    clock = SimpleNamespace(monotonic=lambda: wire.now)
    monkeypatch.setattr(data_module, "time", clock)
    monkeypatch.setattr(writing_module, "time", clock)
    generator = torch.Generator().manual_seed(5)
    coin = lambda limit: int(torch.randint(limit, (), generator=generator))  # noqa: E731
    monkeypatch.setattr(audit_module.secrets, "randbelow", coin)
    return wire


def ask(wire: Wire, rate: float, times: int) -> None:
    """Own requests of a client that audits; texts stop after their first token, as they may."""
    client = Client(wire)  # type: ignore[arg-type]
    audit = Audit(rate, canary_set(wire.model))
    for _ in range(times):
        if wire.model.context:
            answer = client.generate("m", [1, 2, 3], max_new_tokens=4, audit=audit)
            assert next(iter(answer)).token == 5
            answer.cancel()
        else:
            client.infer("m", OWN, audit=audit)


def surprise(labels: Sequence[bool], rate: float, classes: Sequence[object]) -> float:
    """Chi-square, in standard deviations above its mean, of the labels in each class against the stated rate."""
    statistic, groups = 0.0, 0
    for each in set(classes):
        here = [label for label, c in zip(labels, classes, strict=True) if c == each]
        if len(here) * min(rate, 1 - rate) >= 5:
            statistic += (sum(here) - rate * len(here)) ** 2 / (len(here) * rate * (1 - rate))
            groups += 1
    return (statistic - groups) / (2 * groups) ** 0.5


def worst(wire: Wire, rate: float) -> float:
    """What a party can know before a request: how many there were, what the last ones were, how long the burst is."""
    labels = wire.canaries()
    bursts, previous = [], [(labels[i - 2 : i]) for i in range(len(labels))]
    for i in range(len(labels)):
        bursts.append(bursts[-1] + 1 if i and labels[i - 1] else 0)
    histories: list[Sequence[object]] = [
        [0] * len(labels),
        [i % 2 for i in range(len(labels))],
        [i // 50 for i in range(len(labels))],
        [tuple(p) for p in previous],
        bursts,
    ]
    return max(surprise(labels, rate, classes) for classes in histories)


TIMES = 400


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_every_request_is_a_canary_with_probability_p_whatever_was_before(wire: Wire, rate: float) -> None:
    ask(wire, rate, TIMES)
    assert worst(wire, rate) < 5


def at_most_one(self: Audit) -> Iterator[None]:
    """The fault: the coin is tossed once for each own request."""
    yield from [None] * (audit_module.secrets.randbelow(audit_module._COIN) < self.rate * audit_module._COIN)


def test_a_rule_that_can_be_seen_through_is_noticed(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Audit, "_coins", at_most_one)
    ask(wire, 0.5, TIMES)
    assert worst(wire, 0.5) > 10


def visible(request: Any) -> tuple[bytes, int, bytes]:
    """What a party sees of a request: all that is no random number, the size of the whole, the random numbers."""
    rest = type(request)()
    rest.CopyFrom(request)
    drawn = rest.request_id + rest.salt
    rest.request_id, rest.salt = bytes(len(rest.request_id)), bytes(len(rest.salt))
    for x in rest.inputs if isinstance(rest, party_pb2.InferRequest) else [rest.tokens]:
        drawn += x.seed + x.data
        x.seed, x.data = (bytes(32), b"") if x.WhichOneof("content") == "seed" else (b"", bytes(len(x.data)))
    return rest.SerializeToString(), len(request.SerializeToString()), drawn


def distinguished(wire: Wire) -> set[str]:
    """By what the parties could tell canaries from other requests."""
    found, labels = set(), wire.canaries()
    assert 50 < sum(labels) < len(labels) - 50
    allowed = [{timeout for (timeout, _), canary in zip(wire.seen, labels, strict=True) if canary == c} for c in (0, 1)]
    if allowed[0] != allowed[1] or len(allowed[0]) > 1:
        found.add("time allowed")
    for party in range(PARTIES):
        views = [visible(requests[party]) for _, requests in wire.seen]
        if len({(plain, size) for plain, size, _ in views}) != 1:
            found.add("form")
        if len({drawn for *_, drawn in views}) != len(views):
            found.add("repetition")
        for canary in (False, True):
            drawn = b"".join(d for (*_, d), label in zip(views, labels, strict=True) if label == canary)
            counts = torch.bincount(
                torch.frombuffer(bytearray(drawn), dtype=torch.uint8).long(), minlength=256
            ).double()
            expected = len(drawn) / 256
            if float(((counts - expected) ** 2 / expected).sum()) > 255 + 6 * (2 * 255) ** 0.5:
                found.add("distribution")
    return found


def test_no_party_sees_a_difference(wire: Wire) -> None:
    ask(wire, 0.5, 120)
    assert not distinguished(wire)
    if wire.model.context:  # nothing is kept of any text, so none can be continued
        sessions = [requests[0].request_id for _, requests in wire.seen]
        assert wire.forgotten == sessions


def test_differences_would_be_seen(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    real = data_module.Client._audited

    def one_deadline(self: Client, model: Model, inputs: Any, timeout: float, audit: Audit) -> Any:
        deadline = wire.now + timeout
        for canary in audit.examples(model, inputs):
            self._answer(model, list(canary.inputs), deadline)
        return self._answer(model, inputs, deadline)

    monkeypatch.setattr(data_module.Client, "_audited", one_deadline)
    if wire.model.context:
        begin = Answer._streamed

        def late(self: Answer) -> Iterator[list[Any]]:
            self._deadline -= 2.5 * (self._prompt[0] == 7)
            return begin(self)

        monkeypatch.setattr(Answer, "_streamed", late)
    ask(wire, 0.5, 120)
    assert distinguished(wire) == {"time allowed"}
    monkeypatch.setattr(data_module.Client, "_audited", real)

    for _, requests in wire.seen:
        if value([getattr(r, "tokens", None) or r.inputs[0] for r in requests]).flatten()[0] in (7, 7 * ONE):
            requests[0].version = 9
    assert "form" in distinguished(wire)


@pytest.mark.parametrize("wire", ["generate"], indirect=True)
def test_what_is_kept_of_a_text_is_not_what_a_canary_begins_with(wire: Wire) -> None:
    """A text that is known to the parties from before would be no canary."""
    client = Client(wire)  # type: ignore[arg-type]
    for _ in client.generate("m", [1, 2], max_new_tokens=4):
        pass
    kept = client.generate("m", [1, 2, 5, 5, 6], max_new_tokens=4)
    assert kept.cached_tokens == 4
    found = replace(canary_set(WRITES), texts=(Text((7,) * 5, (5,) * 4),))
    audited = client.generate("m", [1, 2, 5, 5, 6], Settings(max_new_tokens=4), audit=Audit(0.5, found))
    assert audited.cached_tokens == 0 and isinstance(audited._memory, Memory)


def test_nothing_of_a_request_is_sent_after_an_alarm(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module.secrets, "randbelow", lambda limit: 0)
    found = canary_set(wire.model)
    wrong = Example(found.examples[0].inputs, (found.examples[0].outputs[0] + 101,))
    found = replace(found, examples=(wrong,), texts=(Text((7, 7, 7), (5, 5, 5, 6)),))
    client = Client(wire)  # type: ignore[arg-type]
    with pytest.raises(TamperingError, match="canary alarm: model 'm' version 1 .* has not been sent") as caught:
        if wire.model.context:
            client.generate("m", [1, 2, 3], max_new_tokens=4, audit=Audit(0.5, found), stream=False)
        else:
            client.infer("m", OWN, audit=Audit(0.5, found))
    assert wire.canaries() == [True] and "7" not in str(caught.value)


# --- sets that are not what they seem -------------------------------------------------------------------------------


@pytest.fixture
def world() -> Iterator[FakeCluster]:
    yield from running_fakes(2)


def test_a_forged_or_altered_set_is_refused(tmp_path: Path, world: FakeCluster) -> None:
    owner = world.issue("owner/o")
    signed = canaries.sign(Signer(owner), canary_set(ROWS))
    path = tmp_path / "canaries.json"
    canaries.write(signed, path)
    assert canaries.read(path, world.cluster).owner == "owner/o"

    def refused(changed: Signed, match: str | None = None) -> None:
        with pytest.raises(SignatureError, match=match):
            canaries.opened(changed, world.cluster)

    for name in ("payload", "key", "binding", "signature"):
        raw = getattr(signed, name)
        for at in range(0, len(raw), max(1, len(raw) // 40)):
            refused(replace(signed, **{name: raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]}))
    content = json.loads(signed.payload)
    content["version"] = 2
    refused(replace(signed, payload=json.dumps(content, sort_keys=True, separators=(",", ":")).encode()), "changed")
    refused(canaries.sign(Signer(world.issue("client/a")), canary_set(ROWS)), "model's owner")
    refused(canaries.sign(Signer(world.members[0]), canary_set(ROWS)), "model's owner")
    refused(Signer(owner).sign("grant", json.loads(signed.payload)), "'grant'")
    for wrong in ({}, {"examples": 3}, {**content, "tolerances": []}, {**content, "tolerances": [-1]}):
        refused(Signer(owner).sign("canaries", wrong), "something else")
    for text in ("", "[]", "{}", '{"purpose": 1}', "[" * 100_000, path.read_text()[:-9]):
        path.write_text(text)
        with pytest.raises(SignatureError):
            canaries.read(path, world.cluster)

    other = FakeCluster(2)
    try:
        with pytest.raises(MpcInferError):
            canaries.opened(canaries.sign(Signer(other.issue("owner/o")), canary_set(ROWS)), world.cluster)
    finally:
        other.close()


def test_a_set_of_another_deployment_is_refused(wire: Wire) -> None:
    client = Client(wire)  # type: ignore[arg-type]
    for change in ({"deployment": "ab" * 32}, {"version": 2}, {"model": "n"}, {"owner": "owner/eve"}):
        audit = Audit(0.5, replace(canary_set(wire.model), **change))
        with pytest.raises(SignatureError, match="not of the deployment"):
            if wire.model.context:
                client.generate("m", [1, 2, 3], max_new_tokens=4, audit=audit)
            else:
                client.infer("m", OWN, audit=audit)
    assert not wire.seen


# --- parties that tamper ----------------------------------------------------------------------------------------------

PROGRAM = mlp((4, 6, 3))
WEIGHTS = random_weights(PROGRAM, 3)
INPUTS = torch.linspace(-2, 2, 32).reshape(8, 4)


class Tampering:
    """Party 1 adds to one element of one of its openings, in the request that `due` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], int]) -> None:
        self.change, self.wait, self.done = change, -1, 0
        self._generator = torch.Generator().manual_seed(11)
        self._real = stepping._exchange
        self.rounds = self._round = self._at = 0
        monkeypatch.setattr(stepping, "_exchange", self._exchange)

    def draw(self, limit: int) -> int:
        return int(torch.randint(limit, (), generator=self._generator))

    def due(self, after: int) -> None:
        """From the request that comes after so many others, one round, at random; each request has `rounds` of them."""
        self.wait, self.done, self._round, self._at = after, 0, 0, self.draw(self.rounds)

    def _exchange(self, epoch: Any, batch: list[Any], *rest: Any) -> Callable[[], list[torch.Tensor]]:
        if not batch:
            return self._real(epoch, batch, *rest)
        if epoch.mesh.index == 1 and self.wait < 0:
            self.rounds += 1
        elif epoch.mesh.index == 1:
            if self.wait == 0 and self._round == self._at:
                batch = list(batch)
                k = self.draw(len(batch))
                error = torch.zeros_like(batch[k].masked).flatten()
                error[self.draw(len(error))] = self.change(batch[k].ring)
                masked = batch[k].ring.add(batch[k].masked, error.reshape(batch[k].masked.shape))
                batch[k] = Opening(masked, batch[k].ring, batch[k].label)
                self.done += 1
            self._round += 1
            if self._round == self.rounds:
                self._round, self.wait = 0, self.wait - 1
        return self._real(epoch, batch, *rest)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    with InProcess(tmp_path_factory.mktemp("tampered"), 2) as cluster:
        assert [a.version for a in cluster.caller().deploy(PROGRAM, WEIGHTS)] == [1, 1]
        yield cluster


@pytest.fixture
def client(running: InProcess) -> Iterator[Client]:
    with Client(Connection(running.keys.cluster, running.keys.identity("client/bob"))) as client:
        yield client


def known(client: Client) -> CanarySet:
    """Canaries of the tiny model, as its owner makes them."""
    (model,) = client.models()
    answers = (plain(WEIGHTS, INPUTS) * ONE).round().long()
    examples = [Example(((x[None] * ONE).long(),), (y[None],)) for x, y in zip(INPUTS.double(), answers, strict=True)]
    whose = model.name, model.version, model.deployment_id, model.owner
    return CanarySet(*whose, (round(float(answers.abs().max()) / 128) + 128,), tuple(examples))


def caught(client: Client, audit: Audit, tampering: Tampering) -> bool:
    """Own requests until a request was tampered with: whether that one was a canary and raised the alarm."""
    tampering.due(after=tampering.draw(3))
    while not tampering.done:
        try:
            client.infer("m", OWN_INPUT, audit=audit)
        except TamperingError:
            return True
    return False


OWN_INPUT = torch.tensor([[0.5, -0.25, 1.0, 0.75]])
LARGE: Callable[[Any], int] = lambda ring: 1 << max(0, ring.bits - 4)  # noqa: E731


@pytest.mark.parametrize("trials", [40, pytest.param(600, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_large_tampering_is_caught_with_probability_p_q(
    client: Client, monkeypatch: pytest.MonkeyPatch, trials: int
) -> None:
    p, found = 0.5, known(client)
    tampering = Tampering(monkeypatch, LARGE)
    client.infer("m", OWN_INPUT)
    judge, changed = Audit(p, found), 0
    for i in range(trials):  # q: how many canaries the same tampering makes fail
        tampering.due(after=0)
        example = found.examples[i % len(found.examples)]
        try:
            y = client.infer("m", example.inputs[0] / ONE)
            judge.check_example(example, [(y.double() * ONE).long()])
        except TamperingError:
            changed += 1
        assert tampering.done == 1
    q = changed / trials
    hits = sum(caught(client, judge, tampering) for _ in range(trials))
    deviation = (trials * p * q * (1 - p * q) + trials * p * p * q * (1 - q)) ** 0.5  # of the hits, and of q
    assert q > 0.5 and abs(hits - trials * p * q) <= 4 * deviation, (hits, q)
    # what the same would say of canaries that the client does not send
    assert trials * p * q > 4 * deviation


def test_one_unit_in_the_last_place_is_not_caught(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is below any tolerance that honest parties never exceed: canaries say nothing about it."""
    tampering = Tampering(monkeypatch, lambda ring: 1)
    audit = Audit(0.5, known(client))
    client.infer("m", OWN_INPUT)
    for _ in range(12):
        tampering.due(after=0)
        tampering._at = 0  # the first product; a bit of a comparison has no last place
        y = client.infer("m", OWN_INPUT, audit=audit)
        assert tampering.done == 1 and float((y - plain(WEIGHTS, OWN_INPUT)).abs().max()) < 1e-3


def test_honest_parties_raise_no_alarm(client: Client) -> None:
    audit = Audit(0.8, known(client))
    for rows in (1, 3):
        x = OWN_INPUT.repeat(rows, 1)
        for _ in range(5):
            assert float((client.infer("m", x, audit=audit) - plain(WEIGHTS, x)).abs().max()) < 1e-3
