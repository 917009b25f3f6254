"""The lane: one thread that executes steps, in the order party 0 announces them.

A step is agreed on before anything is spent: party 0 announces a request, every party checks that the client sent it
the same one, and all vote. Then the offline phase (fetch and expand the tape), a second vote, and the online phase.
A refusal in a vote concerns that request only. An error after the second vote ends the epoch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import torch

from mpcinfer import errors
from mpcinfer.config import Limits
from mpcinfer.errors import AbortedError, MpcInferError, NotFoundError, ProtocolError, UnavailableError
from mpcinfer.graph.interpret import interpret
from mpcinfer.graph.plan import mask_weights
from mpcinfer.party.catalogue import Catalogue, Model
from mpcinfer.party.epoch import Epoch, Former
from mpcinfer.party.inbox import Inbox, Job
from mpcinfer.party.tape import Tape, fetch
from mpcinfer.protocol.context import Context, Opening, drive
from mpcinfer.protocol.tracing import Plan
from mpcinfer.protocol.types import Shared, Weight
from mpcinfer.wire import channel
from mpcinfer.wire.mesh import CONTROL

_log = logging.getLogger(__name__)

_MATCH_SECONDS = 0.05  # how long the lane waits for a request that another party has already
_RETRY_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0)
_IDLE_SECONDS = 0.5
_FLUSH_SECONDS = 0.5


@dataclass(frozen=True)
class Phase:
    """What one phase of a request cost this party."""

    seconds: float
    rounds: int
    bytes_sent: int
    bytes_from_dealer: int = 0


@dataclass(frozen=True)
class Inference:
    """What a request to infer brings: this party's shares of inputs that were checked against this model."""

    model: Model
    inputs: list[Shared]


@dataclass(frozen=True)
class Inferred:
    """This party's output shares and what they cost."""

    model: Model
    outputs: list[Shared]
    online: Phase
    offline: Phase


class _Refused(Exception):
    """Some party voted no: the request has its answer, the epoch goes on."""


class _Late(Exception):
    """Some party does not have the request yet: party 0 will announce it again."""


