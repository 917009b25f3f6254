"""Auditing the dealer: a sample of its tapes is opened instead of used, and everything on it is checked.

Which ones is tossed by all parties once they hold the tape, so nobody knows before. What is opened is the keys of what
would have masked one run, and the corrections that are functions of these masks alone: a tape that was opened masks
nothing. Products with kept masks B, those of weights and of rows of caches, are checked without opening B or the
corrections, which would be the weights: the parties open op(A, [B]_i) - [C]_i + [0]_i, the sum of which must be 0.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from mpcinfer.errors import IdentityError, MpcInferError, ProtocolError, SignatureError, TamperingError
from mpcinfer.party.epoch import Epoch
from mpcinfer.protocol.batch import Batch
from mpcinfer.protocol.cache import CacheUse
from mpcinfer.protocol.correlation import Tensors, expand, fields_of, free_values
from mpcinfer.protocol.evidence import Digests, KeptMasks, commitment, statement
from mpcinfer.protocol.session import TapeKeys
from mpcinfer.protocol.tracing import Plan
from mpcinfer.protocol.types import Weight
from mpcinfer.ring import prg
from mpcinfer.trust.signing import Signed, open_signed
from mpcinfer.wire.mesh import CONTROL, MAX_MESSAGE

_log = logging.getLogger(__name__)

# Gives this party's shares of the masks of rows of a cache, in parts.
RowMasks = Callable[[str, tuple[tuple[int, int], ...]], list[torch.Tensor]]


class Coin:
    """One party's part of a toss that all have a say in: first everybody's commitment, then everybody's nonce."""

    def __init__(self, rate: float, nonce: str = "") -> None:
        self.rate = rate
        self.nonce = nonce or secrets.token_hex(32)
        self.commitment = _committed(self.nonce)

    def falls(self, commitments: Mapping[int, str], nonces: Mapping[int, str]) -> bool:
        """Whether the tape is to be audited; TamperingError if a party has changed its mind."""
        for peer, nonce in nonces.items():
            if not hmac.compare_digest(_committed(nonce), commitments[peer]):
                _caught(f"party {peer} has tossed another coin than it had committed to")
        tossed = hashlib.sha256("".join(nonces[peer] for peer in sorted(nonces)).encode()).digest()
        return int.from_bytes(tossed[:8]) < self.rate * (1 << 64)


def _committed(nonce: str) -> str:
    return hashlib.sha256(b"mpcinfer v1 coin\0" + nonce.encode()).hexdigest()


@dataclass
class Dealt:
    """What a party keeps of a tape until it is known whether it will be audited. `digest`: of the plan and the rows."""

    tape: bytes
    digest: bytes
    plan: Plan
    keys: TapeKeys = field(repr=False)
    corrections: bytearray = field(repr=False)
    weights: Mapping[str, Weight] = field(repr=False)
    use: CacheUse | None
    statement: Signed | None

    def check(self, epoch: Epoch) -> None:
        """On delivery: the dealer has signed what it sent to this party. Afterwards neither can blame the other.

        A witness gets no statement: the dealer tells it what the corrections are.
        """
        if epoch.mesh.shadow:
            return
        index, last = epoch.mesh.index, epoch.mesh.parties - 1
        if self.statement is None:
            _caught("the dealer does not sign what it deals")
        try:
            said = self.vouched(epoch, self.statement)
        except SignatureError as error:
            _caught(f"the dealer's signature: {error}")
        root = self.digests().root() if index == last else ""
        if said["keys"][index] != commitment(self.keys.passing) or said["corrections"] != root:
            _caught("the dealer has signed something else than it has sent")

    def vouched(self, epoch: Epoch, signed: Signed) -> dict[str, Any]:
        """What the dealer says of this tape; SignatureError if this is not its word on it."""
        assert epoch.cluster is not None
        opened = open_signed(signed, epoch.cluster, "dealing")
        said = opened.content
        about = statement(epoch.id, self.tape, self.digest, [])
        wrong = any(said.get(name) != about[name] for name in ("session", "tape", "plan"))
        if opened.role != "dealer" or wrong or len(said.get("keys", ())) != epoch.mesh.parties:
            raise SignatureError("a statement of somebody else, or about another tape")
        return said

    def digests(self) -> Digests:
        """Of the corrections as they came (to the last party)."""
        found = Digests(self.keys.passing, self.keys.kept)
        for batch, part in self.parts(lambda batch: True, self.corrections):
            found.add(batch, [part])
        return found

    def parts(self, which: Callable[[Batch], bool], data: bytes | bytearray) -> list[tuple[Batch, memoryview]]:
        """The batches of the plan, each with its part of `data`, in which only those of `which` have one."""
        found, rest = [], memoryview(data)
        for batch in self.plan.batches:
            size = batch.correction_bytes if which(batch) else 0
            found.append((batch, rest[:size]))
            rest = rest[size:]
        if rest:
            raise ProtocolError("more corrections than the plan asks for")
        return found


