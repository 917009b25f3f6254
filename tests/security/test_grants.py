"""What a model's owner has not granted, no party does: forged, stale and stolen grants, budgets to one, revocation."""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcinfer.config import Limits
from mpcinfer.errors import StoreError
from mpcinfer.party.grants import Grants
from mpcinfer.party.ledger import Account
from mpcinfer.party.policy import Policy
from mpcinfer.trust.grant import Budget, Grant, Terms
from mpcinfer.wire.v1 import party_pb2
from tests.inprocess import Caller, InProcess, kinds, mlp, plain, random_weights, reveal
from tests.members import Members

PROGRAM = mlp()
WEIGHTS = random_weights(PROGRAM)
X = torch.linspace(-2, 2, 4).reshape(1, 4)
LIMITS = Limits(step_timeout_s=60, connect_timeout_s=10, stop_grace_s=5, max_waiting_requests=32)
NOON = 1_800_000_000 - 1_800_000_000 % 86400 + 43200  # of some day: budgets of tests do not meet midnight

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(params=[2], ids="n={}".format)
def cluster(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InProcess]:
    with InProcess(tmp_path, request.param, LIMITS) as running:
        at(running, NOON)
        yield running


def at(cluster: InProcess, now: float, *parties: int) -> None:
    """Set the clocks of (all) parties."""
    for i in parties or cluster.parties:
        cluster.parties[i].lane._by.policy._clock = lambda: now


def names(cluster: InProcess, kind: str) -> list[str]:
    return [kind] * cluster.n


def deployed(cluster: InProcess, terms: Terms, name: str = "m") -> tuple[Caller, Grant]:
    alice = cluster.caller()
    grant = alice.grant(PROGRAM, name, terms)
    assert kinds(alice.deploy(PROGRAM, WEIGHTS, name, grant=grant)) == names(cluster, "DeployResponse")
    return alice, grant


def right(answers: list[Any]) -> bool:
    return bool((reveal(answers) - plain(WEIGHTS, X)).abs().max() < 1e-3)


# --- what comes with an upload ---------------------------------------------------------------------------------------


def changed(grant: Grant, **changes: Any) -> Grant:
    return dataclasses.replace(grant, **changes)


def test_an_upload_needs_a_grant_of_its_own(cluster: InProcess) -> None:
    alice = cluster.caller()
    good, signers = alice.grant(PROGRAM), {"eve": cluster.caller("owner/eve").signer, "alice": alice.signer}
    other = mlp((4, 5, 2))
    cases: list[tuple[str, Any]] = [
        ("SignatureError", None),
        ("SignatureError", lambda s: dataclasses.replace(s, signature=bytes(64))),
        ("SignatureError", lambda s: dataclasses.replace(s, payload=s.payload.replace(b'"rate":0', b'"rate":9'))),
        ("IdentityError", lambda s: good.sign(Members().signer("owner/alice"))),
        ("GrantError", lambda s: good.sign(signers["eve"])),
        ("GrantError", lambda s: alice.grant(PROGRAM, "n").sign(signers["alice"])),
        ("GrantError", lambda s: alice.grant(other).sign(signers["alice"])),
        ("GrantError", lambda s: changed(good, reveals="argmax").sign(signers["alice"])),
        ("GrantError", lambda s: changed(good, entry_points=("generate",)).sign(signers["alice"])),
        ("GrantError", lambda s: changed(good, cluster="00").sign(signers["alice"])),
        ("GrantError", lambda s: changed(good, parties=good.parties[::-1]).sign(signers["alice"])),
    ]
    for kind, change in cases:
        uploads = alice.deploys(PROGRAM, WEIGHTS)
        for upload in uploads:
            if change is None:
                upload[0].header.ClearField("grant")
            else:
                upload[0].header.grant.CopyFrom(change(good.sign(signers["alice"])).message())
        assert kinds(alice.at_all("Deploy", [iter(u) for u in uploads])) == names(cluster, kind)
    assert not any(p.catalogue.models() for p in cluster.parties.values())