class Lane:
    """Forms epochs and works through requests until stopped."""

    def __init__(self, index: int, former: Former, inbox: Inbox, catalogue: Catalogue, limits: Limits) -> None:
        self.index = index
        self.state = "connecting"
        self.detail = "starting" if index == 0 else "party 0 connects once it reaches all parties and the dealer"
        self.done = 0
        self.failed = 0
        self._former = former
        self._inbox = inbox
        self._catalogue = catalogue
        self._limits = limits
        self._epoch: Epoch | None = None
        self._stopping = threading.Event()
        self._busy = False
        self._ready = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="lane", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self, grace: float) -> None:
        """Finish the running step if it ends within `grace` seconds, then end the epoch."""
        self._stopping.set()
        self._inbox.wake()
        end = time.monotonic() + grace
        while self._busy and time.monotonic() < end:
            time.sleep(0.02)
        epoch = self._epoch
        if epoch is not None:
            epoch.close(_FLUSH_SECONDS)
        if self._thread.is_alive():
            self._thread.join(1.0)

    def wait_ready(self, timeout: float) -> None:
        """Return once an epoch stands; UnavailableError saying what is missing if that takes too long."""
        with self._ready:
            if not self._ready.wait_for(lambda: self.state == "ready", timeout):
                raise UnavailableError(f"party {self.index} is not connected to all others: {self.detail}")

    # --- epochs ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            try:
                if self.index != 0 and not self._former.invited():
                    self._stopping.wait(0.02)
                    continue
                self._epoch = self._former.current = self._former.form()
                self._agree_on_models(self._epoch)
                failures = 0
                self._set("ready", "")
                while not self._stopping.is_set():
                    self._lead(self._epoch) if self.index == 0 else self._follow(self._epoch)
            except MpcInferError as error:
                if not self._stopping.is_set():
                    self._set("connecting", str(error))
            except Exception as error:
                self._set("connecting", f"{_incident(error)}; beginning a new epoch")
            finally:
                if self._epoch is not None:
                    # if only the dealer is lost, a peer may still need what was sent for the step that is done
                    self._epoch.close(0.0 if self._epoch.mesh.broken else _FLUSH_SECONDS)
                    self._epoch = self._former.current = None
            if not self._stopping.is_set():
                self._inbox.abort(AbortedError(f"party {self.index} lost its connections; send the request again"))
                self._stopping.wait(_RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)])
                failures += 1
        self._set("stopping", "this party is stopping")

    def _set(self, state: str, detail: str) -> None:
        if (state, detail) != (self.state, self.detail):
            _log.info("%s%s", state, f": {detail}" if detail else "")
        with self._ready:
            self.state, self.detail = state, detail
            self._ready.notify_all()

    def _agree_on_models(self, epoch: Epoch) -> None:
        own = json.dumps(self._catalogue.inventory()).encode()
        watchdog = epoch.mesh.limited(self._limits.connect_timeout_s)
        try:
            held = epoch.mesh.exchange(own, CONTROL)
        finally:
            watchdog.cancel()
        self._catalogue.agree(self.index, {peer: json.loads(inventory) for peer, inventory in held.items()})

    # --- steps ----------------------------------------------------------------------------------------------------

    def _lead(self, epoch: Epoch) -> None:
        job = self._inbox.next(_IDLE_SECONDS)
        if epoch.over:
            raise AbortedError("a party or the dealer has left; connecting again")
        if job is None or self._stopping.is_set():
            return
        step = self._describe(job)
        epoch.mesh.announce(json.dumps(step).encode())
        self._step(epoch, step)

    def _follow(self, epoch: Epoch) -> None:
        step = json.loads(epoch.mesh.links[0].receive(CONTROL))
        self._step(epoch, step)

    def _describe(self, job: Job) -> dict[str, Any]:
        step: dict[str, Any] = {
            "action": job.action,
            "id": job.id.hex(),
            "digest": job.digest(),
            "tape": secrets.token_hex(16),
            "last": self._inbox.overdue(job),
        }
        if job.action == "infer":
            step["deployment"] = job.content.model.id.hex()
        return step

    def _step(self, epoch: Epoch, step: dict[str, Any]) -> None:
        limit = self._limits.step_timeout_s
        watchdog, end = epoch.mesh.limited(limit), time.monotonic() + limit
        job: Job | None = None
        self._busy = True
        try:
            refusal = None
            try:
                job = self._inbox.match(
                    bytes.fromhex(step["id"]), step["digest"], 0 if self.index == 0 else _MATCH_SECONDS
                )
            except MpcInferError as error:
                refusal = error
            # an upload that has begun to arrive may take as long as its caller waits
            if job is None and step["last"] and not self._inbox.expects(bytes.fromhex(step["id"])):
                refusal = refusal or UnavailableError("the request has not reached all parties; send it again")
            self._vote(epoch, refusal, late=job is None)
            assert job is not None
            job.taken = True
            action = {"infer": self._infer, "deploy": self._deploy, "remove": self._remove}[step["action"]]
            job.succeed(action(epoch, job, step))
            self.done += 1
        except _Late:
            if job is not None and self.index == 0:
                self._inbox.postpone(job)
        except _Refused as refused:
            self._answer(job, refused.__cause__)
        except Exception as error:
            # the links broke because a watchdog closed them, here or at a party that came to the step a moment earlier
            late = time.monotonic() >= end - limit / 20
            slow = AbortedError(f"not finished in the {limit:g} s that party {self.index} allows (step_timeout_s)")
            self._answer(job, slow if late else error)
            raise
        finally:
            self._busy = False
            watchdog.cancel()

    def _answer(self, job: Job | None, error: BaseException | None) -> None:
        self.failed += 1
        if job is not None:
            job.fail(error if isinstance(error, MpcInferError) else _incident(error))

    def _vote(
        self, epoch: Epoch, refusal: MpcInferError | None, note: str = "", *, late: bool = False
    ) -> dict[int, str]:
        """All parties say yes (with a note each), no, or "not here yet".

        _Refused, caused by the error, if anybody says no; else _Late if anybody has to wait.
        """
        own = {
            "error": type(refusal).__name__ if refusal else "",
            "text": str(refusal) if refusal else note,
            "late": late,
        }
        answers = {self.index: own} | {
            peer: json.loads(raw) for peer, raw in epoch.mesh.exchange(json.dumps(own).encode(), CONTROL).items()
        }
        if refusal is not None:
            raise _Refused from refusal
        for peer, answer in sorted(answers.items()):
            if answer["error"]:
                kind = getattr(errors, answer["error"], None)
                if not (isinstance(kind, type) and issubclass(kind, MpcInferError)):
                    kind = AbortedError
                raise _Refused from kind(f"party {peer}: {answer['text']}")
        if any(answer["late"] for answer in answers.values()):
            raise _Late
        return {peer: answer["text"] for peer, answer in answers.items()}

    def _agreed(self, epoch: Epoch, work: Callable[[], Any]) -> Any:
        """Do something that may fail here, and go on only if it succeeded everywhere."""
        value, refusal = None, None
        try:
            value = work()
        except MpcInferError as error:
            refusal = error
        except Exception as error:
            refusal = _incident(error)
        self._vote(epoch, refusal)
        return value

    def _execute(
        self,
        epoch: Epoch,
        tape: Tape,
        weights: dict[str, Weight],
        protocol: Callable[[Context], Coroutine[Any, Any, Any]],
    ) -> tuple[Any, Phase]:
        began, rounds, sent = time.perf_counter(), epoch.mesh.rounds, epoch.mesh.bytes_sent
        ctx = Context(self.index, epoch.mesh.parties, tape, weights)
        result = drive(protocol(ctx), lambda batch: _exchange(epoch, batch))
        return result, Phase(time.perf_counter() - began, epoch.mesh.rounds - rounds, epoch.mesh.bytes_sent - sent)

    def _deal(self, epoch: Epoch, tape: bytes, plan: Plan, digest: bytes, weights: dict[str, Weight]) -> Tape:
        """Fetch a tape at all parties. A failure ends the epoch: the dealer may have forgotten it, or burn the tape."""
        try:
            tape_here: Tape = self._agreed(
                epoch, lambda: fetch(epoch, tape, plan, digest, weights, self._limits.step_timeout_s)
            )
        except _Refused as refused:
            raise refused.__cause__ or AbortedError("a party could not get its randomness") from None
        return tape_here

    def _masked(self, epoch: Epoch, model: Model, tape: bytes) -> None:
        """Open the weights' masks, once per epoch."""
        if model.masked_in == epoch.id:
            return

        def prepare() -> tuple[Plan, dict[str, Shared]]:
            return model.mask_plan(epoch.mesh.parties), self._catalogue.load(model)

        plan, shares = self._agreed(epoch, prepare)
        masks = self._deal(epoch, tape, plan, plan.digest(), {})
        masked, _ = self._execute(epoch, masks, {}, lambda ctx: mask_weights(model.program, ctx, shares))
        model.weights = {w.name: w for w in masked}
        model.masked_in = epoch.id

    def _infer(self, epoch: Epoch, job: Job, step: dict[str, Any]) -> Inferred:
        admitted, inputs = job.content.model, job.content.inputs
        own_tape, mask_tape = _tapes(step, 2)

        def prepare() -> tuple[Model, Plan, bytes]:
            # exactly the deployment for which this party has checked the inputs, and party 0 too
            model = self._catalogue.find(admitted.name, admitted.version)
            if not model.id == admitted.id == bytes.fromhex(step["deployment"]):
                raise AbortedError("the model was deployed anew while the request waited; send it again")
            return model, *model.plan([x.shape for x in inputs], epoch.mesh.parties)

        model, plan, digest = self._agreed(epoch, prepare)
        self._masked(epoch, model, mask_tape)
        began, sent = time.perf_counter(), epoch.mesh.bytes_sent
        tape = self._deal(epoch, own_tape, plan, digest, model.weights)
        offline = Phase(time.perf_counter() - began, 0, epoch.mesh.bytes_sent - sent, tape.dealer_bytes)
        holdings = model.holdings()
        outputs, online = self._execute(
            epoch, tape, model.weights, lambda ctx: interpret(model.program, ctx, holdings, inputs)
        )
        return Inferred(model, outputs, online, offline)

    def _deploy(self, epoch: Epoch, job: Job, step: dict[str, Any]) -> Model:
        name, owner = job.facts["name"], job.caller
        version = self._agreed(epoch, lambda: self._catalogue.next_version(name, owner))
        notes = self._vote(epoch, None, f"{version} {secrets.token_hex(32)}")
        # the id depends on fresh randomness of every party, so no attempt ever shares its masks with another
        version = max(int(n.partition(" ")[0]) for n in notes.values())
        nonces = "".join(notes[i].partition(" ")[2] for i in sorted(notes))
        deployment = hashlib.sha256(f"{step['id']} {nonces}".encode()).digest()
        try:
            model: Model = self._agreed(epoch, lambda: self._catalogue.commit(job.id, deployment, version))
            self._masked(epoch, model, _tapes(step, 1)[0])
        except BaseException:
            self._catalogue.remove(deployment)
            raise
        # From here on another party may have seen that all are done: if this vote fails, the next epoch settles it.
        self._vote(epoch, None)
        self._catalogue.confirm(model)
        _log.info("model %s version %d deployed by %s", name, version, owner)
        return model

    def _remove(self, epoch: Epoch, job: Job, step: dict[str, Any]) -> int:
        name, version = job.facts["name"], job.facts["version"]

        self._agreed(epoch, lambda: self._catalogue.next_version(name, job.caller))  # refuses other owners
        # A party whose file is damaged or gone does not know what is in it; another one does.
        notes = self._vote(epoch, None, " ".join(i.hex() for i in self._catalogue.matching(name, version)))
        deployments = {bytes.fromhex(i) for note in notes.values() for i in note.split()}
        if not deployments:
            raise _Refused from NotFoundError(f"no model {name!r}{f' version {version}' if version else ''}")
        for deployment in deployments:
            self._catalogue.remove(deployment)
        _log.info("%d versions of model %s removed by %s", len(deployments), name, job.caller)
        return len(deployments)