def audit(epoch: Epoch, evidence: Dealt, rows: RowMasks | None = None) -> None:
    """Open a tape with the other parties, who do the same, and check all of it; it must not be used afterwards.

    rows: this party's shares of the masks of rows that the tape's products are of. TamperingError, at all parties, says
    who is to blame.
    """
    seeds = _pairwise_seeds(epoch)
    told = _told(epoch, evidence)
    suspect = _opened_wrongly(epoch, evidence, told)
    _agree(epoch, suspect)
    keys = [bytes.fromhex(told[party].head["key"]) for party in range(epoch.mesh.parties)]
    _agree(epoch, _products(epoch, evidence, keys, seeds, rows))
    _log.info("a tape of the dealer was audited: it is sound, and burnt")


def _caught(suspect: str, meanwhile: Callable[[], object] = lambda: None) -> NoReturn:
    _log.error("TAMPERING: %s", suspect)
    with suppress(MpcInferError):
        meanwhile()
    raise TamperingError(f"{suspect}; nothing was computed with it. Find out why before you go on")


def _agree(epoch: Epoch, suspect: str) -> None:
    """All go on, or none."""
    answers = epoch.mesh.consult(suspect.encode(), lambda own, witness: own or witness)
    said = [f"party {peer} says: {a.decode(errors='replace')[:200]}" for peer, a in sorted(answers.items()) if a]
    if suspect or said:
        # nobody leaves, which ends the connections, before all know why
        _caught(suspect or said[0], lambda: epoch.mesh.consult(b"", _the_party))


def _the_party(own: bytes, witness: bytes) -> bytes:
    """What is shown is the party's: its witness has nothing of its own here, and follows."""
    return own


# --- what is opened --------------------------------------------------------------------------------------------------


@dataclass
class _Opened:
    """What one party shows of a tape: its key and the dealer's statement; the last one corrections, too."""

    head: dict[str, Any]
    corrections: bytes = field(repr=False)


def _closed(batch: Batch) -> bool:
    """Whether the corrections depend on kept masks, and stay closed."""
    return bool(batch.item.operand)


def _told(epoch: Epoch, evidence: Dealt) -> dict[int, _Opened]:
    """What each party shows."""
    head: dict[str, Any] = {
        "key": evidence.keys.passing.hex(),
        "statement": evidence.statement.to_json() if evidence.statement is not None else {},
        "closed": {},
    }
    shown = b""
    if epoch.mesh.index == epoch.mesh.parties - 1:
        digests = zip(evidence.plan.batches, evidence.digests().found, strict=True)
        head["closed"] = {batch.names[0]: digest.hex() for batch, digest in digests if _closed(batch)}
        parts = evidence.parts(lambda batch: True, evidence.corrections)
        shown = b"".join(part for batch, part in parts if not _closed(batch))
    own = json.dumps(head).encode() + b"\n" + shown
    told, most = {}, evidence.plan.correction_bytes() + MAX_MESSAGE
    for party, payload in sorted(epoch.mesh.consult(own, _the_party, most).items()):
        text, _, corrections = payload.partition(b"\n")
        try:
            shown_head = json.loads(text)
        except (ValueError, RecursionError):
            shown_head = {}
        told[party] = _Opened(shown_head if isinstance(shown_head, dict) else {}, corrections)
    return told


def _opened_wrongly(epoch: Epoch, evidence: Dealt, told: Mapping[int, _Opened]) -> str:
    """Who has dealt or shown something wrong, "" if nobody has."""
    parties, index = epoch.mesh.parties, epoch.mesh.index
    keys: dict[int, bytes] = {}
    roots: dict[int, str] = {}
    own: dict[str, Any] = {}
    for party in [index, *(other for other in range(parties) if other != index)]:
        try:
            said = evidence.vouched(epoch, Signed.from_json(told[party].head["statement"]))
            key = bytes.fromhex(told[party].head["key"])
        except (IdentityError, KeyError, TypeError, ValueError):  # of a signature, or of a certificate
            return f"party {party} shows a statement that the dealer never made about this tape"
        own = own or said
        if said["keys"] != own["keys"]:
            return f"the dealer has signed different keys for parties {index} and {party}"
        if commitment(key) != said["keys"][party]:
            return f"party {party} shows another key than it was dealt with"
        keys[party] = key
        roots[party] = said["corrections"]
    passing = [keys[party] for party in range(parties)]
    last, digests = told[parties - 1], Digests(passing[-1])
    try:
        shown = evidence.parts(lambda batch: not _closed(batch), last.corrections)
        for batch, part in shown:
            if _closed(batch):
                digests.found.append(bytes.fromhex(last.head["closed"][batch.names[0]]))
            else:
                digests.add(batch, [part])
    except (ProtocolError, KeyError, TypeError, ValueError):
        return f"party {parties - 1} does not show the corrections of the plan"
    if digests.root() != roots[parties - 1]:
        return f"party {parties - 1} shows other corrections than the dealer has signed"
    for batch, part in shown:
        if not _closed(batch) and b"".join(batch.deal(passing, _no_masks)) != part:
            return f"the dealer has dealt and signed a wrong {type(batch.item).__name__}"
    return ""


