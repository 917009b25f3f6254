"""Requests that clients have sent to this party, waiting for party 0 to announce them."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from mpcinfer.canonical import canonical
from mpcinfer.errors import AgreementError, BusyError, ConflictError, InputError, ProtocolError

_LATE_SECONDS = 3.0  # how much later than at party 0 a request may arrive at another


@dataclass
class Job:
    """One request. `facts` are public and must be equal at every party; `content` is this party's own.

    `upload` commits to that content, and must be equal at a party and its witness; empty where there are none.
    """

    id: bytes
    action: str  # "infer", "generate", "deploy", "remove", "grant" or "refresh"
    caller: str
    facts: dict[str, Any]
    content: Any = field(repr=False)
    deadline: float = 0.0  # on time.monotonic
    taken: bool = False  # all parties have agreed to do it: never again
    first_announced: float = 0.0  # at party 0, on time.monotonic
    result: Future[Any] = field(default_factory=Future, repr=False)
    salt: bytes = field(default=b"", repr=False)
    upload: str = ""

    def digest(self) -> str:
        """Of everything public about the request."""
        public = {"id": self.id.hex(), "action": self.action, "caller": self.caller, "facts": self.facts}
        return hashlib.sha256(canonical(public)).hexdigest()

    def fail(self, error: Exception) -> None:
        """Answer with an error, unless answered."""
        with suppress(InvalidStateError):
            self.result.set_exception(error)

    def succeed(self, value: Any) -> None:
        """Answer, unless answered."""
        with suppress(InvalidStateError):
            self.result.set_result(value)


class Inbox:
    """Bounded, thread-safe, first come first served."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._jobs: dict[bytes, Job] = {}
        self._order: deque[bytes] = deque()
        self._arriving: set[bytes] = set()
        self._later: list[tuple[float, bytes]] = []  # announced too early for some party, and when to try again
        self._changed = threading.Condition()
        self._closed: Exception | None = None

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, job: Job) -> None:
        """Queue a request; BusyError when full, ConflictError for an id in use."""
        if len(job.id) != 16:
            raise InputError("request_id must be 16 random bytes, the same at every party")
        with self._changed:
            if self._closed is not None:
                raise self._closed
            if job.id in self._jobs:
                raise ConflictError("a request with this id is being worked on; draw a new id for every request")
            if len(self._jobs) >= self._limit:
                raise BusyError(f"{self._limit} requests are waiting already; send it again later")
            self._jobs[job.id] = job
            self._order.append(job.id)
            self._changed.notify_all()

    def discard(self, job: Job) -> None:
        """Forget a request whose caller has gone or has its answer."""
        with self._changed:
            if self._jobs.get(job.id) is job:
                del self._jobs[job.id]
                if job.id in self._order:  # nobody takes from the queue but at party 0
                    self._order.remove(job.id)

    def next(self, timeout: float) -> Job | None:
        """The oldest request that nobody took yet and whose caller still waits (party 0)."""
        end = time.monotonic() + timeout
        with self._changed:
            while True:
                now = time.monotonic()
                self._order.extend(id_ for due, id_ in self._later if due <= now)
                self._later = [(due, id_) for due, id_ in self._later if due > now]
                while self._order:
                    job = self._jobs.get(self._order.popleft())
                    if job is not None and not job.result.done() and job.deadline > now:
                        return job
                if end <= now or self._closed is not None:
                    return None
                self._changed.wait(min([end, *(due for due, _ in self._later)]) - now)

    def again(self, job: Job) -> None:
        """Let `next` return this request again, after those that wait: it needs more steps than one."""
        with self._changed:
            if self._jobs.get(job.id) is job:
                self._order.append(job.id)

    def restore(self, jobs: list[Job]) -> None:
        """Let `next` return these requests again, before all others."""
        with self._changed:
            self._order.extendleft(job.id for job in reversed(jobs) if self._jobs.get(job.id) is job)

    def postpone(self, job: Job) -> None:
        """Let `next` return this request again in a moment: it has not reached all parties yet, but holds nobody up."""
        now = time.monotonic()
        job.first_announced = job.first_announced or now
        waited = now - job.first_announced
        with self._changed:
            self._later.append((now + min(1.0, max(0.01, waited / 4)), job.id))

    def overdue(self, job: Job) -> bool:
        """Whether a request has been postponed for so long that it should be refused unless it is on its way."""
        return 0 < job.first_announced < time.monotonic() - _LATE_SECONDS

    def wake(self) -> None:
        """Let `next` return early by looking again."""
        with self._changed:
            self._changed.notify_all()

    @contextmanager
    def arriving(self, request_id: bytes) -> Iterator[None]:
        """While inside, the request is known to be on its way."""
        with self._changed:
            self._arriving.add(request_id)
        try:
            yield
        finally:
            with self._changed:
                self._arriving.discard(request_id)

    def expects(self, request_id: bytes) -> bool:
        """Whether the request is on its way."""
        with self._changed:
            return request_id in self._arriving

    def match(self, request_id: bytes, digest: str, timeout: float) -> Job | None:
        """The request that party 0 has announced; it must be what the client sent here, and be asked for once.

        None if it has not arrived after `timeout` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: request_id in self._jobs, timeout):
                return None
            job = self._jobs[request_id]
        if job.taken and job.action != "generate":
            raise ProtocolError("a request was announced twice")
        if job.digest() != digest:
            error = AgreementError("the parties were sent different requests under one id")
            job.fail(error)
            raise error
        return job

    def abort(self, error: Exception) -> None:
        """Answer what waits with an error: the other parties will not ask for it any more."""
        with self._changed:
            jobs = list(self._jobs.values())
        for job in jobs:
            job.fail(error)

    def close(self, error: Exception) -> None:
        """Refuse everything from now on, and answer what waits."""
        with self._changed:
            self._closed = error
            self._changed.notify_all()
        self.abort(error)
