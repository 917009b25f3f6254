"""What parties and witnesses state before anything is released: whose word it is, of what, and what must agree."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mpcinfer.errors import ProtocolError, TamperingError
from mpcinfer.party.vouching import (
    Vouching,
    both,
    check_ballot,
    check_traffic,
    merged_ballots,
    merged_inventories,
    packed,
)
from mpcinfer.trust.signing import Signed, Signer
from mpcinfer.wire.traffic import Traffic
from mpcinfer.wire.witnessed import ShadowMesh
from tests.inprocess import Keys

ROLES = ("party/0", "party/1", "witness/0", "witness/1")
SUBJECT = {"request": "aa", "tape": "bb", "deployment": "cc", "number": 0, "upload": "dd", "output": "ee"}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"), 2, witnesses=(0, 1))


@pytest.fixture(scope="module")
def signers(keys: Keys) -> dict[str, Signer]:
    return {role: Signer(keys.identity(role)) for role in (*ROLES, "owner/alice")}


def content(index: int) -> dict[str, Any]:
    return {
        "epoch": (b"e" * 32).hex(),
        "manifest": "",
        "number": 0,
        "index": index,
        "subjects": [dict(SUBJECT)],
        "traffic": Traffic(index, [1 - index]).digests(),
    }


class Mesh(ShadowMesh):
    """Party 0's, where the others say what a test has them say."""

    def __init__(self, told: dict[int, bytes]) -> None:
        super().__init__(0, 2, SimpleNamespace(broken=None))  # type: ignore[arg-type]
        self.told = told

    def consult(self, payload: bytes, merge: Any) -> dict[int, bytes]:
        return self.told


def exchange(keys: Keys, signers: dict[str, Signer], said: dict[str, Any]) -> None:
    """Compare what all say, which is signed by whoever says it unless it is signed already."""
    signed = {
        role: each if isinstance(each, list) else [signers[role].sign("witness", each)] for role, each in said.items()
    }
    told = {i: packed([*signed[f"party/{i}"], *signed[f"witness/{i}"]]) for i in (0, 1)}
    epoch: Any = SimpleNamespace(binding=b"e" * 32, manifest=b"", vouched=0, mesh=Mesh(told))
    Vouching(keys.cluster, signers["party/0"]).exchange(epoch, [dict(SUBJECT)])
    assert epoch.vouched == 1


def honest() -> dict[str, Any]:
    return {role: content(int(role[-1])) for role in ROLES}


def test_honest_statements_agree(keys: Keys, signers: dict[str, Signer]) -> None:
    exchange(keys, signers, honest())


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(epoch=(b"f" * 32).hex()),
        lambda c: c.update(manifest="00"),
        lambda c: c.update(number=1),
        lambda c: c.update(index=1 - c["index"]),
        lambda c: c.update(subjects=[]),
        lambda c: c.update(subjects=None),
        lambda c: c["subjects"].append(dict(SUBJECT)),
        lambda c: c["subjects"][0].update(request="ab"),
        lambda c: c["subjects"][0].update(tape="ab"),
        lambda c: c["subjects"][0].update(deployment="ab"),
        lambda c: c["subjects"][0].update(number=1),
        lambda c: c["subjects"][0].update(upload="ab"),
        lambda c: c["subjects"][0].update(output="ab"),
        lambda c: c["traffic"]["sent"].update({str(1 - c["index"]): "ab"}),
        lambda c: c["traffic"]["received"].update({str(1 - c["index"]): "ab"}),
        lambda c: c["traffic"]["sent"].clear(),
        lambda c: c["traffic"].clear(),
        lambda c: c.pop("traffic"),
        lambda c: c.update(traffic=[]),
        lambda c: c["traffic"]["sent"].update({str(1 - c["index"]): []}),
    ],
)
def test_anything_that_one_states_differently_is_tampering(
    keys: Keys, signers: dict[str, Signer], role: str, change: Callable[[dict[str, Any]], Any]
) -> None:
    said = honest()
    change(said[role])
    with pytest.raises(TamperingError):
        exchange(keys, signers, said)


@pytest.mark.parametrize("role", ROLES)
def test_statements_must_be_signed_by_their_roles(keys: Keys, signers: dict[str, Signer], role: str) -> None:
    own = content(int(role[-1]))
    true = signers[role].sign("witness", own)
    other = ROLES[(ROLES.index(role) + 1) % 4]
    forgeries: list[list[Signed]] = [
        [],
        [true, true],
        [signers[role].sign("receipt", own)],
        [signers[other].sign("witness", own)],
        [signers["owner/alice"].sign("witness", own)],
        [Signed(**{**vars(true), "payload": true.payload.replace(b'"number":0', b'"number":1')})],
        [Signed(**{**vars(true), "signature": bytes(64)})],
    ]
    for forgery in forgeries:
        with pytest.raises(TamperingError):
            exchange(keys, signers, {**honest(), role: forgery})


