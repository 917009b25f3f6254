"""The manifest: who the parties are and what they run, signed by all of them for whoever connects.

When parties connect, each signs its facts for the others (purpose "facts"), so that all hold the same list, the
*manifest*. Whoever connects sends a fresh nonce to all and gets from each a statement (purpose "manifest"): its own
facts, the nonce, the digest of the manifest, and evidence that is bound to its keys and the nonce. A list put together
from what each says of itself must have the digest that all of them sign: then they know each other as this client
knows them, and none is lied about.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass

from mpcinfer.config import Cluster
from mpcinfer.errors import ConfigError, ManifestError, SignatureError
from mpcinfer.trust import evidence
from mpcinfer.trust.evidence import Expected, report_data
from mpcinfer.trust.facts import Facts, digest
from mpcinfer.trust.pin import Member, Pin
from mpcinfer.trust.signing import Signed, Signer, open_signed

NONCE_BYTES = 32


@dataclass(frozen=True)
class Manifest:
    """All parties and then witnesses, by index, and the digest that all have signed. `pinned`: they are as pinned."""

    members: tuple[Member, ...]
    digest: bytes
    pinned: bool


def introduce(signer: Signer, facts: Facts, epoch: bytes) -> Signed:
    """A party's facts for the other parties of an epoch."""
    return signer.sign("facts", {"epoch": epoch.hex(), "facts": facts.to_json()})


def introduced(signed: Signed, cluster: Cluster, role: str, epoch: bytes) -> Facts:
    """What a party says to the others for this epoch; SignatureError or ManifestError if it is not its word."""
    said = open_signed(signed, cluster, "facts")
    if said.role != role:
        raise ManifestError(f"{role} shows the facts of {said.role} as its own")
    if said.content.get("epoch") != epoch.hex():
        raise ManifestError(f"{role} shows facts that it signed for another epoch; connecting again")
    return Facts.from_json(said.content.get("facts")).check(said, cluster)


def state(signer: Signer, facts: Facts, manifest: bytes, nonce: bytes) -> Signed:
    """A party's statement for whoever has drawn `nonce`. ManifestError if the host cannot produce its evidence."""
    shown = evidence.find(facts.evidence).produce(report_data(facts.key_pin, signer.key, nonce))
    content = {
        "facts": facts.to_json(),
        "manifest": manifest.hex(),
        "nonce": nonce.hex(),
        "evidence": base64.b64encode(shown).decode(),
    }
    return signer.sign("manifest", content)


@dataclass(frozen=True)
class Stated:
    """A party's statement, opened: true to its signature and the nonce, its evidence not looked at yet."""

    facts: Facts
    manifest: str
    evidence: bytes


def opened(signed: Signed, cluster: Cluster, role: str, nonce: bytes) -> Stated:
    """What the party `role` has stated for this nonce; SignatureError or ManifestError if it has not."""
    said = open_signed(signed, cluster, "manifest")
    if said.role != role:
        raise SignatureError(f"{role} shows a statement of {said.role}: it has no signature of its own to show")
    if said.content.get("nonce") != nonce.hex():
        raise ManifestError(
            f"the statement of {role} was not made for this connection: its nonce is another's. Somebody replays an "
            "old one; its operator has to look"
        )
    facts = Facts.from_json(said.content.get("facts")).check(said, cluster)
    try:
        shown = base64.b64decode(said.content["evidence"], validate=True)
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise ManifestError(f"the statement of {role} has no evidence in it, not even an empty one") from error
    return Stated(facts, str(said.content.get("manifest")), shown)


def examined(stated: Stated, nonce: bytes, pin: Pin | None, collateral: str = "") -> Member:
    """The party, once the pin (if there is one) and its evidence agree with it; ManifestError if they do not."""
    facts = stated.facts
    measured = pin.check(facts) if pin is not None else None
    try:
        kind = evidence.find(facts.evidence)
    except ConfigError as error:
        raise ManifestError(f"{facts.role} shows evidence that cannot be checked: {error}") from error
    if pin is None and kind.needs_collateral and not collateral:
        return Member(facts, None)
    expected = Expected(facts.role, measured, collateral)
    bound_to = report_data(facts.key_pin, bytes.fromhex(facts.signing_key), nonce)
    return Member(facts, kind.verify(stated.evidence, bound_to, expected))


def check(
    statements: Sequence[Signed], cluster: Cluster, nonce: bytes, pin: Pin | None, collateral: str = ""
) -> Manifest:
    """The manifest behind the statements of all parties, by index, and then of all witnesses.

    SignatureError or ManifestError, naming the party, if one is missing, forged, replayed, of somebody else, in
    disagreement with the others, or not what `pin` says.
    """
    if len(statements) != len(cluster.holders):
        raise SignatureError(f"{len(statements)} have signed the manifest, all {len(cluster.holders)} must")
    stated = [opened(s, cluster, e.role, nonce) for s, e in zip(statements, cluster.holders, strict=True)]
    if pin is not None:
        pin.check_cluster(cluster)
    members = tuple(examined(each, nonce, pin, collateral) for each in stated)
    whole = digest([each.facts for each in stated])
    for each in stated:
        if each.manifest != whole.hex():
            raise ManifestError(
                f"{each.facts.role} signs another manifest than the facts that the parties state: it knows one of them "
                "as somebody else, or lies. Connect again; if it stays like this, ask the operators"
            )
    return Manifest(members, whole, pin is not None)
