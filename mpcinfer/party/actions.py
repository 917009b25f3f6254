"""What the lane does for owners and clients: one function for each kind of request."""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mpcinfer.errors import AbortedError, MpcInferError, NotFoundError
from mpcinfer.graph.interpret import interpret_several
from mpcinfer.party.catalogue import Catalogue, Model
from mpcinfer.party.inbox import Job
from mpcinfer.party.messages import reveal
from mpcinfer.party.part import Part, Phase, Ran
from mpcinfer.party.pool import Shapes
from mpcinfer.party.running import Refused
from mpcinfer.party.stepping import Stepping, tapes
from mpcinfer.party.transcript import Evidence
from mpcinfer.party.waiting import Joint
from mpcinfer.protocol.tracing import Plan
from mpcinfer.protocol.types import Shared
from mpcinfer.wire.v1 import tensor_pb2

_log = logging.getLogger(__name__)
_COMING = "coming"  # what a party says that does not have yet what was fetched before


@dataclass(frozen=True)
class Inference:
    """What a request to infer brings: this party's shares of inputs that were checked against this model."""

    model: Model
    inputs: list[Shared]

    @property
    def queries(self) -> int:
        """How many answers it asks for: each row is a query."""
        return self.model.rows([x.shape for x in self.inputs])


@dataclass(frozen=True)
class Inferred:
    """This party's output shares, what they cost, the commitment to them where there are witnesses, and what the run
    leaves for the receipt."""

    model: Model
    outputs: list[tensor_pb2.Tensor]
    online: Phase
    offline: Phase
    commitment: bytes
    evidence: Evidence | None = None


def found(catalogue: Catalogue, admitted: Model, job: Job, step: dict[str, Any]) -> Model:
    """Exactly the deployment for which this party has checked a request, and party 0 too, if it is still granted."""
    model = catalogue.find(admitted.full_name, admitted.version, job.caller)
    if not model.id == admitted.id == bytes.fromhex(step["deployment"]):
        raise AbortedError("the model was deployed anew while the request waited; send it again")
    return model


async def infer(by: Stepping, catalogue: Catalogue, part: Part, job: Job, step: dict[str, Any]) -> Inferred:
    """Evaluate a model on shares of inputs, in one run with other requests of this step that have the same shapes."""
    admitted, inputs = job.content.model, job.content.inputs
    shapes = tuple(x.shape for x in inputs)
    own_tape, mask_tape = tapes(step, 2)

    with by.policy.admission() as admission:

        def prepare() -> Model:
            model = found(catalogue, admitted, job, step)
            model.plan(shapes, part.epoch.mesh.parties)
            admission.charge(model, job.caller, job.content.queries)
            return model

        model = await by.agreed(part, prepare)
        await by.masked(part, model, mask_tape)  # may be refused, too: by a share that cannot be read

    def able() -> bool:
        try:
            return bool(model.plan(shapes, part.epoch.mesh.parties, 2))
        except MpcInferError:
            return False

    ran: Ran = await Joint(part, (model.id, shapes), (own_tape, inputs), partial(_run, by, model, shapes), able)
    online = await ran.compared(by, part)
    answer, evidence = [reveal(x) for x in ran.found], part.evidence
    return Inferred(model, answer, online, ran.offline, await by.release(part, job, step, answer), evidence)


async def _run(by: Stepping, model: Model, shapes: Shapes, members: Sequence[Joint]) -> list[Ran]:
    """One run for requests that have been agreed on, under the first one's tape."""
    count, part = len(members), Part(members[0].part.epoch)
    own_tape, _ = members[0].content
    plan, digest = model.plan(shapes, part.epoch.mesh.parties, count)
    began = time.perf_counter()
    ahead = by.pool.take(digest, model, shapes, plan, count)
    tape, beside = await by.taken(part, ahead) if ahead is not None else (None, 0.0)
    if tape is None:
        tape = await by.deal(part, own_tape, plan, digest, model.weights)
    seconds, sent = beside + time.perf_counter() - began, part.sent
    holdings, requests = model.holdings(), [each.content[1] for each in members]
    outputs, online = await by.execute(
        part,
        tape,
        model.weights,
        lambda ctx: interpret_several(model.program, ctx, holdings, requests),
        compare=False,
    )
    offline = Phase(seconds + tape.waited + tape.beside, 0, sent, tape.dealer_bytes)
    return Ran.divided(outputs, online, offline, tape, part.transcript)


