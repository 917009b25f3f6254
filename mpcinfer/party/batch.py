"""What a request that shares a step with others must have for itself: rows of its own, and memory."""

from __future__ import annotations

from mpcinfer.party.epoch import Epoch
from mpcinfer.party.inbox import Job
from mpcinfer.party.session import Sessions
from mpcinfer.party.writing import Writing


def slot_of(sessions: Sessions, job: Job) -> bytes:
    """Where a text's rows are, and two must not grow at once; for anything else its own id."""
    if job.action != "generate":
        return job.id
    writing: Writing = job.content
    return sessions.slot(job.id) or sessions.slot(writing.parent) or job.id


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
