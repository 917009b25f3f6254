"""Uploads of models: checked, and staged in the store until the lane commits them."""

from __future__ import annotations

import base64
import hashlib
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import grpc

from mpcinfer.config import Limits
from mpcinfer.errors import BusyError, InputError, UploadError
from mpcinfer.graph.program import Parameter, Program
from mpcinfer.party.grants import Grants
from mpcinfer.party.inbox import Inbox, Job
from mpcinfer.party.record import WeightEntry
from mpcinfer.party.store import Store
from mpcinfer.ring import prg
from mpcinfer.trust.commitment import check_salt, commitment
from mpcinfer.trust.grant import check_model_name
from mpcinfer.trust.signing import Signed
from mpcinfer.wire.v1 import party_pb2

_MOST_VOCABULARY = 16 << 20
_MOST_AT_A_TIME = 4
_MOST_OF_OWNER = 2  # who may take all the time that there is, and send nothing


class Uploads:
    """Takes in uploads, a few at a time."""

    def __init__(self, store: Store, inbox: Inbox, grants: Grants, limits: Limits, *, watched: bool = False) -> None:
        """watched: whether there are witnesses, so that uploads must be committed to."""
        self._watched = watched
        self._store = store
        self._inbox = inbox
        self._grants = grants
        self._limits = limits
        self._running: Counter[str] = Counter()  # by owner
        self._changed = threading.Condition()

    @contextmanager
    def staged(self, parts: Iterator[party_pb2.DeployRequest], owner: str, patience: float) -> Iterator[Job]:
        """Stage an upload, and have it deployed: the request. What is not committed at the end is discarded.

        patience: how many seconds to wait for room.
        """
        with ExitStack() as stack:
            self._enter(owner, patience)
            try:
                header, program, entries = self._header(next(parts, None))
                grant = Signed.of(header.grant)
                self._grants.verified(grant, owner, header.name, program)
                metadata = {
                    "name": header.name,
                    "owner": owner,
                    "program": program.to_bytes().decode(),
                    "created": time.time(),
                    "grant": grant.to_json(),
                    "vocabulary": base64.b64encode(header.vocabulary).decode(),
                }
                stack.enter_context(self._inbox.arriving(header.request_id))
                staged = self._store.stage(header.request_id, metadata, entries)
                stack.callback(staged.discard)
                for part in parts:
                    if part.WhichOneof("part") != "chunk":
                        raise UploadError("after its header an upload consists of chunks")
                    staged.write(part.chunk)
                staged.finish(header.size, header.digest)
            except grpc.RpcError as error:
                raise UploadError("the upload ended before it was complete") from error
            finally:
                self._leave(owner)
            vocabulary = hashlib.sha256(header.vocabulary).hexdigest()
            facts = {
                "name": header.name,
                "program": program.digest().hex(),
                "vocabulary": vocabulary,
                "grant": hashlib.sha256(header.grant.payload).hexdigest(),
            }
            job = Job(header.request_id, "deploy", owner, facts, None, salt=header.salt)
            if self._watched:
                job.upload = commitment(header.salt, b"model", *(w.seed for w in header.weights), header.digest).hex()
            yield job

    def _enter(self, owner: str, patience: float) -> None:
        def room() -> bool:
            return self._running.total() < _MOST_AT_A_TIME and self._running[owner] < _MOST_OF_OWNER

        with self._changed:
            if not self._changed.wait_for(room, patience):
                raise BusyError("too many uploads at a time; send it again later")
            self._running[owner] += 1

    def _leave(self, owner: str) -> None:
        with self._changed:
            self._running[owner] -= 1
            self._running += Counter()  # forgets who has none
            self._changed.notify_all()

    def _header(
        self, first: party_pb2.DeployRequest | None
    ) -> tuple[party_pb2.DeployHeader, Program, list[WeightEntry]]:
        """The first message of an upload, checked."""
        if first is None or first.WhichOneof("part") != "header":
            raise UploadError("an upload begins with its header")
        header = first.header
        if self._watched:
            check_salt(header.salt)
        check_model_name(header.name)
        entries = [WeightEntry(w.name, tuple(w.shape), w.frac_bits, w.seed or None) for w in header.weights]
        program = Program.from_bytes(header.program)
        check_manifest(program, entries)
        if any(entry.seed is not None and len(entry.seed) != prg.SEED_BYTES for entry in entries):
            raise InputError(f"a weight's seed has {prg.SEED_BYTES} bytes")
        # what seeds stand for counts like what is sent
        expanded = sum(8 * math.prod(entry.shape) for entry in entries)
        if max(header.size, expanded) > self._limits.max_upload_mb << 20:
            raise UploadError(f"the upload is larger than this party allows ({self._limits.max_upload_mb} MiB)")
        if len(header.vocabulary) > _MOST_VOCABULARY:
            raise UploadError(f"the vocabulary is larger than {_MOST_VOCABULARY >> 20} MiB")
        return header, program, entries


def check_manifest(program: Program, weights: Sequence[WeightEntry]) -> None:
    """InputError unless the uploaded weights are exactly the program's parameters, in order."""

    def line(w: Parameter | WeightEntry) -> tuple[str, tuple[int, ...], int]:
        return w.name, tuple(w.shape), w.frac_bits

    if [line(p) for p in program.parameters] != [line(w) for w in weights]:
        raise InputError("the uploaded weights are not the program's parameters")