async def fill(by: Stepping, part: Part, step: dict[str, Any]) -> None:
    """Begin to fetch a tape for a request that may come. Refused if some party has no room for it, and put off if what
    was fetched before has not come everywhere.
    """
    digest = bytes.fromhex(step["plan"])
    by.pool.drop([bytes.fromhex(d) for d in step["drops"]])
    shelf = by.pool.shelves()[digest]

    def planned() -> Plan:
        return shelf.model.plan(shelf.shapes, part.epoch.mesh.parties, shelf.count)[0]

    def prepare() -> str:
        by.pool.check_room(digest)
        planned()
        return _COMING if by.pool.coming else ""

    try:
        notes = await by.voted(part, prepare)
    except Refused:
        shelf.full = True
        return
    if _COMING in notes.values():
        by.pool.wait()
        return
    by.pool.put(digest, by.ahead(part, tapes(step, 1)[0], planned(), digest, shelf.model.weights))


async def deploy(by: Stepping, catalogue: Catalogue, part: Part, job: Job, step: dict[str, Any]) -> Model:
    """Commit a staged upload everywhere or nowhere."""
    name, owner = job.facts["name"], job.caller
    version = await by.agreed(part, lambda: catalogue.next_version(name, owner))
    notes = await by.vote(part, None, f"{version} {secrets.token_hex(32)}")
    # the id depends on fresh randomness of every party, so no attempt ever shares its masks with another
    version = max(int(n.partition(" ")[0]) for n in notes.values())
    nonces = "".join(notes[i].partition(" ")[2] for i in sorted(notes))
    deployment = hashlib.sha256(f"{step['id']} {nonces}".encode()).digest()
    try:
        model: Model = await by.agreed(part, lambda: catalogue.commit(job.id, deployment, version))
        await by.masked(part, model, tapes(step, 1)[0])
        await by.release(part, job, {**step, "deployment": deployment.hex()})
    except BaseException:
        catalogue.remove(deployment)
        raise
    # From here on another party may have seen that all are done: if this vote fails, the next epoch settles it.
    await by.vote(part, None)
    catalogue.confirm(model)
    _log.info("model %s version %d deployed by %s", name, version, owner)
    return model


async def remove(by: Stepping, catalogue: Catalogue, part: Part, job: Job, step: dict[str, Any]) -> int:
    """Delete versions of a model: how many."""
    name, version = job.facts["name"], job.facts["version"]

    # A party whose file is damaged or gone does not know what is in it; another one does.
    notes = await by.vote(part, None, " ".join(i.hex() for i in catalogue.matching(name, version, job.caller)))
    named = {bytes.fromhex(i) for note in notes.values() for i in note.split()}
    deployments = {i for i in named if not catalogue.foreign(i, job.caller)}
    if not deployments:
        raise Refused from NotFoundError(f"no model {name!r}{f' version {version}' if version else ''}")
    by.settle()

    def erase() -> None:
        for deployment in deployments:
            catalogue.remove(deployment)

    await by.agreed(part, erase)  # a party's answer says that it is gone everywhere
    for deployment in deployments:
        forget(by, part, deployment)
    _log.info("%d versions of model %s removed by %s", len(deployments), name, job.caller)
    return len(deployments)


def forget(by: Stepping, part: Part, deployment: bytes) -> None:
    """A model is gone, or has other shares: what was dealt for it and the texts that it writes are of no use."""
    by.settle()
    by.pool.forget(deployment)
    slots = by.sessions.forget(by.sessions.of_model(deployment))
    if by.index == 0 and not part.epoch.mesh.shadow:
        part.epoch.forget(slots, deployment.hex())


async def set_grant(by: Stepping, catalogue: Catalogue, part: Part, job: Job, step: dict[str, Any]) -> None:
    """Replace a grant everywhere or nowhere. If a party stops in between, the newest holds once they connect again."""
    name, version = job.facts["name"], job.facts["version"]
    model, granted = await by.agreed(part, lambda: catalogue.stage_grant(name, version, job.caller, job.content))
    catalogue.set_grant(model, granted)
    await by.vote(part, None)
    what = "revoked" if granted.grant.revoked else f"granted: {granted.grant.terms.words()}"
    _log.info("model %s version %d: %s", name, version, what)
