"""The lane: one thread that executes steps, in the order party 0 announces them.

A step is agreed on before anything is spent: party 0 announces a request, every party checks that the client sent it
the same one, and all vote. Then the offline phase (fetch and expand the tape), a second vote, and the online phase.
A refusal in a vote concerns that request only. An error after the second vote ends the epoch. Requests that wait at the
same time share a step: their votes travel in one message, and their openings share rounds.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from mpcinfer.config import Limits
from mpcinfer.errors import AbortedError, AgreementError, MpcInferError, ProtocolError, TamperingError, UnavailableError
from mpcinfer.party.actions import deploy, fill, infer, remove, set_grant
from mpcinfer.party.audit import Audit
from mpcinfer.party.batch import Room, slot_of
from mpcinfer.party.catalogue import Catalogue
from mpcinfer.party.epoch import Epoch, Former
from mpcinfer.party.generation import generate, gone
from mpcinfer.party.inbox import Inbox, Job
from mpcinfer.party.manifest import PartyManifest
from mpcinfer.party.metrics import PartyMetrics
from mpcinfer.party.part import Part
from mpcinfer.party.policy import Policy
from mpcinfer.party.pool import Pool
from mpcinfer.party.refresh import refresh
from mpcinfer.party.running import Late, Refused
from mpcinfer.party.session import Sessions
from mpcinfer.party.stepping import Stepping, incident
from mpcinfer.party.transcript import secret_of
from mpcinfer.party.vouching import Vouching, check_voice, merged_inventories
from mpcinfer.trust.chain import Head
from mpcinfer.wire.mesh import read_json

_log = logging.getLogger(__name__)

_MATCH_SECONDS = 0.05  # how long the lane waits for a request that another party has already
_RETRY_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0)
_MOST_TOLD = 256 << 20  # bytes, of all models and their grants
_IDLE_SECONDS = 0.5
_QUIET_SECONDS = 0.05  # without a request, before something is fetched for one that may come
_FLUSH_SECONDS = 0.5
_GATHER_SECONDS, _GATHER_SHARE = 0.1, 0.01  # for others that could share a step: at most 1 % of what the last one took
_ACTIONS: dict[str, Callable[..., Any]] = {
    "infer": infer,
    "deploy": deploy,
    "remove": remove,
    "grant": set_grant,
    "refresh": refresh,
}


class Lane:
    """Forms epochs and works through requests until stopped."""

    def __init__(
        self,
        index: int,
        former: Former,
        inbox: Inbox,
        catalogue: Catalogue,
        sessions: Sessions,
        policy: Policy,
        limits: Limits,
        metrics: PartyMetrics,
        manifest: PartyManifest,
        audit: Audit,
        vouching: Vouching | None = None,
        *,
        shadow: bool = False,
    ) -> None:
        """vouching: where the cluster has witnesses. shadow: whether this is one, of party `index`."""
        self.index = index
        self._leads = index == 0 and not shadow
        self._name = f"{index}'s witness" if shadow else index
        self.state = "connecting"
        self.detail = "starting" if self._leads else "party 0 connects once it reaches all parties and the dealer"
        self.done = 0
        self.failed = 0
        self._former = former
        self._inbox = inbox
        self._catalogue = catalogue
        self._sessions = sessions
        self._by = Stepping(index, catalogue, sessions, policy, limits, vouching)
        self._limits = limits
        self._metrics = metrics
        self._manifest = manifest
        self._audit = audit
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
                if not self._leads and not self._former.invited():
                    self._stopping.wait(0.02)
                    continue
                self._epoch = self._former.current = self._former.form()
                self._metrics.began(self._epoch.mesh)
                self._agree(self._epoch)
                failures = 0
                self._set("ready", "")
                while not self._stopping.is_set():
                    self._lead(self._epoch) if self._leads else self._follow(self._epoch)
            except MpcInferError as error:
                if not self._stopping.is_set():
                    self._set("connecting", str(error))
            except Exception as error:
                self._set("connecting", f"{incident(error)}; beginning a new epoch")
            finally:
                self._sessions.clear()
                self._by.end()
                self._metrics.ended()
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

    def _agree(self, epoch: Epoch) -> None:
        """On who takes part, on which models all hold, and on how often the dealer is audited."""
        secret, rate = secrets.token_bytes(32), self._limits.dealer_audit_rate
        own = {
            "models": self._catalogue.inventory(),
            "secret": secret.hex(),
            "log": self._audit.head.to_json(),
            "dealer_audit_rate": rate,
        }
        watchdog = epoch.mesh.limited(self._limits.connect_timeout_s)
        try:
            epoch.manifest = self._manifest.agree(epoch)
            told = self._told(epoch, own)
        finally:
            watchdog.cancel()
        held: dict[int | str, Any] = {}
        drawn = []
        for peer, said in sorted(told.items()):
            held[peer] = said["models"]
            drawn.append(bytes.fromhex(said["secret"]))
            if "witness" in said:
                held[f"{peer}'s witness"] = said["witness"]["models"]
            if any(each["dealer_audit_rate"] != rate for each in (said, said.get("witness", said))):
                raise AgreementError(
                    f"parties {self.index} and {peer}, or their witnesses, audit the dealer at different rates: "
                    "give all the same `dealer_audit_rate`"
                )
        epoch.secret = secret_of(epoch.id, drawn)
        held.pop(self._name, None)
        self._catalogue.agree(self._name, held)
        self._audit.met("epoch", _heads(told), epoch=epoch.id.hex())

    def _told(self, epoch: Epoch, own: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """What each party says of itself, and in it what its witness does."""
        raw = epoch.mesh.consult(json.dumps(own).encode(), merged_inventories, _MOST_TOLD)
        told = {peer: read_json(message, f"party {peer}") for peer, message in raw.items()}
        if epoch.mesh.shadow:
            check_voice(self.index, told[self.index], json.loads(json.dumps(own)))
        return told

    # --- steps ----------------------------------------------------------------------------------------------------

    @property
    def pool(self) -> Pool:
        """The tapes that are ready."""
        return self._by.pool

    def _lead(self, epoch: Epoch) -> None:
        wanted = self._by.pool.wanted()
        job = self._inbox.next(_QUIET_SECONDS if wanted is not None else _IDLE_SECONDS)
        if epoch.over:
            raise AbortedError("a party or the dealer has left; connecting again")
        jobs = [] if job is None else self._together(epoch, job)
        begun = [each for each in jobs if each.action == "generate" and not each.taken]
        idle = self._sessions.idle([(each.caller, each.content.model.owner) for each in begun])
        if idle:
            self._by.settle()
            epoch.mesh.announce(json.dumps({"action": "forget", "sessions": [i.hex() for i in idle]}).encode())
            epoch.forget(self._sessions.forget(idle))
        if self._stopping.is_set():
            self._inbox.restore(jobs)
            return
        if job is None:
            self._by.check()  # a tape that has failed here meanwhile ends the epoch before somebody's request meets it
            if self._audit.due:
                epoch.mesh.announce(json.dumps({"action": "logs"}).encode())
                self._tell_heads(epoch)
            if wanted is not None:
                self._fill(epoch, *wanted)
            return
        step = {"action": job.action, "parts": [self._describe(each) for each in jobs]}
        epoch.mesh.announce(json.dumps(step).encode())
        began = time.monotonic()
        self._step(epoch, step)
        if job.action == "infer":
            job.content.model.step_seconds = time.monotonic() - began
        for each in (each for each in jobs if each.action == "generate" and each.taken):
            self._inbox.again(each)

    def _together(self, epoch: Epoch, job: Job) -> list[Job]:
        """The request and those that wait behind it and can share its step: rounds cost the same for all of them.

        Models whose masks are open, texts that grow from rows of their own, and as many as there is memory for.
        """
        jobs, rest, slots, room = [job], [], {slot_of(self._sessions, job)}, Room(self._limits.batch_mb)
        took = job.content.model.step_seconds if job.action == "infer" else 0.0
        while job.action in ("infer", "generate") and len(jobs) < self._limits.max_batch:
            other = self._inbox.next(min(_GATHER_SECONDS, _GATHER_SHARE * took))
            if other is None:
                break
            slot = slot_of(self._sessions, other)
            fits = other.action == job.action and other.content.model.masked_in == epoch.id and slot not in slots
            if not (fits and job.content.model.masked_in == epoch.id):
                rest.append(other)
                break
            if len(jobs) == 1:
                room.add(epoch, job)
            if not room.add(epoch, other):
                rest.append(other)
                break
            jobs.append(other)
            slots.add(slot)
        self._inbox.restore(rest)
        return jobs

    def _follow(self, epoch: Epoch) -> None:
        step = read_json(epoch.mesh.announced(), "party 0")
        if step["action"] == "forget":
            self._sessions.forget([bytes.fromhex(i) for i in step["sessions"]])
        elif step["action"] == "fill":
            self._filled(epoch, step)
        elif step["action"] == "logs":
            self._tell_heads(epoch)
        else:
            self._step(epoch, step)

    def _tell_heads(self, epoch: Epoch) -> None:
        """The parties write down how far each other's audit logs are: what was written until here stays as it is."""
        watchdog = epoch.mesh.limited(self._limits.connect_timeout_s)
        try:
            told = self._told(epoch, {"log": self._audit.head.to_json()})
        finally:
            watchdog.cancel()
        self._audit.met("logs", _heads(told))

    def _fill(self, epoch: Epoch, digest: bytes, drops: list[bytes]) -> None:
        step = {
            "action": "fill",
            "plan": digest.hex(),
            "drops": [d.hex() for d in drops],
            "tape": secrets.token_hex(16),
        }
        epoch.mesh.announce(json.dumps(step).encode())
        self._filled(epoch, step)

    def _filled(self, epoch: Epoch, step: dict[str, Any]) -> None:
        epoch.mesh.account = self._metrics.account("fill")
        watchdog = epoch.mesh.limited(self._limits.step_timeout_s)
        try:
            self._by.check()
            self._by.run(epoch, [fill(self._by, Part(epoch), step)])
        finally:
            watchdog.cancel()

    def _describe(self, job: Job) -> dict[str, Any]:
        part: dict[str, Any] = {
            "id": job.id.hex(),
            "digest": job.digest(),
            "tape": secrets.token_hex(16),
            "last": self._inbox.overdue(job),
            "begun": job.taken,
            "again": job.first_announced > 0,
        }
        if job.action in ("infer", "generate"):
            part["deployment"] = job.content.model.id.hex()
        if job.action == "generate":
            part["pool_mb"] = int(self._limits.pool_mb)  # what may be dealt ahead: the same at all parties
        return part

    def _step(self, epoch: Epoch, step: dict[str, Any]) -> None:
        limit = self._limits.step_timeout_s
        epoch.mesh.account = self._metrics.account(step["action"])
        watchdog, end = epoch.mesh.limited(limit), time.monotonic() + limit
        jobs: list[Job | None] = [None] * len(step["parts"])
        self._busy = True
        try:
            parts = [self._part(epoch, step["action"], each, jobs, i) for i, each in enumerate(step["parts"])]
            for job, outcome in zip(jobs, self._by.run(epoch, parts), strict=True):
                if isinstance(outcome, Late):
                    if job is not None and self._leads:
                        self._inbox.postpone(job)
                elif isinstance(outcome, Refused):
                    self._answer(job, outcome.__cause__)
                elif outcome:
                    self.done += 1
        except Exception as error:
            if isinstance(error, TamperingError):
                self._audit.write("tampering", epoch=epoch.id.hex(), requests=[j.id.hex() for j in jobs if j])
            # the links broke because a watchdog closed them, here or at a party that came to the step a moment earlier
            late = time.monotonic() >= end - limit / 20
            slow = AbortedError(f"not finished in the {limit:g} s that party {self.index} allows (step_timeout_s)")
            for job in jobs or [None]:
                self._answer(job, slow if late else error)
            raise
        finally:
            self._busy = False
            watchdog.cancel()

    async def _part(
        self, epoch: Epoch, action: str, described: dict[str, Any], jobs: list[Job | None], at: int
    ) -> bool:
        """One request of a step, from the vote on whether all have it; whether it has its answer now."""
        id_ = bytes.fromhex(described["id"])
        part, job, refusal = Part(epoch, id_), None, None
        try:
            wait = 0 if self._leads or described["again"] else _MATCH_SECONDS
            job = self._inbox.match(id_, described["digest"], wait)
            if job is not None and job.action != action:
                raise ProtocolError("a request was announced as something else than its caller asked for")
        except MpcInferError as error:
            refusal = error
        # an upload that has begun to arrive may take as long as its caller waits
        if job is None and described["last"] and not self._inbox.expects(id_):
            refusal = refusal or UnavailableError("the request has not reached all parties; send it again")
        if job is None and described["begun"]:
            refusal = gone()
        jobs[at] = job
        await self._by.vote(part, refusal, late=job is None, upload=job.upload if job else "")
        assert job is not None
        job.taken = True
        if action != "generate":
            job.succeed(await _ACTIONS[action](self._by, self._catalogue, part, job, described))
            return True
        over = await generate(self._by, self._catalogue, self._sessions, part, job, described)
        if over:
            job.succeed(None)
        return over

    def _answer(self, job: Job | None, error: BaseException | None) -> None:
        self.failed += 1
        if job is not None:
            job.fail(error if isinstance(error, MpcInferError) else incident(error))


def _heads(said: Mapping[int, Mapping[str, Any]]) -> dict[str, Head]:
    """How far the logs are, by role, as all have said."""
    found = {f"party/{peer}": Head.from_json(each["log"]) for peer, each in said.items()}
    witnesses = {f"witness/{peer}": each["witness"] for peer, each in said.items() if "witness" in each}
    return found | {role: Head.from_json(each["log"]) for role, each in witnesses.items()}