def _incident(error: BaseException | None) -> ProtocolError:
    """What a client may be told about a failure that nobody foresaw; the log says where it was."""
    return ProtocolError(channel.to_status(error or AssertionError())[1])


def _tapes(step: dict[str, Any], count: int) -> list[bytes]:
    """Ids of the tapes of a step, from the one party 0 drew."""
    base = bytes.fromhex(step["tape"])
    return [hashlib.sha256(base + bytes([i])).digest()[:16] for i in range(count)]


def _exchange(epoch: Epoch, batch: list[Opening]) -> list[torch.Tensor]:
    """One round: all openings of a batch in one message to every peer."""
    packed = [opening.ring.pack(opening.masked) for opening in batch]
    received = epoch.mesh.exchange(b"".join(packed))
    values = [opening.masked for opening in batch]
    expected = sum(len(p) for p in packed)
    for peer, payload in received.items():
        if len(payload) != expected:
            raise ProtocolError(f"party {peer} sent {len(payload)} bytes in a round of {expected}")
        at = 0
        view = memoryview(payload)
        for i, opening in enumerate(batch):
            part = opening.ring.unpack(view[at : at + len(packed[i])], tuple(opening.masked.shape))
            values[i] = opening.ring.add(values[i], part)
            at += len(packed[i])
    return values
