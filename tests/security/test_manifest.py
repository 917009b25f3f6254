"""Parties that are not who or what they were, or lie about it: nothing is sent to any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dcap_qvl
import grpc
import numpy as np
import pytest
import torch

from mpcinfer import Client, ModelOwner
from mpcinfer.client.cluster import Connection
from mpcinfer.client.manifest import Demands
from mpcinfer.config import Cluster
from mpcinfer.errors import IdentityError, ManifestError, MpcInferError, SignatureError
from mpcinfer.party.manifest import PartyManifest
from mpcinfer.party.service import PartyService
from mpcinfer.trust import manifest as statements
from mpcinfer.trust.evidence import Expected, find, quotes
from mpcinfer.trust.facts import digest
from mpcinfer.trust.manifest import Stated, state
from mpcinfer.trust.pin import Member, Pin
from mpcinfer.trust.signing import Signed
from tests.inprocess import InProcess

QUOTES = Path(__file__).parents[1] / "trust" / "quotes"
JUNE_2025 = 1750400000  # the collateral of these quotes was fetched a day before
SHARES = ("Infer", "Generate", "Deploy")
X = np.ones((1, 4), np.float32)


class Scene:
    """A cluster with a model, pinned, and what reached its parties."""

    def __init__(self, running: InProcess, reached: list[str]) -> None:
        self.running = running
        self.reached = reached
        self.client = running.keys.identity("client/bob")
        for index, party in running.parties.items():
            party.manifest.facts = replace(party.manifest.facts, operator=f"operator {index}")
        self.again()
        with Connection(self.cluster, self.client) as connection:
            self.pin = Pin(connection.manifest.members)

    @property
    def cluster(self) -> Cluster:
        return self.running.keys.cluster

    def party(self, index: int = 1) -> PartyManifest:
        return self.running.parties[index].manifest

    def use(self, *, pinned: bool = True, cluster: Cluster | None = None) -> None:
        """Connect, and have the model evaluated."""
        demands = Demands(self.pin if pinned else None)
        with Connection(cluster or self.cluster, self.client, demands=demands) as connection:
            Client(connection).infer("m", X)

    def refused(self, error: type[MpcInferError], words: str, **how: Any) -> None:
        """Nothing can be done, for the reason given, and no share arrives anywhere."""
        del self.reached[:]
        with pytest.raises(error, match=words) as caught:
            self.use(**how)
        assert type(caught.value) is error
        with pytest.raises(error, match=words), Connection(self.cluster, self.client, demands=Demands(self.pin)) as c:
            ModelOwner(c).deploy(torch.nn.Linear(4, 2).eval(), torch.zeros(1, 4), name="other")
        assert self.reached == []

    def again(self) -> None:
        """End the epoch; the next one has what parties say of themselves by then."""
        wait = self.running.new_epoch()
        epoch = self.running.parties[0].former.current
        assert epoch is not None
        epoch.close()
        wait()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    reached: list[str] = []

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: PartyService, request: Any, context: grpc.ServicerContext) -> Any:
            reached.append(name)
            return real(self, request, context)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in SHARES:
            patch.setattr(PartyService, name, watched(name, getattr(PartyService, name)))
        with InProcess(tmp_path_factory.mktemp("manifest"), 2) as running:
            with Connection(running.keys.cluster, running.keys.identity("owner/alice")) as connection:
                ModelOwner(connection).deploy(torch.nn.Linear(4, 2).eval(), torch.zeros(1, 4), name="m")
            yield Scene(running, reached)


@pytest.fixture
def scene(started: Scene, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """The cluster as it was, whatever a test made its parties say."""
    before = [party.manifest.facts for party in started.running.parties.values()]
    yield started
    monkeypatch.undo()
    if [party.manifest.facts for party in started.running.parties.values()] != before:
        for party, facts in zip(started.running.parties.values(), before, strict=True):
            party.manifest.facts = facts
        started.again()
    started.use()


def test_what_was_pinned_works_and_shares_travel(scene: Scene) -> None:
    del scene.reached[:]
    scene.use()
    assert sorted(scene.reached) == ["Infer"] * 2
    epochs = [party.former.current for party in scene.running.parties.values()]
    with Connection(scene.cluster, scene.client) as connection:
        assert {epoch.manifest for epoch in epochs if epoch is not None} == {connection.manifest.digest}


# --- statements that are not what they should be ---------------------------------------------------------------------


def stating(scene: Scene, monkeypatch: pytest.MonkeyPatch, how: Callable[[bytes, Signed], Signed]) -> None:
    """Party 1 answers with something else than its statement."""
    honest = scene.party().state
    monkeypatch.setattr(scene.party(), "state", lambda nonce: how(nonce, honest(nonce)))


@pytest.mark.parametrize("pinned", [True, False])
def test_a_replayed_statement(scene: Scene, monkeypatch: pytest.MonkeyPatch, pinned: bool) -> None:
    old = scene.party().state(bytes(32))
    stating(scene, monkeypatch, lambda nonce, own: old)
    scene.refused(ManifestError, "party/1 was not made for this connection", pinned=pinned)


def test_without_the_comparison_of_nonces_a_replay_is_accepted(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: what the test above catches is that comparison, and nothing else."""
    old = scene.party().state(bytes(32))
    stating(scene, monkeypatch, lambda nonce, own: old)
    real = statements.opened

    def careless(signed: Signed, cluster: Cluster, role: str, nonce: bytes) -> Stated:
        return real(signed, cluster, role, bytes(32) if role == "party/1" else nonce)

    monkeypatch.setattr(statements, "opened", careless)
    scene.use()
    with pytest.raises(pytest.fail.Exception):
        scene.refused(ManifestError, "party/1")