def test_a_grant_is_no_larger_than_what_parties_can_tell_each_other(cluster: InProcess) -> None:
    alice = cluster.caller()
    many = Terms(clients=tuple(f"jwt/corp/{i:0255}" for i in range(300)))
    grant = alice.grant(PROGRAM, "m", many)
    assert kinds(alice.deploy(PROGRAM, WEIGHTS, grant=grant)) == names(cluster, "GrantError")
    few = Terms(clients=tuple(f"client/c{i:019}" for i in range(1000)))
    assert kinds(alice.deploy(PROGRAM, WEIGHTS, grant=alice.grant(PROGRAM, "m", few))) == names(
        cluster, "DeployResponse"
    )


def test_parties_that_are_shown_different_grants_refuse(cluster: InProcess) -> None:
    alice = cluster.caller()
    uploads, other = alice.deploys(PROGRAM, WEIGHTS), alice.deploys(PROGRAM, WEIGHTS)
    other[0][0].header.request_id = uploads[0][0].header.request_id
    answers = alice.at_all("Deploy", [iter(u) for u in (other[0], *uploads[1:])])
    assert kinds(answers) == names(cluster, "AgreementError")


# --- who, when -------------------------------------------------------------------------------------------------------


def test_not_yet_valid_and_expired(cluster: InProcess) -> None:
    deployed(cluster, Terms(not_before=NOON + 10, not_after=NOON + 20))
    bob = cluster.caller("client/bob")
    for now, expected in [(9, "begins in 1 s"), (10, ""), (19, ""), (20, "expired")]:
        at(cluster, NOON + now)
        answers = bob.infer(X)
        if expected:
            assert kinds(answers) == names(cluster, "GrantError") and expected in str(answers[0])
        else:
            assert right(answers)


@pytest.mark.slow
def test_one_partys_clock_is_enough_to_refuse(cluster: InProcess) -> None:
    deployed(cluster, Terms(not_after=NOON + 20))
    for late in cluster.parties:
        at(cluster, NOON)
        at(cluster, NOON + 20, late)
        answers = cluster.caller("client/bob").infer(X, timeout=5)
        assert "GrantError" in kinds(answers) and not any(hasattr(a, "outputs") for a in answers)


def test_whoever_is_not_named_sees_nothing(cluster: InProcess) -> None:
    """The same words for what is not granted and for what does not exist."""
    alice, _ = deployed(cluster, Terms(clients=("client/bob",)))
    bob, carol, eve = (cluster.caller(r) for r in ("client/bob", "client/carol", "owner/eve"))
    assert right(bob.infer(X)) and right(alice.infer(X))
    for other in (carol, eve):
        for name in ("m", "alice/m"):
            hidden, absent = other.infer(X, name), other.infer(X, name.replace("m", "x"))
            assert kinds(hidden) == kinds(absent) == names(cluster, "NotFoundError")
            assert [str(a).replace("x'", "m'") for a in absent] == list(map(str, hidden))
            vocabulary = party_pb2.VocabularyRequest(model=name)
            generate = party_pb2.GenerateRequest(model=name, request_id=secrets.token_bytes(16))
            for method, request in (("Vocabulary", vocabulary), ("Generate", generate)):
                stream = getattr(other.stubs[0], method)(request, timeout=20)
                with pytest.raises(Exception, match="no model .* deployed: none"):
                    next(stream)
        for stub in other.stubs:
            assert not stub.ListModels(party_pb2.ListModelsRequest(), timeout=20).models
            assert not stub.Status(party_pb2.StatusRequest(), timeout=20).models
        removal = party_pb2.RemoveModelRequest(request_id=secrets.token_bytes(16), name="m")
        if other is eve:
            assert kinds(eve.at_all("RemoveModel", [removal] * cluster.n)) == names(cluster, "NotFoundError")
            assert kinds(eve.deploy(PROGRAM, WEIGHTS)) == names(cluster, "DeployResponse")  # no clash of names either
            assert [a.version for a in eve.deploy(PROGRAM, WEIGHTS)] == [2] * cluster.n
    # eve has granted hers to everybody: bob has two models to choose from, and carol one
    answers = bob.infer(X)
    assert kinds(answers) == names(cluster, "InputError") and "alice/m or eve/m" in str(answers[0])
    assert right(bob.infer(X, "alice/m")) and right(bob.infer(X, "eve/m")) and right(carol.infer(X))
    (own,) = alice.stubs[0].ListModels(party_pb2.ListModelsRequest(), timeout=20).models[:1]
    assert own.grant.payload and own.owner == "owner/alice"
    assert not any(m.grant.payload for m in bob.stubs[0].ListModels(party_pb2.ListModelsRequest(), timeout=20).models)


