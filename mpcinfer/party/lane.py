"""The lane: one thread that executes steps, in the order party 0 announces them.

A step is agreed on before anything is spent: party 0 announces a request, every party checks that the client sent it
the same one, and all vote. Then the offline phase (fetch and expand the tape), a second vote, and the online phase.
A refusal in a vote concerns that request only. An error after the second vote ends the epoch.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

from mpcinfer.config import Limits
from mpcinfer.errors import AbortedError, MpcInferError, UnavailableError
from mpcinfer.party.actions import deploy, infer, remove
from mpcinfer.party.catalogue import Catalogue
from mpcinfer.party.epoch import Epoch, Former
from mpcinfer.party.generation import generate, gone
from mpcinfer.party.inbox import Inbox, Job
from mpcinfer.party.metrics import PartyMetrics
from mpcinfer.party.session import Sessions
from mpcinfer.party.stepping import Late, Refused, Stepping, incident
from mpcinfer.wire.mesh import CONTROL

_log = logging.getLogger(__name__)

_MATCH_SECONDS = 0.05  # how long the lane waits for a request that another party has already
_RETRY_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0)
_IDLE_SECONDS = 0.5
_FLUSH_SECONDS = 0.5
_ACTIONS: dict[str, Callable[..., Any]] = {"infer": infer, "deploy": deploy, "remove": remove}


class Lane:
    """Forms epochs and works through requests until stopped."""

    def __init__(
        self,
        index: int,
        former: Former,
        inbox: Inbox,
        catalogue: Catalogue,
        sessions: Sessions,
        limits: Limits,
        metrics: PartyMetrics,
    ) -> None:
        self.index = index
        self.state = "connecting"
        self.detail = "starting" if index == 0 else "party 0 connects once it reaches all parties and the dealer"
        self.done = 0
        self.failed = 0
        self._former = former
        self._inbox = inbox
        self._catalogue = catalogue
        self._sessions = sessions
        self._by = Stepping(index, catalogue, limits)
        self._limits = limits
        self._metrics = metrics
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
                self._metrics.began(self._epoch.mesh)
                self._agree_on_models(self._epoch)
                failures = 0
                self._set("ready", "")
                while not self._stopping.is_set():
                    self._lead(self._epoch) if self.index == 0 else self._follow(self._epoch)
            except MpcInferError as error:
                if not self._stopping.is_set():
                    self._set("connecting", str(error))
            except Exception as error:
                self._set("connecting", f"{incident(error)}; beginning a new epoch")
            finally:
                self._sessions.clear()
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
        idle = self._sessions.idle()
        if idle:
            epoch.mesh.announce(json.dumps({"action": "forget", "sessions": [i.hex() for i in idle]}).encode())
            epoch.forget(self._sessions.forget(idle))
        if job is None or self._stopping.is_set():
            return
        step = self._describe(job)
        epoch.mesh.announce(json.dumps(step).encode())
        self._step(epoch, step)
        if job.action == "generate" and job.taken:
            self._inbox.again(job)

    def _follow(self, epoch: Epoch) -> None:
        step = json.loads(epoch.mesh.links[0].receive(CONTROL))
        if step["action"] == "forget":
            self._sessions.forget([bytes.fromhex(i) for i in step["sessions"]])
        else:
            self._step(epoch, step)

    def _describe(self, job: Job) -> dict[str, Any]:
        step: dict[str, Any] = {
            "action": job.action,
            "id": job.id.hex(),
            "digest": job.digest(),
            "tape": secrets.token_hex(16),
            "last": self._inbox.overdue(job),
            "begun": job.taken,
        }
        if job.action in ("infer", "generate"):
            step["deployment"] = job.content.model.id.hex()
        return step

    def _step(self, epoch: Epoch, step: dict[str, Any]) -> None:
        limit = self._limits.step_timeout_s
        epoch.mesh.account = self._metrics.account(step["action"])
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
            if job is None and step["begun"]:
                refusal = gone()
            self._by.vote(epoch, refusal, late=job is None)
            assert job is not None
            job.taken = True
            if step["action"] == "generate":
                if not generate(self._by, self._catalogue, self._sessions, epoch, job, step):
                    return
                job.succeed(None)
            else:
                job.succeed(_ACTIONS[step["action"]](self._by, self._catalogue, epoch, job, step))
            self.done += 1
        except Late:
            if job is not None and self.index == 0:
                self._inbox.postpone(job)
        except Refused as refused:
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
            job.fail(error if isinstance(error, MpcInferError) else incident(error))
