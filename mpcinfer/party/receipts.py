"""This party's side of receipts: what is kept of a request while it is answered, and signed with its answers."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from mpcinfer.config import Cluster
from mpcinfer.errors import StoreError
from mpcinfer.party.audit import Audit
from mpcinfer.party.catalogue import Model
from mpcinfer.party.inbox import Job
from mpcinfer.party.part import Phase
from mpcinfer.party.transcript import Evidence
from mpcinfer.trust.chain import Head
from mpcinfer.trust.commitment import answers_commitment, check_salt, salt_commitment, upload_commitment
from mpcinfer.trust.receipt import FORMAT, PURPOSE
from mpcinfer.trust.signing import Signed, Signer
from mpcinfer.wire.identity import Identity
from mpcinfer.wire.v1 import tensor_pb2, trust_pb2


class Receipts:
    """Makes receipts, and the lines of the audit log that they refer to."""

    def __init__(self, identity: Identity, cluster: Cluster, audit: Audit) -> None:
        self.audit = audit
        self.parties, self.index = cluster.n, cluster.endpoint(identity.role).index
        self.certificate = hashlib.sha256(identity.cert_pem).hexdigest()
        self._signer = Signer(identity)
        self._signs = identity.role.startswith("party/")  # witnesses vouch in their own way

    def sign(self, content: dict[str, Any]) -> Signed:
        """As this party."""
        return self._signer.sign(PURPOSE, content)

    def open(self, job: Job, model: Model, inputs: Sequence[tensor_pb2.Tensor]) -> Account:
        """Begin to keep account of a request; InputError if it brings a salt that is none."""
        if job.salt:
            check_salt(job.salt)
        return Account(self, job, model, job.salt if self._signs else b"", inputs)


class Account:
    """One request's. Used by the thread that answers it, beside the lane."""

    def __init__(
        self, receipts: Receipts, job: Job, model: Model, salt: bytes, inputs: Sequence[tensor_pb2.Tensor]
    ) -> None:
        self._by, self._job, self._model, self._salt = receipts, job, model, salt
        self._shares = upload_commitment(salt, inputs) if salt else b""
        self._size = sum(t.ByteSize() for t in inputs)
        self._line: Head | None = None
        self._answered = b""
        self._tapes: list[str] = []
        self._count = self._answers = self._rounds = self._sent = 0
        self._openings: Counter[str] = Counter()
        self._transcript = b""
        self._epoch = self._manifest = ""

    def add(self, online: Phase, evidence: Evidence | None) -> None:
        """A step has been run."""
        self._rounds += online.rounds
        self._sent += online.bytes_sent
        if evidence is None:
            return
        self._epoch, self._manifest = evidence.epoch.hex(), evidence.manifest.hex()
        self._tapes = [*self._tapes[:1], evidence.tape.hex()]
        self._count += 1
        self._openings += evidence.openings
        self._transcript = hashlib.sha256(self._transcript + evidence.seal).digest()

    def answer(self, outputs: Sequence[tensor_pb2.Tensor]) -> trust_pb2.Signed | None:
        """Write down that an answer leaves, before it does: its receipt, if the request brought a salt."""
        self._answers += 1
        if self._line is None:
            self._line = self._write(self._job.action, outcome="ok", bytes_in=self._size)
        if not self._salt:
            return None
        self._answered = answers_commitment(self._salt, self._answered, outputs)
        return self._by.sign(self._content(self._line)).message()

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Write down, at the end, how long the text is that is written meanwhile."""
        try:
            yield
        finally:
            if self._line is not None:
                with suppress(StoreError):  # what left was written down before it did
                    self._write("end", answers=self._answers, rounds=self._rounds, bytes_sent=self._sent)

    def _write(self, action: str, **facts: Any) -> Head:
        model = {"model": self._model.name, "version": self._model.version, "deployment": self._model.id.hex()}
        return self._by.audit.write(action, who=self._job.caller, request=self._job.id.hex(), **model, **facts)

    def _content(self, line: Head) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "party": self._by.index,
            "parties": self._by.parties,
            "certificate": self._by.certificate,
            "request": self._job.id.hex(),
            "action": self._job.action,
            "client": self._job.caller,
            "asked": self._job.facts,
            "model": self._model.name,
            "version": self._model.version,
            "deployment": self._model.id.hex(),
            "model_commitment": self._model.granted.grant.model if self._model.granted is not None else "",
            "manifest": self._manifest,
            "epoch": self._epoch,
            "tapes": {"first": self._tapes[0], "last": self._tapes[-1], "count": self._count},
            "rounds": self._rounds,
            "openings": dict(self._openings),
            "bytes_sent": self._sent,
            "transcript": self._transcript.hex(),
            "salt": salt_commitment(self._salt).hex(),
            "request_shares": self._shares.hex(),
            "answer_shares": self._answered.hex(),
            "answers": self._answers,
            "log": line.to_json(),
            "time": round(time.time(), 3),
        }