@pytest.mark.parametrize("at", [0, 40, -1])
def test_a_changed_byte(scene: Scene, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    def change(nonce: bytes, own: Signed) -> Signed:
        payload = bytearray(own.payload)
        payload[at] ^= 1
        return replace(own, payload=bytes(payload))

    stating(scene, monkeypatch, change)
    scene.refused(SignatureError, "signature of party/1 does not hold")


def test_a_missing_signature(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    stating(scene, monkeypatch, lambda nonce, own: replace(own, signature=b""))
    scene.refused(SignatureError, "signature of party/1 does not hold")


def test_another_partys_statement(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    stating(scene, monkeypatch, lambda nonce, own: scene.party(0).state(nonce))
    scene.refused(SignatureError, "party/1 shows a statement of party/0")


def test_a_statement_for_another_purpose(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    stating(scene, monkeypatch, lambda nonce, own: replace(own, purpose="facts"))
    scene.refused(SignatureError, "signed as 'facts' was given where 'manifest' is needed")


@pytest.mark.parametrize("pinned", [True, False])
def test_a_party_that_lies_about_another(scene: Scene, monkeypatch: pytest.MonkeyPatch, pinned: bool) -> None:
    party = scene.party()
    false = digest([replace(scene.party(0).facts, operator="somebody else"), party.facts])
    monkeypatch.setattr(party, "state", lambda nonce: state(party._signer, party.facts, false, nonce))
    scene.refused(ManifestError, "party/1 signs another manifest", pinned=pinned)


def test_a_party_that_lies_about_its_keys(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    party = scene.party()
    stolen = replace(party.facts, signing_key=scene.party(0).facts.signing_key)
    monkeypatch.setattr(
        party, "state", lambda nonce: state(party._signer, stolen, digest([scene.party(0).facts, stolen]), nonce)
    )
    scene.refused(ManifestError, "party/1 signs that its signing_key is another", pinned=False)


def test_swapped_certificates(scene: Scene) -> None:
    first, second = scene.cluster.parties
    swapped = replace(
        scene.cluster,
        parties=(replace(first, address=second.address), replace(second, address=first.address)),
    )
    del scene.reached[:]
    for pinned in (True, False):
        with pytest.raises(IdentityError):
            scene.use(cluster=swapped, pinned=pinned)
    exchanged = replace(
        scene.cluster, parties=(replace(first, key_pin=second.key_pin), replace(second, key_pin=first.key_pin))
    )
    with pytest.raises(IdentityError, match="not the one the cluster file pins"):
        scene.use(cluster=exchanged)
    assert scene.reached == []


# --- parties that have changed since they were pinned ----------------------------------------------------------------

CHANGES = {
    "code": ({"code": "ab" * 32}, "its code digest was '[0-9a-f]{64}' and is now '(ab){32}'"),
    "operator": ({"operator": "somebody else"}, "its operator was 'operator 1' and is now 'somebody else'"),
    "evidence": ({"evidence": "none", "code": ""}, "its code digest was .* now not said; its kind of evidence was"),
    "package": ({"package": "9.9.9"}, "its package version was '.*' and is now '9.9.9'"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed(scene: Scene, change: str) -> None:
    values, words = CHANGES[change]
    scene.party().facts = replace(scene.party().facts, **values)
    scene.again()
    scene.refused(ManifestError, f"party/1 is not what was pinned: {words}.*mpcinfer pin")
    scene.use(pinned=False)  # nobody held it to anything


def test_a_change_under_an_open_connection(scene: Scene, tmp_path: Path) -> None:
    """The party comes back as another between two requests: the second is not sent to anybody."""
    with Connection(scene.cluster, scene.client, demands=Demands(scene.pin)) as connection:
        client = Client(connection)
        client.infer("m", X)
        before = scene.party().facts
        wait = scene.running.new_epoch()
        scene.running.crash(1)
        scene.running.start_party(1).manifest.facts = replace(before, operator="somebody else")
        wait()
        del scene.reached[:]
        with pytest.raises(ManifestError, match="party/1 is not what was pinned: its operator was"):
            client.infer("m", X)
        assert scene.reached == []
        scene.party().facts = before
        scene.again()
        client.infer("m", X)


def test_another_cluster_file(scene: Scene) -> None:
    other = Pin(tuple(replace(m, facts=replace(m.facts, cluster="00" * 32)) for m in scene.pin.members))
    del scene.reached[:]
    with pytest.raises(ManifestError, match="pinned under another cluster file"):
        Connection(scene.cluster, scene.client, demands=Demands(other))
    assert scene.reached == []


# --- quotes of a real processor, which was not this host's -----------------------------------------------------------


@pytest.fixture(params=["tdx", "sgx"])
def quoted(scene: Scene, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Demands]:
    """Party 1 shows a quote; what a client demands who has pinned it."""
    quote, collateral = (QUOTES / f"{request.param}.quote").read_bytes(), str(QUOTES / f"{request.param}.json")
    monkeypatch.setattr(quotes, "now", lambda: JUNE_2025)
    monkeypatch.setattr(type(find(request.param)), "produce", lambda self, report_data: quote)
    bound = dcap_qvl.parse_quote(quote).report.report_data
    measured = find(request.param).verify(quote, bound, Expected("party/1", None, collateral))
    scene.party().facts = replace(scene.party().facts, evidence=request.param)
    scene.again()
    yield Demands(Pin((scene.pin.members[0], Member(scene.party().facts, measured))), collateral)


def uses(scene: Scene, demands: Demands) -> None:
    with Connection(scene.cluster, scene.client, demands=demands) as connection:
        Client(connection).infer("m", X)


def test_a_quote_bound_to_other_keys(scene: Scene, quoted: Demands) -> None:
    del scene.reached[:]
    for demands in (quoted, replace(quoted, pin=None)):
        with pytest.raises(ManifestError, match="quote of party/1 is not bound to its keys and to this connection"):
            uses(scene, demands)
    assert scene.reached == []


def test_what_a_bound_quote_measures(scene: Scene, quoted: Demands, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the binding taken for granted (the planted fault) the same quote is accepted, and its measurements count."""
    shown = find(scene.party().facts.evidence).produce(b"")
    bound = dcap_qvl.parse_quote(shown).report.report_data
    monkeypatch.setattr(statements, "report_data", lambda *_: bound)
    uses(scene, quoted)
    assert quoted.pin is not None
    first, second = quoted.pin.members
    assert second.measured is not None
    name = list(second.measured)[-1]
    false = replace(second, measured={**second.measured, name: "ab" * 48})
    del scene.reached[:]
    with pytest.raises(ManifestError, match=f"measures another {name} than was pinned"):
        uses(scene, replace(quoted, pin=Pin((first, false))))
    with pytest.raises(ManifestError, match="cannot be checked without collateral"):
        uses(scene, replace(quoted, collateral=""))
    assert scene.reached == []
