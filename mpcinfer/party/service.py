"""The party's gRPC face: identities, limits, and shapes are checked here; the lane does the work."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import grpc

from mpcinfer import __version__
from mpcinfer.config import PROTOCOL_VERSION, Cluster, Limits
from mpcinfer.errors import AbortedError, BusyError, DeadlineError, InputError, ShapeError
from mpcinfer.graph.interpret import check_inputs
from mpcinfer.nn.sampling import Choice
from mpcinfer.party.accounts import Accounts
from mpcinfer.party.actions import Inference, Inferred
from mpcinfer.party.catalogue import Catalogue, Model
from mpcinfer.party.inbox import Inbox, Job
from mpcinfer.party.lane import Lane
from mpcinfer.party.manifest import PartyManifest
from mpcinfer.party.messages import cost, info, share
from mpcinfer.party.metrics import Call, PartyMetrics
from mpcinfer.party.policy import Policy
from mpcinfer.party.receipts import Receipts
from mpcinfer.party.session import Sessions
from mpcinfer.party.uploads import Uploads
from mpcinfer.party.writing import Writing, Written
from mpcinfer.trust.commitment import check_salt, upload_commitment
from mpcinfer.trust.signing import Signed
from mpcinfer.wire import channel
from mpcinfer.wire.frames import CHUNK
from mpcinfer.wire.identity import Peer, require
from mpcinfer.wire.v1 import party_pb2, party_pb2_grpc, tensor_pb2

_DEFAULT_SECONDS = 300.0
_LONGEST = 1e6
_READING = ("models", "vocabulary", "end_session")  # what is not written down


class PartyService(party_pb2_grpc.PartyServiceServicer):
    """See party.proto."""

    def __init__(
        self,
        cluster: Cluster,
        lane: Lane,
        inbox: Inbox,
        catalogue: Catalogue,
        sessions: Sessions,
        uploads: Uploads,
        policy: Policy,
        accounts: Accounts,
        limits: Limits,
        metrics: PartyMetrics,
        manifest: PartyManifest,
        receipts: Receipts,
        *,
        shadow: bool = False,
    ) -> None:
        """shadow: whether this is a witness, which answers with commitments to what its party must answer."""
        self._shadow = shadow
        self._cluster = cluster
        self._manifest = manifest
        self._metrics = metrics
        self._receipts = receipts
        self._audit = receipts.audit
        self._lane = lane
        self._inbox = inbox
        self._catalogue = catalogue
        self._sessions = sessions
        self._uploads = uploads
        self._policy = policy
        self._accounts = accounts
        self._limits = limits
        self._waiting: Counter[str] = Counter()
        self._waiting_lock = threading.Lock()
        self._started = time.monotonic()

    def Status(self, request: party_pb2.StatusRequest, context: grpc.ServicerContext) -> party_pb2.StatusResponse:
        """See party.proto."""
        try:
            viewer = self._accounts.identify(context).role
            return party_pb2.StatusResponse(
                index=self._lane.index,
                parties=self._cluster.n,
                protocol_version=PROTOCOL_VERSION,
                cluster_digest=self._cluster.digest(),
                package_version=__version__,
                state=self._lane.state,
                detail=self._lane.detail,
                requests_done=self._lane.done,
                requests_failed=self._lane.failed,
                requests_waiting=len(self._inbox),
                runs_ready=len(self._lane.pool) + self._sessions.ahead(),
                uptime_seconds=time.monotonic() - self._started,
                models=[info(m, viewer) for m in self._catalogue.models(viewer)],
            )
        except Exception as error:
            channel.abort(context, error)

    def ListModels(
        self, request: party_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> party_pb2.ListModelsResponse:
        """See party.proto."""
        with self._admitted("models", context, "owner/", "client/", "party/") as (peer, _):
            return party_pb2.ListModelsResponse(models=[info(m, peer.role) for m in self._catalogue.models(peer.role)])

    def Manifest(self, request: party_pb2.ManifestRequest, context: grpc.ServicerContext) -> party_pb2.ManifestResponse:
        """See party.proto."""
        if self._lane.state == "ready":  # also where there is no room for requests: they are told so themselves
            try:
                self._accounts.identify(context)
                return party_pb2.ManifestResponse(statement=self._manifest.state(request.nonce).message())
            except Exception as error:
                channel.abort(context, error)
        with self._admitted("manifest", context, "owner/", "client/", "party/", "witness/", "dealer"):
            return party_pb2.ManifestResponse(statement=self._manifest.state(request.nonce).message())

    def Infer(self, request: party_pb2.InferRequest, context: grpc.ServicerContext) -> party_pb2.InferResponse:
        """See party.proto."""
        with self._admitted("infer", context, "client/", "owner/", about=request) as (peer, call):
            model = self._catalogue.find(request.model, request.version, peer.role)
            if model.program.caches:
                raise InputError(f"{request.model!r} is a language model: it is asked to generate")
            check_inputs(model.program, [tuple(t.shape) for t in request.inputs])
            declared = zip(request.inputs, model.program.inputs, strict=True)
            inputs = [share(t, v, self._limits.max_message_mb << 20) for t, v in declared]
            facts = {"model": request.model, "version": request.version, "shapes": [list(x.shape) for x in inputs]}
            content = Inference(model, inputs)
            self._policy.check(model, peer.role, content.queries)
            job = Job(request.request_id, "infer", peer.role, facts, content, salt=request.salt)
            job.upload = self._upload(request.salt, request.inputs)
            account = self._receipts.open(job, model, request.inputs)
            done: Inferred = self._run(context, job)
            self._metrics.step(call, done.online, done.offline)
            account.add(done.online, done.evidence)
            return party_pb2.InferResponse(
                outputs=() if self._shadow else done.outputs,
                version=done.model.version,
                online=cost(done.online),
                offline=cost(done.offline),
                commitment=done.commitment if self._shadow else b"",
                receipt=account.answer(done.outputs),
            )

    def Generate(
        self, request: party_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[party_pb2.GenerateResponse]:
        """See party.proto."""
        with self._admitted("generate", context, "client/", "owner/", about=request) as (
            peer,
            call,
        ):
            model = self._catalogue.find(request.model, request.version, peer.role)
            writing = self._writing(model, request)
            self._policy.check(model, peer.role, *writing.uses())
            facts = {
                "model": request.model,
                "version": request.version,
                "parent": request.parent.hex(),
                "keep": request.keep,
                "length": writing.tokens.shape[1],
                "most": writing.most,
                "choice": asdict(writing.choice),
            }
            job = Job(request.request_id, "generate", peer.role, facts, writing, salt=request.salt)
            job.upload = self._upload(request.salt, [request.tokens])
            job.result.add_done_callback(lambda _: writing.done.put(None))
            account = self._receipts.open(job, model, [request.tokens])
            with self._queued(context, job) as seconds, account.ending():
                while (written := self._next(job, seconds)) is not None:
                    token = bool(written.outputs)
                    self._metrics.wrote(call, written.taken, token, written.online, written.offline)
                    account.add(written.online, written.evidence)
                    yield party_pb2.GenerateResponse(
                        taken=written.taken,
                        outputs=() if self._shadow else written.outputs,
                        online=cost(written.online),
                        offline=cost(written.offline),
                        version=model.version,
                        commitment=written.commitment if self._shadow else b"",
                        receipt=account.answer(written.outputs) if token else None,
                    )

    def EndSession(
        self, request: party_pb2.EndSessionRequest, context: grpc.ServicerContext
    ) -> party_pb2.EndSessionResponse:
        """See party.proto."""
        with self._admitted("end_session", context, "client/", "owner/") as (peer, _):
            self._sessions.end(request.session, peer.role)
            self._inbox.wake()
            return party_pb2.EndSessionResponse()

    def Vocabulary(
        self, request: party_pb2.VocabularyRequest, context: grpc.ServicerContext
    ) -> Iterator[party_pb2.VocabularyResponse]:
        """See party.proto."""
        with self._admitted("vocabulary", context, "client/", "owner/") as (peer, _):
            data = self._catalogue.find(request.model, request.version, peer.role).vocabulary
            for start in range(0, len(data), CHUNK):
                yield party_pb2.VocabularyResponse(chunk=data[start : start + CHUNK])

    def Deploy(
        self, request_iterator: Iterator[party_pb2.DeployRequest], context: grpc.ServicerContext
    ) -> party_pb2.DeployResponse:
        """See party.proto."""
        with (
            self._admitted("deploy", context, "owner/") as (peer, _),
            self._uploads.staged(request_iterator, peer.role, self._patience(context)) as job,
        ):
            model: Model = self._run(context, job)
            what = {"model": model.name, "version": model.version, "deployment": model.id.hex()}
            self._audit.write("deploy", outcome="ok", who=peer.role, **what)
            return party_pb2.DeployResponse(name=model.name, version=model.version, deployment_id=model.id)

    def RemoveModel(
        self, request: party_pb2.RemoveModelRequest, context: grpc.ServicerContext
    ) -> party_pb2.RemoveModelResponse:
        """See party.proto."""
        with self._admitted("remove", context, "owner/", about=request) as (peer, _):
            facts = {"name": request.name, "version": request.version}
            removed: int = self._run(context, Job(request.request_id, "remove", peer.role, facts, None))
            self._audit.write("remove", outcome="ok", who=peer.role, model=request.name, versions=removed)
            return party_pb2.RemoveModelResponse(removed=removed)

    def RefreshModel(
        self, request: party_pb2.RefreshModelRequest, context: grpc.ServicerContext
    ) -> party_pb2.RefreshModelResponse:
        """See party.proto."""
        with self._admitted("refresh", context, "owner/", "party/", about=request) as (peer, _):
            facts = {"name": request.name, "version": request.version}
            refreshed: int = self._run(context, Job(request.request_id, "refresh", peer.role, facts, None))
            self._audit.write("refresh", outcome="ok", who=peer.role, model=request.name, versions=refreshed)
            return party_pb2.RefreshModelResponse(refreshed=refreshed)

    def SetGrant(self, request: party_pb2.SetGrantRequest, context: grpc.ServicerContext) -> party_pb2.SetGrantResponse:
        """See party.proto."""
        with self._admitted("grant", context, "owner/", about=request) as (peer, _):
            digest = hashlib.sha256(request.grant.payload).hexdigest()
            facts = {"name": request.name, "version": request.version, "grant": digest}
            self._run(context, Job(request.request_id, "grant", peer.role, facts, Signed.of(request.grant)))
            self._audit.write("grant", outcome="ok", who=peer.role, model=request.name, digest=digest)
            return party_pb2.SetGrantResponse()

    def _upload(self, salt: bytes, inputs: Iterable[tensor_pb2.Tensor]) -> str:
        """The commitment to what was sent, where witnesses compare it with what they were sent."""
        if not self._cluster.witnesses:
            return ""
        check_salt(salt)
        return upload_commitment(salt, inputs).hex()

    def _writing(self, model: Model, request: party_pb2.GenerateRequest) -> Writing:
        """A request to generate, checked."""
        if not model.program.caches:
            raise InputError(f"{request.model!r} is no language model: it is asked to infer")
        tokens = share(request.tokens, model.program.inputs[0], self._limits.max_message_mb << 20)
        if len(tokens.shape) != 2 or tokens.shape[0] != 1 or not tokens.shape[1]:
            raise ShapeError(f"tokens of shape {list(tokens.shape)}: send [1, length], at least one")
        if request.keep and not request.parent:
            raise InputError("tokens can only be kept of a session to continue")
        choice = Choice(request.temperature, request.top_k, request.repetition_penalty or Choice().penalty).check()
        more = tokens.shape[1] + max(0, request.max_new_tokens - 1)
        self._sessions.check_length(model.program, request.keep, more)
        return Writing(model, tokens, request.parent, request.keep, request.max_new_tokens, choice)

    @contextmanager
    def _admitted(
        self, action: str, context: grpc.ServicerContext, *roles: str, about: Any = None
    ) -> Iterator[tuple[Peer, Call]]:
        """Who calls, if they may, if there is room, and once the parties are connected. Any error inside ends the RPC.

        What clients may do, those may who are known by a token. about: the request.

        The Call is what the metrics know of it, under the name of `action`.

        Whoever waits here or inside holds a worker; more than there is room for must not starve health checks.
        """
        caller = ""
        try:
            with self._metrics.call(action, lambda: not context.is_active()) as call:
                peer = self._accounts.identify(context, getattr(about, "token", ""))
                caller = peer.role
                require(peer, *roles, *(["jwt/"] if "client/" in roles else []))
                with self._room(peer.role):
                    self._lane.wait_ready(self._patience(context))
                    yield peer, call
        except Exception as error:
            if action not in _READING:
                self._audit.refused(action, caller, about, error)
            channel.abort(context, error)

    @contextmanager
    def _room(self, role: str) -> Iterator[None]:
        """A place among those that wait, of which no client may have too many."""
        with self._waiting_lock:
            for waiting, most in (
                (sum(self._waiting.values()), self._limits.max_waiting_requests),
                (self._waiting[role], self._limits.max_waiting_of_client),
            ):
                if waiting >= most:
                    raise BusyError(f"{most} requests are waiting already; send it again later")
            self._waiting[role] += 1
        try:
            yield
        finally:
            with self._waiting_lock:
                self._waiting[role] -= 1
                self._waiting += Counter()  # forgets who has none

    def _patience(self, context: grpc.ServicerContext) -> float:
        left = context.time_remaining()
        return min(self._limits.connect_timeout_s, _DEFAULT_SECONDS if left is None else max(0.0, left - 0.1))

    def _run(self, context: grpc.ServicerContext, job: Job) -> Any:
        """Have the lane do it, and wait until it is done, the deadline comes, or the caller has gone."""
        with self._queued(context, job) as seconds:
            try:
                return job.result.result(max(0.0, seconds - 0.05))
            except TimeoutError:
                raise self._too_late(job, seconds) from None

    def _next(self, job: Job, seconds: float) -> Written | None:
        """What the next step has yielded, None after the last."""
        try:
            written: Written | None = job.content.done.get(timeout=max(0.0, job.deadline - time.monotonic() - 0.05))
        except queue.Empty:
            raise self._too_late(job, seconds) from None
        if written is None:
            job.result.result(0)
        return written

    def _too_late(self, job: Job, seconds: float) -> DeadlineError:
        why = self._lane.detail or "the parties are busy"
        error = DeadlineError(f"not finished in {seconds:.1f} s; allow more time ({why})")
        job.fail(error)
        return error

    @contextmanager
    def _queued(self, context: grpc.ServicerContext, job: Job) -> Iterator[float]:
        """Let the lane have a request: how many seconds its caller waits."""
        left = context.time_remaining()
        # without a deadline grpc tells of one that is ages away
        seconds = _DEFAULT_SECONDS if left is None or left > _LONGEST else left
        job.deadline = time.monotonic() + seconds
        self._inbox.put(job)
        try:
            if not context.add_callback(lambda: job.fail(AbortedError("the caller has gone"))):
                raise AbortedError("the caller has gone")
            yield seconds
        finally:
            job.fail(AbortedError("the caller has gone"))
            self._inbox.discard(job)
