"""Before anything is released, parties and witnesses state what was sent, received and computed, and compare.

For every ordered pair (j -> i) four digests must agree: of what party j says it sent, of what its witness has computed
that it must send, of what party i received and of what party i's witness was told that it received. One honest member
in each pair, party and witness, is enough for everything that is released to be what the protocol yields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mpcinfer.config import Cluster
from mpcinfer.errors import IdentityError, ProtocolError, TamperingError
from mpcinfer.party.epoch import Epoch
from mpcinfer.party.inbox import Job
from mpcinfer.party.waiting import Ballot
from mpcinfer.trust.signing import Keyring, Signed, Signer
from mpcinfer.wire.mesh import read_json
from mpcinfer.wire.witnessed import ShadowMesh, WitnessedMesh

_PURPOSE = "witness"
_SHARED = ("epoch", "manifest", "number")  # what all must state alike
_REMEDY = "Nothing was released and this epoch's randomness is burnt; ask the operators named"


class Vouching:
    """How one party or witness states and checks."""

    def __init__(self, cluster: Cluster, signer: Signer) -> None:
        self._cluster = cluster
        self._signer = signer
        self._keys, self._epoch = Keyring(cluster), b""

    def exchange(self, epoch: Epoch, subjects: list[dict[str, Any]]) -> None:
        """State what was done so far and what is about to be released, and compare with all others.

        subjects: for each request, its public facts, the same for all, and this share's "upload" and "output", which
        are the same for a party and its witness. TamperingError, naming a pair, unless everything agrees.
        """
        own, signed = self.statement(epoch, subjects)
        self.check(own, epoch.mesh.consult(packed([signed]), both))

    def statement(self, epoch: Epoch, subjects: list[dict[str, Any]]) -> tuple[dict[str, Any], Signed]:
        """What `exchange` tells the others, and the same signed; it must be sent before anything else is."""
        mesh = epoch.mesh
        assert isinstance(mesh, WitnessedMesh | ShadowMesh)
        if epoch.binding != self._epoch:
            self._keys, self._epoch = Keyring(self._cluster), epoch.binding
        own = {
            "epoch": epoch.binding.hex(),
            "manifest": epoch.manifest.hex(),
            "index": mesh.index,
            "number": epoch.vouched,
            "subjects": subjects,
            "traffic": mesh.traffic.digests(),
        }
        epoch.vouched += 1
        return own, self._signer.sign(_PURPOSE, own)

    def check(self, own: Mapping[str, Any], told: Mapping[int, bytes]) -> None:
        """Compare what this one states with what all do. told: by index, a party's and its witness's word, packed."""
        said = {index: self._opened(index, message) for index, message in told.items()}
        for index, statements in said.items():
            _check_work(own, index, list(statements.values()))
        try:
            check_traffic({index: {role: each["traffic"] for role, each in said[index].items()} for index in said})
        except (KeyError, TypeError, AttributeError) as error:
            raise TamperingError(f"somebody vouches for nothing that can be compared. {_REMEDY}") from error

    def _opened(self, index: int, message: bytes) -> dict[str, dict[str, Any]]:
        """What a party and its witness say, by role: exactly those, both signed."""
        witness = self._cluster.witness(index)
        roles = [f"party/{index}", *([witness.role] if witness is not None else [])]
        try:
            signed = [Signed.from_json(each) for each in read_json(message, f"party {index}")]
            statements = [self._keys.open(each, _PURPOSE) for each in signed]
        except (ValueError, TypeError, ProtocolError, IdentityError) as error:
            raise TamperingError(
                f"what party {index} or its witness states is not signed by them. {_REMEDY}"
            ) from error
        if [statement.role for statement in statements] != roles:
            raise TamperingError(f"not all of {' and '.join(roles)} vouch for what was computed. {_REMEDY}")
        return {statement.role: statement.content for statement in statements}


def subject(job: Job, step: Mapping[str, Any], number: int, output: bytes) -> dict[str, Any]:
    """What is stated of a request: public facts, and two commitments that a pair has in common."""
    public = {"request": job.id.hex(), "tape": step["tape"], "deployment": step["deployment"], "number": number}
    return {**public, "upload": job.upload, "output": output.hex()}


def _check_work(own: Mapping[str, Any], index: int, statements: list[dict[str, Any]]) -> None:
    """A pair states the same work as this one, and both of it the same of their share. Else TamperingError."""
    for content in statements:
        same = content.get("index") == index and all(content.get(name) == own[name] for name in _SHARED)
        if not same or _public(content.get("subjects")) != _public(own["subjects"]):
            raise TamperingError(f"party {index} or its witness vouches for other work than was agreed on. {_REMEDY}")
        if content["subjects"] != statements[0]["subjects"]:
            raise TamperingError(
                f"party {index} and its witness have computed different outputs, or have different shares. "
                f"Suspect: party {index} or its witness. {_REMEDY}"
            )


def check_traffic(said: Mapping[int, Mapping[str, Mapping[str, Mapping[str, str]]]]) -> None:
    """All that was stated of each ordered pair agrees: by party, by role, by direction, by peer. Else TamperingError.

    The pair is the suspect whose two members differ; where both of both pairs agree with each other, it is either.
    """
    for sender in said:
        for receiver in said:
            if sender == receiver:
                continue
            sent = {statement["sent"].get(str(receiver)) for statement in said[sender].values()}
            received = {statement["received"].get(str(sender)) for statement in said[receiver].values()}
            if sent == received and len(sent) == 1 and None not in sent:
                continue
            suspects = [i for i, digests in ((sender, sent), (receiver, received)) if len(digests) > 1]
            named = " and ".join(f"party {i} or its witness" for i in suspects or [sender, receiver])
            raise TamperingError(
                f"what party {sender} has sent to party {receiver} is not what it must have sent, or not what "
                f"party {receiver} and its witness took in. Suspect: {named}. {_REMEDY}"
            )


def _public(subjects: Any) -> Any:
    """Without what only a pair has in common."""
    if not isinstance(subjects, list) or not all(isinstance(each, dict) for each in subjects):
        return None
    return [{k: v for k, v in each.items() if k not in ("upload", "output")} for each in subjects]


def packed(signed: list[Signed]) -> bytes:
    """Statements in one message."""
    return json.dumps([each.to_json() for each in signed]).encode()


def both(party: bytes, witness: bytes) -> bytes:
    """The statements of a party and its witness, in this order."""
    try:
        return json.dumps([*read_json(party, "a party"), *read_json(witness, "its witness")]).encode()
    except TypeError as error:
        raise ProtocolError("a witness states nothing that can be read") from error


def merged_ballots(party: bytes, witness: bytes) -> bytes:
    """One vote of a party and its witness for each request: no if either says no, not yet if either has to wait.

    Statements that come after them: both.
    """
    try:
        pairs = zip(read_json(party, "a party"), read_json(witness, "its witness"), strict=True)
        return json.dumps([_merged(own, other) for own, other in pairs]).encode()
    except (ValueError, TypeError, KeyError) as error:
        raise ProtocolError("a witness votes on something else than its party") from error


def _merged(own: Any, other: Any) -> Any:
    if isinstance(own, list) and isinstance(other, list):
        return [*own, *other]
    if own["error"]:
        return own
    if other["error"]:
        return {**own, "error": other["error"], "text": f"its witness: {other['text']}"}
    if own["late"] or other["late"]:
        return {**own, "late": True}
    if own["upload"] != other["upload"]:
        return {
            **own,
            "error": "AgreementError",
            "text": "it and its witness have different shares; whoever sends shares sends both the same",
        }
    return own


def count(
    epoch: Epoch, ballots: list[Ballot], statement: Signed | None = None
) -> tuple[list[dict[int, Any]], dict[int, bytes]]:
    """One control message to every peer for all who vote: everybody's answers to each, this party's included.

    statement: what this party or witness vouches for in the same message; then all do, which is returned as well.
    """
    before = epoch.mesh.bytes_sent
    said: list[Any] = [ballot.own for ballot in ballots]
    if statement is not None:
        said.append([statement.to_json()])
    raw = epoch.mesh.consult(json.dumps(said).encode(), merged_ballots)
    found = {peer: read_json(answers, f"party {peer}") for peer, answers in raw.items()}
    for peer, answers in found.items():
        if not isinstance(answers, list) or len(answers) != len(said):
            raise ProtocolError(f"party {peer} votes on something else")
    told = {peer: json.dumps(answers.pop()).encode() for peer, answers in found.items()} if statement else {}
    each, rest = divmod(epoch.mesh.bytes_sent - before, len(ballots))
    for ballot in ballots:
        ballot.part.sent += each
    ballots[0].part.sent += rest
    return [{peer: answers[k] for peer, answers in found.items()} for k in range(len(ballots))], told


def check_ballot(index: int, joint: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """TamperingError if a party has voted for both of them and left out what its witness said."""
    held_back = own["error"] or own["late"] or joint["upload"] != own["upload"]
    if held_back and not (joint["error"] or joint["late"]):
        raise TamperingError(f"party {index} has voted without asking its witness. Suspect: party {index}")


def check_voice(index: int, joint: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """At the witness of a party: TamperingError unless the party has told all others what this one has said."""
    if joint.get("witness") != own:
        raise TamperingError(f"party {index} has misquoted its witness to the others. Suspect: party {index}")


def merged_inventories(party: bytes, witness: bytes) -> bytes:
    """What a party holds, and beside it what its witness does."""
    try:
        return json.dumps({**read_json(party, "a party"), "witness": read_json(witness, "its witness")}).encode()
    except TypeError as error:
        raise ProtocolError("a witness says of its models what cannot be read") from error