def _no_masks(operand: str) -> torch.Tensor:
    raise ProtocolError(f"a correlation depends on the kept mask of {operand} and does not say so")


# --- products with kept masks ----------------------------------------------------------------------------------------


def _pairwise_seeds(epoch: Epoch) -> dict[int, bytes]:
    """A fresh seed with each other party, drawn by the lower one."""
    seeds, index = {}, epoch.mesh.index
    for peer, link in epoch.mesh.links.items():
        if peer > index:
            seeds[peer] = secrets.token_bytes(prg.SEED_BYTES)
            link.send(CONTROL, seeds[peer])
    for peer, link in epoch.mesh.links.items():
        if peer < index:
            seeds[peer] = link.receive(CONTROL)
    return seeds


def _products(
    epoch: Epoch, evidence: Dealt, keys: Sequence[bytes], seeds: Mapping[int, bytes], rows: RowMasks | None
) -> str:
    """Check products with kept masks, opening nothing but that they are right. `keys`: all parties' passing ones."""
    masks = _own_masks(evidence, rows)
    own: list[tuple[Batch, str, torch.Tensor]] = []
    last = epoch.mesh.index == epoch.mesh.parties - 1
    for batch, part in evidence.parts(lambda batch: last, evidence.corrections):
        if _closed(batch):
            (name,) = batch.names  # kinds with an operand are dealt one by one
            shares = expand(batch.item, name, evidence.keys.passing, last=last, correction=part)
            wanted = batch.item.derive(free_values(batch.item, name, keys), masks)
            own += [(batch, n, x) for n, x in _hidden(epoch, batch, wanted, shares, seeds).items()]
    rings = [fields_of(batch.item)[1][n].ring for batch, n, _ in own]
    packed = b"".join(r.pack(x) for r, (_, _, x) in zip(rings, own, strict=True))
    told = epoch.mesh.consult(packed, _the_party, max(len(packed), MAX_MESSAGE))
    for peer, payload in told.items():
        if len(payload) != len(packed):
            return f"party {peer} does not take part in the check"
    wrong, at = "", 0
    for ring, (batch, _, share) in zip(rings, own, strict=True):
        size = ring.packed_bytes(share.numel())
        total = torch.zeros_like(share)
        for payload in told.values():
            total = ring.add(total, ring.unpack(memoryview(payload)[at : at + size], tuple(share.shape)))
        at += size
        if total.any() and not wrong:
            wrong = (
                f"the dealer has dealt a wrong {type(batch.item).__name__}, or a party has shown a wrong share of the "
                "check: which, cannot be told without opening the weights"
            )
    return wrong


def _hidden(epoch: Epoch, batch: Batch, wanted: Tensors, shares: Tensors, seeds: Mapping[int, bytes]) -> Tensors:
    """This party's shares of what must be 0: op(A, [B]_i) - [C]_i + [0]_i."""
    found = {}
    for n, f in fields_of(batch.item)[1].items():
        share = f.ring.sub(f.ring.reduce(wanted[n].to(f.ring.dtype)), shares[n])
        for peer, seed in seeds.items():
            zero = prg.expand(prg.derive(seed, batch.names[0], n), f.shape, f.ring)
            share = f.ring.add(share, zero) if peer > epoch.mesh.index else f.ring.sub(share, zero)
        found[n] = share
    return found


def _own_masks(evidence: Dealt, rows: RowMasks | None) -> Callable[[str], torch.Tensor]:
    """This party's shares of the kept masks that a tape's products are of."""
    new = KeptMasks(evidence.keys, evidence.plan)

    def share(operand: str) -> torch.Tensor:
        weight = evidence.weights.get(operand)
        if weight is not None and weight.mask is not None:
            return weight.mask()
        before = rows(operand, evidence.use.runs) if rows is not None and evidence.use is not None else []
        own = [new.share(operand)] if operand in evidence.plan.kept else []
        return torch.cat([*before, *own], dim=-2)

    return share