def test_the_suspect_is_the_pair_whose_members_differ() -> None:
    def said(pair: int) -> dict[str, Any]:
        return {
            f"{kind}/{pair}": {"sent": {str(1 - pair): f"{pair}>"}, "received": {str(1 - pair): f"{1 - pair}>"}}
            for kind in ("party", "witness")
        }

    fair = {0: said(0), 1: said(1)}
    check_traffic(fair)
    for who, what, suspects in [
        (("party/0",), "sent", ["party 0 or its witness"]),
        (("witness/1",), "received", ["party 1 or its witness"]),
        (("party/1",), "sent", ["party 1 or its witness"]),
        (("party/0", "witness/0"), "sent", ["party 0 or its witness", "party 1 or its witness"]),
    ]:
        case = copy.deepcopy(fair)
        for role in who:
            index = int(role[-1])
            case[index][role][what][str(1 - index)] = "other"
        with pytest.raises(TamperingError) as caught:
            check_traffic(case)
        named = str(caught.value).partition("Suspect: ")[2].partition(".")[0]
        assert named == " and ".join(suspects)


def ballot(**change: Any) -> dict[str, Any]:
    return {"error": "", "text": "note", "late": False, "upload": "u", **change}


@pytest.mark.parametrize(
    ("party", "witness", "joint"),
    [
        (ballot(), ballot(), ballot()),
        (ballot(), ballot(text="its own"), ballot()),
        (ballot(late=True), ballot(), ballot(late=True)),
        (ballot(), ballot(late=True), ballot(late=True)),
        (ballot(late=True, upload=""), ballot(), ballot(late=True, upload="")),
        (ballot(error="BusyError", text="full"), ballot(late=True), ballot(error="BusyError", text="full")),
        (ballot(), ballot(error="BusyError", text="full"), ballot(error="BusyError", text="its witness: full")),
    ],
)
def test_a_party_and_its_witness_have_one_vote(
    party: dict[str, Any], witness: dict[str, Any], joint: dict[str, Any]
) -> None:
    merged = merged_ballots(json.dumps([party]).encode(), json.dumps([witness]).encode())
    assert json.loads(merged) == [joint]


@pytest.mark.parametrize(
    ("own", "joint", "fair"),
    [
        (ballot(), ballot(), True),
        (ballot(), ballot(late=True, upload="x"), True),
        (ballot(), ballot(error="BusyError"), True),
        (ballot(late=True), ballot(), False),
        (ballot(error="BusyError"), ballot(), False),
        (ballot(upload="x"), ballot(), False),
        (ballot(error="BusyError"), ballot(late=True), True),
    ],
)
def test_a_witness_sees_that_its_vote_was_left_out(own: dict[str, Any], joint: dict[str, Any], fair: bool) -> None:
    if fair:
        check_ballot(0, joint, own)
    else:
        with pytest.raises(TamperingError, match="Suspect: party 0"):
            check_ballot(0, joint, own)


def test_different_uploads_are_refused() -> None:
    merged = merged_ballots(json.dumps([ballot()]).encode(), json.dumps([ballot(upload="v")]).encode())
    assert json.loads(merged)[0]["error"] == "AgreementError"


@pytest.mark.parametrize("told", [b"", b"null", b"{}", b"\xff", b"[" * 100_000])
def test_what_is_no_statement_is_tampering(keys: Keys, signers: dict[str, Signer], told: bytes) -> None:
    epoch: Any = SimpleNamespace(binding=b"e" * 32, manifest=b"", vouched=0, mesh=Mesh({1: told}))
    with pytest.raises(TamperingError):
        Vouching(keys.cluster, signers["party/0"]).exchange(epoch, [dict(SUBJECT)])


@pytest.mark.parametrize("merge", [merged_ballots, both, merged_inventories])
@pytest.mark.parametrize("told", [b"", b"{", b"null", b"[{}]", b"\xff", b"[" * 100_000])
def test_what_a_witness_says_is_read_with_care(merge: Any, told: bytes) -> None:
    """Any answer of a wrong form ends in our error, or is carried to where it is looked at."""
    own = {"models": {}} if merge is merged_inventories else [ballot()]
    try:
        merge(json.dumps(own).encode(), told)
    except ProtocolError:
        pass
    with pytest.raises(ProtocolError):
        merge(json.dumps(own).encode(), b"\xff")


def test_inventories_lie_side_by_side() -> None:
    merged = merged_inventories(b'{"models": 1, "secret": "a"}', b'{"models": 2, "secret": "b"}')
    assert json.loads(merged) == {"models": 1, "secret": "a", "witness": {"models": 2, "secret": "b"}}