@pytest.mark.parametrize("lax", [0, 1])
def test_a_party_that_ignores_grants_is_not_enough(
    cluster: InProcess, monkeypatch: pytest.MonkeyPatch, lax: int
) -> None:
    """Its policy file edited, or its code: the others still refuse. All of them: the planted fault."""
    deployed(cluster, Terms(clients=("client/bob",)))
    carol = cluster.caller("client/carol")

    def ignore(index: int) -> None:
        (model,) = cluster.parties[index].catalogue.models()
        assert model.granted is not None
        model.granted = dataclasses.replace(model.granted, grant=changed(model.granted.grant, terms=Terms()))

    ignore(lax)
    answers = carol.infer(X, timeout=5)
    assert not any(hasattr(a, "outputs") for a in answers) and "NotFoundError" in kinds(answers)
    ignore(1 - lax)
    assert right(carol.infer(X))


# --- replacing, revoking ---------------------------------------------------------------------------------------------


def test_revoked_and_granted_again(cluster: InProcess) -> None:
    alice, grant = deployed(cluster, Terms())
    bob = cluster.caller("client/bob")
    revoked, again = grant.replaced(revoked=True), grant.replaced().replaced(terms=Terms(("client/bob",)))
    assert kinds(alice.set_grant(revoked)) == names(cluster, "SetGrantResponse")
    for who in (alice, bob):
        answers = who.infer(X)
        assert kinds(answers) == names(cluster, "GrantError") and "revoked" in str(answers[0])
    assert kinds(alice.set_grant(again)) == names(cluster, "SetGrantResponse")
    assert right(bob.infer(X)) and kinds(cluster.caller("client/carol").infer(X)) == names(cluster, "NotFoundError")
    for old in (grant, revoked, again, changed(again, terms=Terms())):
        answers = alice.set_grant(old)
        assert kinds(answers) == names(cluster, "GrantError") and "serial" in str(answers[0])
    assert right(bob.infer(X))


def test_replacements_that_are_for_something_else(cluster: InProcess) -> None:
    alice, grant = deployed(cluster, Terms())
    deployed(cluster, Terms(), "n")
    eve, good = cluster.caller("owner/eve"), grant.replaced()
    for wrong in (
        changed(good, model="ab" * 32),
        changed(good, nonce="ab" * 16),
        changed(good, program="ab" * 32),
        changed(good, reveals="argmax"),
        changed(good, entry_points=("generate",)),
        changed(good, cluster="ab" * 32),
        changed(good, parties=good.parties[::-1]),
        changed(good, terms=Terms(budgets=(Budget("tokens", 1, 60),))),
    ):
        assert kinds(alice.set_grant(wrong)) == names(cluster, "GrantError")
    request = party_pb2.SetGrantRequest(name="n", grant=good.sign(alice.signer).message())
    for who, name, signer, kind in (
        (alice, "n", alice.signer, "GrantError"),
        (alice, "m", eve.signer, "GrantError"),
        (eve, "m", eve.signer, "NotFoundError"),
        (eve, "m", alice.signer, "NotFoundError"),
        (cluster.caller("client/bob"), "m", alice.signer, "ForbiddenError"),
    ):
        request = party_pb2.SetGrantRequest(
            request_id=secrets.token_bytes(16), name=name, grant=good.sign(signer).message()
        )
        assert kinds(who.at_all("SetGrant", [request] * cluster.n)) == names(cluster, kind)
    # each a good one, but not the same: then none
    messages = [
        party_pb2.SetGrantRequest(request_id=b"0" * 16, name="m", grant=g.sign(alice.signer).message())
        for g in (good, good.replaced())
    ]
    assert kinds(alice.at_all("SetGrant", messages)) == names(cluster, "AgreementError")
    assert {p.catalogue.find("m", 0).grant.serial for p in cluster.parties.values()} == {1}


