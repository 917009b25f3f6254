"""What a request that shares a step with others must have for itself: rows of its own, and memory."""

from __future__ import annotations

from mpcinfer.party.epoch import Epoch
from mpcinfer.party.inbox import Job
from mpcinfer.party.session import Sessions
from mpcinfer.party.tape import HELD_BYTES
from mpcinfer.party.writing import Writing


def slot_of(sessions: Sessions, job: Job) -> bytes:
    """Where a text's rows are, and two must not grow at once; for anything else its own id."""
    if job.action != "generate":
        return job.id
    writing: Writing = job.content
    return sessions.slot(job.id) or sessions.slot(writing.parent) or job.id


class Room:
    """What the requests of a step take of memory for what the dealer sends."""

    def __init__(self, megabytes: float) -> None:
        self._most = megabytes * (1 << 20)
        self._used: dict[object, int] = {}  # by what is one run

    def add(self, epoch: Epoch, job: Job) -> bool:
        """Whether there is room for one more."""
        key = _run_of(epoch, job)
        self._used[key] = self._used.get(key, 0) + memory_of(epoch, job)
        # more of one run is never there at a time, unless all must have come before it begins
        whole = epoch.audit_rate or (epoch.cluster is not None and epoch.cluster.witnesses)
        return sum(used if whole else min(used, HELD_BYTES) for used in self._used.values()) <= self._most


def _run_of(epoch: Epoch, job: Job) -> object:
    """Equal for requests that are one run if they share a step, where the model's operators can do that."""
    if job.action != "infer":
        return job.id
    model, shapes = job.content.model, tuple(x.shape for x in job.content.inputs)
    try:
        model.plan(shapes, epoch.mesh.parties, 2)
    except Exception:  # its own part of the step will say so, where that is this request's failure only
        return job.id
    return model.id, shapes


def memory_of(epoch: Epoch, job: Job) -> int:
    """What a request's tape takes, in bytes, as far as it is known before it is looked at closely."""
    content = job.content
    if job.action not in ("infer", "generate") or content.model.masked_in != epoch.id:
        return 0
    try:
        if job.action == "infer":
            plan, _ = content.model.plan(tuple(x.shape for x in content.inputs), epoch.mesh.parties)
        else:
            plan, _ = content.plan(epoch.mesh.parties)
    except Exception:  # its own part of the step will say so, where that is this request's failure only
        return 0
    size: int = plan.expanded_bytes
    return size
