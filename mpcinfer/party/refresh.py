"""Refresh: other shares of a stored model, so that shares stolen before and after do not add up to anything.

Each pair of parties agrees on a key that nobody else has, the dealer included (Diffie-Hellman, for this refresh only);
the lower of the two adds what it expands to, the other one subtracts it. All write what they get beside what they
hold, and put it in its place once all have written it: `Catalogue.agree` settles what breaks off in between. Shares of
different refreshes do not fit, so each has a name, made of what all have sent, that the parties compare.

A witness is told the private key of its party, and checks that the party goes by it. Before anything is written all
vouch for the keys that were sent, and a party and its witness then compare what they have made of them.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from mpcinfer.errors import AgreementError, ProtocolError, TamperingError
from mpcinfer.party.actions import forget
from mpcinfer.party.catalogue import Catalogue, Model
from mpcinfer.party.inbox import Job
from mpcinfer.party.part import Part
from mpcinfer.party.running import Refused
from mpcinfer.party.stepping import Stepping
from mpcinfer.ring import prg
from mpcinfer.ring.domain import Z64
from mpcinfer.trust.commitment import commitment

_log = logging.getLogger(__name__)


async def refresh(by: Stepping, catalogue: Catalogue, part: Part, job: Job, step: dict[str, Any]) -> int:
    """Make the shares of versions of a model anew: how many versions. For its owner, or any party's operator."""
    name, version = job.facts["name"], job.facts["version"]
    owner = job.caller if job.caller.startswith("owner/") else ""
    models: list[Model] = await by.agreed(part, lambda: catalogue.refreshable(name, version, owner))
    for model in models:
        await _refreshed(by, catalogue, part, job, step, model)
        _log.info("shares of model %s version %d refreshed for %s", model.name, model.version, job.caller)
    return len(models)


async def _refreshed(
    by: Stepping, catalogue: Catalogue, part: Part, job: Job, step: dict[str, Any], model: Model
) -> None:
    secret = part.epoch.mesh.confide(secrets.token_bytes(32))
    try:
        private = X25519PrivateKey.from_private_bytes(secret)
    except ValueError as error:
        raise ProtocolError(f"party {by.index} gave its witness no key") from error
    own = f"{model.id.hex()} {private.public_key().public_bytes_raw().hex()}"
    told = await by.vote(part, None, own)
    generation = hashlib.sha256(" ".join(told[i] for i in sorted(told)).encode()).hexdigest()
    # before anything is staged: what has broken off later may be committed on somebody's word that all have done so
    await by.release(part, job, {**step, "deployment": model.id.hex()})

    def stage() -> bytes:
        if told[by.index] != own:  # at a witness
            raise TamperingError(
                f"party {by.index} has announced another key than it gave its witness. Suspect: party {by.index}"
            )
        others = {peer: _agreed(private, peer, text) for peer, text in told.items() if peer != by.index}
        keys = {peer: prg.extract(agreed, bytes.fromhex(generation), b"refresh") for peer, agreed in others.items()}
        return catalogue.stage_refresh(model, generation, _fresh(catalogue, model, by.index, keys))

    try:
        digest = await by.agreed(part, stage)
        held = commitment(prg.derive(secret, "commitment"), b"refresh", digest).hex()
        if len(set((await by.vote(part, None, generation, upload=held)).values())) > 1:
            raise Refused from AgreementError("the parties have agreed on different keys; nothing was changed")
    except Refused:
        catalogue.drop_refresh(model)
        raise
    # From here on another party may have put its shares in their place: if this one cannot, the next epoch does it.
    catalogue.commit_refresh(model)
    forget(by, part, model.id)
    await by.vote(part, None)


def _agreed(private: X25519PrivateKey, peer: int, text: str) -> bytes:
    """The secret of this party and another one, from what that has announced."""
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(text.partition(" ")[2])))
    except ValueError as error:
        raise ProtocolError(f"party {peer} announced no key that can be used") from error


def _fresh(catalogue: Catalogue, model: Model, index: int, keys: Mapping[int, bytes]) -> Iterator[bytes]:
    """This party's other share of each parameter."""
    for name, held in catalogue.load(model).items():
        share = held.share
        for peer, key in keys.items():
            mask = prg.expand(prg.derive(key, name), tuple(share.shape), Z64)
            share = share + mask if index < peer else share - mask
        yield bytes(Z64.pack(share))