def test_all_parties_replace_it_or_none(cluster: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    alice, grant = deployed(cluster, Terms())
    stage = cluster.parties[1].catalogue._grants.stage
    monkeypatch.setattr(cluster.parties[1].catalogue._grants, "stage", lambda *_: 1 / 0)
    assert kinds(alice.set_grant(grant.replaced(revoked=True))) == names(cluster, "ProtocolError")
    assert right(cluster.caller("client/bob").infer(X))
    monkeypatch.setattr(cluster.parties[1].catalogue._grants, "stage", stage)
    assert kinds(alice.set_grant(grant.replaced(revoked=True))) == names(cluster, "SetGrantResponse")


# --- at rest ---------------------------------------------------------------------------------------------------------


def restart(cluster: InProcess, *parties: int) -> None:
    for i in parties:
        cluster.crash(i)
    for i in parties:
        cluster.start_party(i)
    cluster.wait_ready()
    at(cluster, NOON)


def stored(cluster: InProcess, index: int) -> Path:
    (path,) = cluster.keys.path(f"party/{index}", "store").glob("grants/*.json")
    return path


def test_grants_survive_restarts_and_the_newest_wins(cluster: InProcess) -> None:
    alice, grant = deployed(cluster, Terms())
    alice.set_grant(grant.replaced(terms=Terms(("client/bob",))))
    older = stored(cluster, 1).read_bytes()
    alice.set_grant(grant.replaced().replaced(revoked=True))
    restart(cluster, 0, 1)
    assert kinds(cluster.caller("client/bob").infer(X)) == names(cluster, "GrantError")
    # one party's file is put back to an older one, validly signed; then gone; then another's
    for content in (older, None, b"{}", older.replace(b"client/bob", b"client/car")):
        cluster.crash(1)
        stored(cluster, 1).unlink() if content is None else stored(cluster, 1).write_bytes(content)
        cluster.start_party(1)
        cluster.wait_ready()
        answers = cluster.caller("client/bob").infer(X)
        assert kinds(answers) == names(cluster, "GrantError") and "revoked" in str(answers[0])
        assert {p.catalogue.find("m", 0).grant.serial for p in cluster.parties.values()} == {3}


def test_a_file_that_nobody_can_mend_is_not_served(cluster: InProcess) -> None:
    alice, grant = deployed(cluster, Terms(("client/bob",)))
    alice.set_grant(later := grant.replaced(terms=Terms(("client/bob",), rate=9)))
    for i in cluster.parties:
        content = json.loads(stored(cluster, i).read_bytes())
        content["payload"] = content["payload"].replace("client/bob", "*")
        stored(cluster, i).write_text(json.dumps(content))
    restart(cluster, 0, 1)
    for role in ("client/bob", "client/carol"):
        assert kinds(cluster.caller(role).infer(X)) == names(cluster, "NotFoundError")
    answers = alice.infer(X)
    assert kinds(answers) == names(cluster, "StoreError") and "does not verify" in str(answers[0])
    assert kinds(alice.set_grant(later.replaced())) == names(cluster, "SetGrantResponse")
    assert right(cluster.caller("client/bob").infer(X))


def granted_elsewhere(cluster: InProcess) -> tuple[Grant, Any]:
    """Every party restarts with a grant that was signed for others, as those were before one had a new key."""
    alice, grant = deployed(cluster, Terms(("client/bob",)))
    alice.set_grant(grant.replaced(terms=Terms(("client/bob",))))
    before = dataclasses.replace(grant.replaced().replaced(), cluster="00", parties=grant.parties[::-1])
    for i in cluster.parties:
        stored(cluster, i).write_text(json.dumps(before.sign(alice.signer).to_json()))
    restart(cluster, 0, 1)
    return before, alice


def test_parties_that_replace_others_serve_once_the_owner_has_agreed(cluster: InProcess) -> None:
    before, alice = granted_elsewhere(cluster)
    answers = cluster.caller("client/bob").infer(X)
    assert kinds(answers) == names(cluster, "GrantError") and "grant NAME --again" in str(answers[0])
    assert kinds(cluster.caller("client/carol").infer(X)) == names(cluster, "NotFoundError")
    shown = {a.models[0].grant.payload for a in alice.at_all("ListModels", [party_pb2.ListModelsRequest()] * cluster.n)}
    assert shown == {before.sign(alice.signer).payload}  # so that he can sign the same again
    assert kinds(alice.set_grant(before.replaced())) == names(cluster, "GrantError")
    assert kinds(alice.set_grant(before.replaced().given_to(alice.cluster))) == names(cluster, "SetGrantResponse")
    assert right(cluster.caller("client/bob").infer(X))


def test_without_that_check_they_would_serve(cluster: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Grants, "check_parties", lambda self, granted: None)
    granted_elsewhere(cluster)
    assert right(cluster.caller("client/bob").infer(X))


# --- budgets ---------------------------------------------------------------------------------------------------------


def spent(cluster: InProcess, client: str = "client/bob", name: str = "m") -> set[tuple[int, int]]:
    account = Account("owner/alice", name, client)
    return {p.ledger.used(account, 0) for p in cluster.parties.values()}


@pytest.mark.parametrize("cluster", [2, 3], indirect=True, ids="n={}".format)
def test_eight_clients_at_once_never_get_one_answer_too_many(
    cluster: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployed(cluster, Terms(budgets=(Budget("queries", 5, 86400),)))
    callers = [cluster.caller("client/bob") for _ in range(8)]
    assert right(callers[0].infer(X))  # its masks are open: from now on requests share steps

    def race() -> list[str]:
        with ThreadPoolExecutor(8) as pool:
            found = [a for answers in pool.map(lambda c: [c.infer(X)], callers) for a in answers]
        assert all(len(set(kinds(answers))) == 1 for answers in found)
        return sorted(kinds(answers)[0] for answers in found)

    with monkeypatch.context() as late:  # no early refusals: all of them meet in the lane
        for party in cluster.parties.values():
            late.setattr(party.lane._by.policy, "check", lambda *_: None)
        assert race() == ["BudgetError"] * 4 + ["InferResponse"] * 4
    assert race() == ["BudgetError"] * 8 and spent(cluster) == {(5, 0)}
    # another client, and the next day, have their own
    assert right(cluster.caller("client/carol").infer(X))
    at(cluster, NOON + 43199)
    assert kinds(callers[0].infer(X)) == names(cluster, "BudgetError")
    at(cluster, NOON + 43200)
    assert race() == ["BudgetError"] * 3 + ["InferResponse"] * 5
    # planted: without the check
    at(cluster, NOON + 43200 + 86400)
    with monkeypatch.context() as faulty:
        faulty.setattr(Policy, "_check", lambda *_: None)
        assert race() == ["InferResponse"] * 8


def test_rows_are_counted_and_what_is_refused_is_not(cluster: InProcess) -> None:
    alice, grant = deployed(cluster, Terms(budgets=(Budget("queries", 5, 86400),)))
    bob = cluster.caller("client/bob")
    assert kinds(bob.infer(torch.randn(6, 4))) == names(cluster, "BudgetError") and spent(cluster) == {(0, 0)}
    assert not isinstance(bob.infer(torch.randn(3, 4))[0], Exception) and spent(cluster) == {(3, 0)}
    # one party does not get the request: no party has counted it
    requests = bob.inferences(X)
    assert "UnavailableError" in kinds([a for a in bob.at_all("Infer", [*requests[:-1], None]) if a is not None])
    assert spent(cluster) == {(3, 0)}
    # one party votes no after another has counted: it is given back
    at(cluster, NOON + 86400, 1)
    party = cluster.parties[1]
    party.ledger.add(Account("owner/alice", "m", "client/bob"), (NOON + 86400) // 60, 5, 0)
    assert "BudgetError" in kinds(bob.infer(X))
    assert cluster.parties[0].ledger.used(Account("owner/alice", "m", "client/bob"), 0) == (3, 0)
    at(cluster, NOON)
    party.ledger.add(Account("owner/alice", "m", "client/bob"), (NOON + 86400) // 60, -5, 0)
    # neither another grant nor another deployment forgets what was used; the owner himself has no budget
    alice.set_grant(grant.replaced(terms=Terms(budgets=(Budget("queries", 4, 3600), Budget("queries", 9, 60)))))
    assert right(bob.infer(X)) and kinds(bob.infer(X)) == names(cluster, "BudgetError")
    deployed(cluster, Terms(budgets=(Budget("queries", 4, 86400),)))
    assert kinds(bob.infer(X)) == names(cluster, "BudgetError") and right(alice.infer(X))
    restart(cluster, 0, 1)
    answers = bob.infer(X)
    assert kinds(answers) == names(cluster, "BudgetError") and "next period begins in 43200 s" in str(answers[0])


def test_a_rate_is_a_budget_of_a_minute(cluster: InProcess) -> None:
    deployed(cluster, Terms(rate=2))
    bob = cluster.caller("client/bob")
    assert right(bob.infer(X)) and right(bob.infer(X))
    assert kinds(bob.infer(X)) == names(cluster, "BudgetError")
    at(cluster, NOON + 60)
    assert right(bob.infer(X))
    at(cluster, NOON - 3600)  # a clock that is set back gives nothing
    assert kinds(bob.infer(X)) == names(cluster, "BudgetError")


@pytest.mark.parametrize("edited", [0, 1])
@pytest.mark.slow
def test_one_partys_counts_deleted(cluster: InProcess, edited: int) -> None:
    deployed(cluster, Terms(budgets=(Budget("queries", 1, 86400),)))
    bob = cluster.caller("client/bob")
    assert right(bob.infer(X))
    cluster.crash(edited)
    for file in cluster.keys.path(f"party/{edited}", "store").glob("budgets.sqlite*"):
        file.unlink()
    cluster.start_party(edited)
    cluster.wait_ready()
    at(cluster, NOON)
    answers = bob.infer(X, timeout=5)
    assert "BudgetError" in kinds(answers) and not any(hasattr(a, "outputs") for a in answers)


def test_a_request_that_fails_after_it_was_admitted_stays_counted(
    cluster: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployed(cluster, Terms(budgets=(Budget("queries", 2, 86400),)))
    bob, wait = cluster.caller("client/bob"), cluster.new_epoch()
    with monkeypatch.context() as broken:
        broken.setattr("mpcinfer.party.actions.interpret_several", lambda *_: 1 / 0)
        assert not any(hasattr(a, "outputs") for a in bob.infer(X))
    wait()
    assert spent(cluster) == {(1, 0)}
    assert right(bob.infer(X)) and kinds(bob.infer(X)) == names(cluster, "BudgetError")


def test_a_request_refused_before_anything_was_dealt_for_it_is_not_counted(
    cluster: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a share on a disk that breaks while the party runs: it is read only once all have agreed."""
    deployed(cluster, Terms(budgets=(Budget("queries", 1, 86400),)))
    bob, catalogue, wait = cluster.caller("client/bob"), cluster.parties[1].catalogue, cluster.new_epoch()
    cluster.stop_dealer()
    cluster.start_dealer()
    wait()

    def broken(model: Any) -> Any:
        raise StoreError("the file is damaged")

    with monkeypatch.context() as patched:
        patched.setattr(catalogue, "load", broken)
        for _ in range(3):
            assert kinds(bob.infer(X)) == names(cluster, "StoreError")
    assert spent(cluster) <= {(0, 0)}
    assert right(bob.infer(X)) and kinds(bob.infer(X)) == names(cluster, "BudgetError")


def test_real_clocks_count_too(cluster: InProcess) -> None:
    for party in cluster.parties.values():
        party.lane._by.policy._clock = time.time
    deployed(cluster, Terms(budgets=(Budget("queries", 1, 366 * 86400),)))
    bob = cluster.caller("client/bob")
    assert right(bob.infer(X)) and kinds(bob.infer(X)) == names(cluster, "BudgetError")
