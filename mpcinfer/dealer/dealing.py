"""What the dealer knows and does: sessions, one-time tapes, the lasting masks of weights. No gRPC here.

It holds no share of a weight, an input or an output, and no call could bring one. Seeds live in memory only, for as
long as their session: dealer and any one party together could undo every mask, also in retrospect.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from mpcinfer.dealer.session import NamedTape, Session
from mpcinfer.errors import (
    AbortedError,
    AgreementError,
    ConflictError,
    DeadlineError,
    InputError,
    UnavailableError,
)
from mpcinfer.protocol.batch import Batch
from mpcinfer.protocol.cache import CacheUse, side_by_side
from mpcinfer.protocol.correlation import FixedMasks
from mpcinfer.protocol.evidence import Digests, statement
from mpcinfer.protocol.session import session_keys
from mpcinfer.protocol.tracing import Plan
from mpcinfer.trust.signing import Signed, Signer

_log = logging.getLogger(__name__)


class Dealer:
    """One cluster's dealer. Thread-safe; calls of different parties wait for each other."""

    def __init__(
        self, parties: int, cluster_digest: bytes, signer: Signer | None = None, *, witnessed: bool = False
    ) -> None:
        """signer: of tapes that may be audited. witnessed: whether the last party has a witness, which will ask for the
        digests of corrections.
        """
        self.parties = parties
        self.cluster_digest = cluster_digest
        self._signer = signer
        self._witnessed = witnessed
        self.tapes_dealt = 0
        self.bytes_sent = 0
        self.seconds_dealing = 0.0
        self.tapes_burnt = 0
        self.sessions = 0
        self.seconds_waited = [0.0] * parties  # by party: for the others
        self.lag: Callable[[float], object] = lambda seconds: None  # told of each tape that has been sent
        self._id = b""
        self._session: Session | None = None
        self._past: set[bytes] = set()
        self._changed = threading.Condition()

    @property
    def ready(self) -> bool:
        """Whether all parties have joined the current session."""
        session = self._session
        return session is not None and bool(session.keys)

    @property
    def open_tapes(self) -> int:
        """How many tapes some parties have named and others not yet."""
        session = self._session
        return len(session.tapes) if session is not None else 0

    @property
    def slots(self) -> int:
        """For how many slots there are masks of caches."""
        session = self._session
        return len(session.slots) if session is not None else 0

    def join(
        self, session_id: bytes, index: int, nonce: bytes, public_key: bytes, timeout: float
    ) -> tuple[bytes, bytes, list[bytes]]:
        """Join a session and wait for the others: the dealer's nonce, its public key for this party, all nonces.

        A new session id ends the session before: its seeds, tapes and masks are forgotten.
        """
        if len(session_id) != 16 or len(nonce) != 32 or not 0 <= index < self.parties:
            raise InputError("a party joins with a session id of 16 bytes and a nonce of 32")
        private = X25519PrivateKey.generate()
        try:
            secret = private.exchange(X25519PublicKey.from_public_bytes(public_key))
        except ValueError as error:
            raise InputError("this is not an X25519 public key") from error
        with self._changed:
            if session_id != self._id:
                if session_id in self._past:
                    raise AbortedError("this session has ended; the parties are forming a new one")
                if self._session is not None:
                    self._session.ended = True
                self.sessions += 1
                self._past.add(session_id)
                self._id, self._session = session_id, Session(secrets.token_bytes(32))
                _log.info("session %s begins", session_id.hex()[:8])
            session = self._session
            assert session is not None
            if index in session.nonces:
                raise ConflictError(f"party {index} joined this session already")
            session.nonces[index] = nonce
            session.public[index] = public_key, private.public_key().public_bytes_raw()
            session.secrets[index] = secret
            if len(session.nonces) == self.parties:
                self._agree(session_id, session)
            self._changed.notify_all()
            self._wait(lambda: bool(session.keys) or session.ended, timeout, "the other parties did not join in time")
            if session.ended:
                raise AbortedError("this session has ended; the parties are forming a new one")
            return session.nonce, session.public[index][1], [session.nonces[i] for i in range(self.parties)]

    def _agree(self, session_id: bytes, session: Session) -> None:
        nonces = [session.nonces[i] for i in range(self.parties)]
        session.keys = [
            session_keys(
                session.secrets.pop(i),
                index=i,
                session=session_id,
                cluster=self.cluster_digest,
                public_keys=session.public[i],
                party_nonces=nonces,
                dealer_nonce=session.nonce,
            )
            for i in range(self.parties)
        ]

    def witness(self, session_id: bytes, index: int, timeout: float) -> tuple[bytes, bytes, list[bytes]]:
        """The witness of a party joins a session: the key that the party begins with, the dealer's and all nonces.

        Once, and before the first tape: the key chain moves on with each, for both of them.
        """
        with self._changed:
            self._wait(
                lambda: session_id == self._id or session_id in self._past, timeout, "the parties did not join in time"
            )
            session = self._session
            if session is None or session_id != self._id:
                raise AbortedError("this session has ended; the parties are forming a new one")
            self._wait(lambda: bool(session.keys) or session.ended, timeout, "the parties did not join in time")
            if session.ended or session.tapes or session.spent:
                raise AbortedError("the witness came too late for this session; the parties must form a new one")
            if index in session.witnesses:
                raise ConflictError(f"the witness of party {index} joined this session already")
            session.witnesses.add(index)
            return session.keys[index].export(), session.nonce, [session.nonces[i] for i in range(self.parties)]

    def corrected(self, session_id: bytes, tape: bytes, timeout: float) -> bytes:
        """SHA-256 of the corrections of a tape, once they are dealt; once."""
        with self._changed:
            session = self._session
            if session is None or session_id != self._id:
                raise AbortedError("this session has ended; the parties are forming a new one")
            self._wait(
                lambda: tape in session.corrected or session.ended, timeout, "the parties did not ask for this tape"
            )
            if session.ended:
                raise AbortedError("this session has ended; the parties are forming a new one")
            return session.corrected.pop(tape)

    def deal(
        self,
        session_id: bytes,
        index: int,
        tape: bytes,
        digest: bytes,
        plan: bytes,
        timeout: float,
        alive: Callable[[], bool] = lambda: True,
        use: CacheUse | None = None,
        signed: bool = False,
    ) -> Iterator[memoryview | Signed]:
        """Wait until all parties have named the same plan for `tape`, then yield the corrections (to the last party).

        use: the rows of caches that it is about, which they must name too. signed: at the end yield a statement of what
        was dealt.

        A tape is dealt once; two plans for it, a second call by one party, rows that the dealer does not have, a
        time-out and a caller who goes while waiting (`alive` says so; call `wake` then) burn it. NotFoundError, with
        the tape untouched, if `plan` is empty and the dealer does not have it any more.
        """
        if len(tape) != 16 or not 0 <= index < self.parties:
            raise InputError("a tape has an id of 16 bytes")
        with self._changed:
            session = self._session
            if session is None or session_id != self._id or not session.keys:
                raise AbortedError("the dealer does not know this session (it may have restarted); form a new one")
            named = session.plan(digest, plan)
            agreed = named if use is None else named.repeated(use.times)
            digest = use.digest(digest) if use is not None else digest
            if tape in session.spent:
                raise ConflictError("this tape was dealt or burnt already; ask for a new one")
            state = session.tapes.setdefault(tape, NamedTape(digest))
            if index in state.named:
                self._burn(session, tape)
                raise ConflictError("a party asked twice for one tape; it is burnt, ask for a new one")
            if state.digest != digest:
                self._burn(session, tape)
                raise AgreementError("the parties named different plans for one tape; it is burnt")
            try:
                session.check_rows(named, use)
            except (InputError, AgreementError):
                self._burn(session, tape)
                raise
            state.named.add(index)
            if len(state.named) == self.parties:
                session.spent.add(tape)
                del session.tapes[tape]
                self.tapes_dealt += 1
                state.keys = [chain.next(tape, digest) for chain in session.keys]
                state.caches = session.keep_masks(state.keys, agreed, use)
                state.fixed = session.fixed_of(agreed.deployment)
                self._changed.notify_all()
            began = time.perf_counter()
            try:
                self._wait(
                    lambda: len(state.named) == self.parties or state.burnt or session.ended or not alive(),
                    timeout,
                    "the other parties did not ask for this tape in time",
                )
            except DeadlineError:
                self._burn(session, tape)
                raise
            finally:
                self.seconds_waited[index] += time.perf_counter() - began
            if len(state.named) < self.parties or session.ended:
                self._burn(session, tape)
                raise AbortedError("this tape is burnt; send the request again")
        passing, last = [keys.passing for keys in state.keys], state.keys[-1]
        digests = Digests(last.passing, last.kept) if signed else None
        if index == self.parties - 1:
            began, digest_of_all = time.perf_counter(), hashlib.sha256()
            for part in self._corrections(session, state, agreed, use, digests):
                if self._witnessed:
                    digest_of_all.update(part)
                yield part
            self.lag(time.perf_counter() - began)
            if self._witnessed and agreed.correction_bytes():
                with self._changed:
                    session.corrected[tape] = digest_of_all.digest()
                    self._changed.notify_all()
        if digests is not None:
            if self._signer is None:
                raise UnavailableError("this dealer has no key to sign with")
            root = digests.root() if index == self.parties - 1 else ""
            yield self._signer.sign("dealing", statement(session_id, tape, digest, passing, root))

    def wake(self) -> None:
        """Look again whether those who wait are still there."""
        with self._changed:
            self._changed.notify_all()

    def _burn(self, session: Session, tape: bytes) -> None:
        state = session.tapes.pop(tape, None)
        if state is not None:
            state.burnt = True
            self.tapes_burnt += 1
            session.spent.add(tape)
            self._changed.notify_all()

    def forget(self, session_id: bytes, slots: Sequence[bytes], deployment: str = "") -> None:
        """Drop the masks of caches, and those of a deployment's weights."""
        with self._changed:
            if self._session is not None and session_id == self._id:
                self._session.forget(slots, deployment)

    def _corrections(
        self, session: Session, state: NamedTape, plan: Plan, use: CacheUse | None, digests: Digests | None
    ) -> Iterator[memoryview]:
        keys, slots = [keys.passing for keys in state.keys], state.caches
        uses = () if use is None else use.all
        new = {item.cache: item.shape[-2] for _, item in plan.entries if item.growing}  # type: ignore[attr-defined]

        def fixed(run: int, weight: str) -> torch.Tensor:
            if slots and weight in slots[0]:
                grown = (run + 1) * new.get(weight, 0)
                rows = [
                    caches[weight].read((*each.runs, (each.count, each.count + grown)))
                    for each, caches in zip(uses, slots, strict=True)
                ]
                return rows[0] if len(rows) == 1 else side_by_side(rows)
            mask = state.fixed.get(weight)
            if mask is None:
                raise AbortedError("the dealer does not hold this deployment's masks; they must be opened again")
            return mask

        for batch in plan.batches:
            if session.ended:
                raise AbortedError("this session has ended; the parties are forming a new one")
            began = time.perf_counter()
            # products with caches are dealt one by one: theirs is the run of the first and only name
            run = int(batch.names[0].partition("/")[0]) if use is not None and use.times > 1 else 0
            parts = self._dealt(batch, keys, partial(fixed, run))
            if digests is not None:
                parts = list(parts)
                digests.add(batch, parts)
            for part in parts:
                self.seconds_dealing += time.perf_counter() - began
                self.bytes_sent += len(part)
                yield part
                began = time.perf_counter()

    def _dealt(self, batch: Batch, keys: list[bytes], fixed: FixedMasks) -> Iterable[memoryview]:
        """The corrections of a batch. (What kept masks come from is not needed: they have no corrections.)"""
        return batch.deal(keys, fixed)

    def _wait(self, done: Callable[[], bool], timeout: float, failure: str) -> None:
        if not self._changed.wait_for(done, timeout):
            raise DeadlineError(failure)
