"""The party's gRPC face: identities, limits, and shapes are checked here; the lane does the work."""

from __future__ import annotations

import base64
import hashlib
import math
import queue
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import grpc

from mpcinfer import __version__
from mpcinfer.config import PROTOCOL_VERSION, Cluster, Limits
from mpcinfer.errors import AbortedError, BusyError, DeadlineError, ForbiddenError, InputError, ShapeError, UploadError
from mpcinfer.graph.interpret import check_inputs
from mpcinfer.graph.program import Input, Program, Value
from mpcinfer.nn.sampling import Choice
from mpcinfer.party.actions import Inference, Inferred
from mpcinfer.party.catalogue import Catalogue, Model, check_manifest
from mpcinfer.party.epoch import Former
from mpcinfer.party.generation import Writing, Written
from mpcinfer.party.inbox import Inbox, Job
from mpcinfer.party.lane import Lane
from mpcinfer.party.metrics import Call, PartyMetrics
from mpcinfer.party.record import WeightEntry
from mpcinfer.party.session import Sessions
from mpcinfer.party.stepping import Phase
from mpcinfer.party.store import Store
from mpcinfer.protocol.types import Shared
from mpcinfer.ring import prg
from mpcinfer.ring.codec import FixedPoint
from mpcinfer.ring.domain import Z64
from mpcinfer.wire import channel
from mpcinfer.wire.frames import CHUNK
from mpcinfer.wire.identity import Peer, peer_of, require
from mpcinfer.wire.v1 import mesh_pb2_grpc, party_pb2, party_pb2_grpc, tensor_pb2

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DEFAULT_SECONDS = 300.0
_MOST_VOCABULARY = 16 << 20


class PartyService(party_pb2_grpc.PartyServiceServicer):
    """See party.proto."""

    def __init__(
        self,
        cluster: Cluster,
        lane: Lane,
        inbox: Inbox,
        catalogue: Catalogue,
        sessions: Sessions,
        store: Store,
        limits: Limits,
        metrics: PartyMetrics,
    ) -> None:
        self._cluster = cluster
        self._metrics = metrics
        self._lane = lane
        self._inbox = inbox
        self._catalogue = catalogue
        self._sessions = sessions
        self._store = store
        self._limits = limits
        self._admission = threading.BoundedSemaphore(limits.max_waiting_requests)
        self._uploads = threading.BoundedSemaphore(4)
        self._started = time.monotonic()

    def Status(self, request: party_pb2.StatusRequest, context: grpc.ServicerContext) -> party_pb2.StatusResponse:
        """See party.proto."""
        try:
            peer_of(context, self._cluster)
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
                models=[_info(m) for m in self._catalogue.models()],
            )
        except Exception as error:
            channel.abort(context, error)

    def ListModels(
        self, request: party_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> party_pb2.ListModelsResponse:
        """See party.proto."""
        with self._admitted("models", context, "owner/", "client/", "party/"):
            return party_pb2.ListModelsResponse(models=[_info(m) for m in self._catalogue.models()])

    def Infer(self, request: party_pb2.InferRequest, context: grpc.ServicerContext) -> party_pb2.InferResponse:
        """See party.proto."""
        with self._admitted("infer", context, "client/", "owner/") as (peer, call):
            model = self._catalogue.find(request.model, request.version)
            if model.program.caches:
                raise InputError(f"{request.model!r} is a language model: it is asked to generate")
            check_inputs(model.program, [tuple(t.shape) for t in request.inputs])
            declared = zip(request.inputs, model.program.inputs, strict=True)
            inputs = [_share(t, v, self._limits.max_message_mb << 20) for t, v in declared]
            facts = {"model": request.model, "version": request.version, "shapes": [list(x.shape) for x in inputs]}
            content = Inference(model, inputs)
            done: Inferred = self._run(context, Job(request.request_id, "infer", peer.role, facts, content))
            self._metrics.step(call, done.online, done.offline)
            return party_pb2.InferResponse(
                outputs=[reveal(x) for x in done.outputs],
                version=done.model.version,
                online=_cost(done.online),
                offline=_cost(done.offline),
            )

    def Generate(
        self, request: party_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[party_pb2.GenerateResponse]:
        """See party.proto."""
        with self._admitted("generate", context, "client/", "owner/") as (peer, call):
            model = self._catalogue.find(request.model, request.version)
            writing = self._writing(model, request)
            facts = {
                "model": request.model,
                "version": request.version,
                "parent": request.parent.hex(),
                "keep": request.keep,
                "length": writing.tokens.shape[1],
                "most": writing.most,
                "choice": asdict(writing.choice),
            }
            job = Job(request.request_id, "generate", peer.role, facts, writing)
            job.result.add_done_callback(lambda _: writing.done.put(None))
            with self._queued(context, job) as seconds:
                while (written := self._next(job, seconds)) is not None:
                    token = bool(written.outputs)
                    self._metrics.wrote(call, written.taken, token, written.online, written.offline)
                    yield party_pb2.GenerateResponse(
                        taken=written.taken,
                        outputs=[reveal(x) for x in written.outputs],
                        online=_cost(written.online),
                        offline=_cost(written.offline),
                        version=model.version,
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
        with self._admitted("vocabulary", context, "client/", "owner/"):
            data = self._catalogue.find(request.model, request.version).vocabulary
            for start in range(0, len(data), CHUNK):
                yield party_pb2.VocabularyResponse(chunk=data[start : start + CHUNK])

    def Deploy(
        self, request_iterator: Iterator[party_pb2.DeployRequest], context: grpc.ServicerContext
    ) -> party_pb2.DeployResponse:
        """See party.proto."""
        with (
            self._admitted("deploy", context, "owner/") as (peer, _),
            self._upload(context, request_iterator, peer) as (id_, facts),
        ):
            model: Model = self._run(context, Job(id_, "deploy", peer.role, facts, None))
            return party_pb2.DeployResponse(name=model.name, version=model.version, deployment_id=model.id)

    def RemoveModel(
        self, request: party_pb2.RemoveModelRequest, context: grpc.ServicerContext
    ) -> party_pb2.RemoveModelResponse:
        """See party.proto."""
        with self._admitted("remove", context, "owner/") as (peer, _):
            facts = {"name": request.name, "version": request.version}
            removed: int = self._run(context, Job(request.request_id, "remove", peer.role, facts, None))
            return party_pb2.RemoveModelResponse(removed=removed)

    def _writing(self, model: Model, request: party_pb2.GenerateRequest) -> Writing:
        """A request to generate, checked."""
        if not model.program.caches:
            raise InputError(f"{request.model!r} is no language model: it is asked to infer")
        tokens = _share(request.tokens, model.program.inputs[0], self._limits.max_message_mb << 20)
        if len(tokens.shape) != 2 or tokens.shape[0] != 1 or not tokens.shape[1]:
            raise ShapeError(f"tokens of shape {list(tokens.shape)}: send [1, length], at least one")
        if request.keep and not request.parent:
            raise InputError("tokens can only be kept of a session to continue")
        choice = Choice(request.temperature, request.top_k, request.repetition_penalty or Choice().penalty).check()
        more = tokens.shape[1] + max(0, request.max_new_tokens - 1)
        self._sessions.check_length(model.program, request.keep, more)
        return Writing(model, tokens, request.parent, request.keep, request.max_new_tokens, choice)

    @contextmanager
    def _admitted(self, action: str, context: grpc.ServicerContext, *roles: str) -> Iterator[tuple[Peer, Call]]:
        """Who calls, if they may, if there is room, and once the parties are connected. Any error inside ends the RPC.

        The Call is what the metrics know of it, under the name of `action`.

        Whoever waits here or inside holds a worker; more than there is room for must not starve health checks.
        """
        try:
            with self._metrics.call(action, lambda: not context.is_active()) as call:
                peer = peer_of(context, self._cluster)
                require(peer, *roles)
                if not self._admission.acquire(blocking=False):
                    raise BusyError(
                        f"{self._limits.max_waiting_requests} requests are waiting already; send it again later"
                    )
                try:
                    self._lane.wait_ready(self._patience(context))
                    yield peer, call
                finally:
                    self._admission.release()
        except Exception as error:
            channel.abort(context, error)

    @contextmanager
    def _upload(
        self, context: grpc.ServicerContext, parts: Iterator[party_pb2.DeployRequest], peer: Peer
    ) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """Stage an upload: its request id and public facts. What is not committed at the end is discarded."""
        with ExitStack() as stack:
            if not self._uploads.acquire(timeout=self._patience(context)):
                raise BusyError("too many uploads at a time; send it again later")
            try:
                header, program, entries = self._header(next(parts, None))
                metadata = {
                    "name": header.name,
                    "owner": peer.role,
                    "program": program.to_bytes().decode(),
                    "created": time.time(),
                    "vocabulary": base64.b64encode(header.vocabulary).decode(),
                }
                stack.enter_context(self._inbox.arriving(header.request_id))
                staged = self._store.stage(header.request_id, metadata, entries)
                stack.callback(staged.discard)
                for part in parts:
                    staged.write(part.chunk)
                staged.finish(header.size, header.digest)
            except grpc.RpcError as error:
                raise UploadError("the upload ended before it was complete") from error
            finally:
                self._uploads.release()
            vocabulary = hashlib.sha256(header.vocabulary).hexdigest()
            yield header.request_id, {"name": header.name, "program": program.digest().hex(), "vocabulary": vocabulary}

    def _header(
        self, first: party_pb2.DeployRequest | None
    ) -> tuple[party_pb2.DeployHeader, Program, list[WeightEntry]]:
        """The first message of an upload, checked."""
        if first is None or first.WhichOneof("part") != "header":
            raise UploadError("an upload begins with its header")
        header = first.header
        if not _NAME.fullmatch(header.name):
            raise InputError(
                "a model's name is 1 to 64 letters, digits, dots, dashes and underscores, a letter or digit first"
            )
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
        seconds = _DEFAULT_SECONDS if left is None else left
        job.deadline = time.monotonic() + seconds
        self._inbox.put(job)
        try:
            if not context.add_callback(lambda: job.fail(AbortedError("the caller has gone"))):
                raise AbortedError("the caller has gone")
            yield seconds
        finally:
            job.fail(AbortedError("the caller has gone"))
            self._inbox.discard(job)


class MeshService(mesh_pb2_grpc.MeshServiceServicer):
    """See mesh.proto: takes in the streams of parties with lower indices."""

    def __init__(self, cluster: Cluster, index: int, former: Former) -> None:
        self._cluster = cluster
        self._index = index
        self._former = former

    def Connect(self, request_iterator: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        """See mesh.proto."""
        try:
            peer = peer_of(context, self._cluster)
            require(peer, "party/")
            number = int(peer.role.partition("/")[2])
            if number >= self._index:
                raise ForbiddenError(
                    f"party {number} waits for party {self._index} to connect, not the other way round"
                )
            outgoing = self._former.accept(number, request_iterator, context)
        except Exception as error:
            channel.abort(context, error)
        yield from outgoing


def _share(tensor: tensor_pb2.Tensor, declared: Value, max_bytes: int) -> Shared:
    """The share in a request, checked against the model's declaration."""
    shape = tuple(tensor.shape)
    if tensor.ring_bits not in (0, 64) or tensor.frac_bits != declared.frac_bits:
        raise InputError(f"input {declared.name!r} must be shared over 64 bits with {declared.frac_bits} fraction bits")
    count = math.prod(shape)
    if tensor.WhichOneof("content") == "seed":
        if len(tensor.seed) != prg.SEED_BYTES:
            raise InputError(f"a seed has {prg.SEED_BYTES} bytes")
        if 8 * count > max_bytes:  # what a seed stands for may be no larger than what could be sent
            raise ShapeError(f"input {declared.name!r} is too large; send smaller batches")
        return Shared(prg.expand(tensor.seed, shape, Z64), tensor.frac_bits)
    if len(tensor.data) != 8 * count:
        raise InputError(f"input {declared.name!r} has {len(tensor.data)} bytes of data, its shape needs {8 * count}")
    return Shared(Z64.unpack(tensor.data, shape), tensor.frac_bits)


def reveal(x: Shared) -> tensor_pb2.Tensor:
    """The one way out for a share: in the answer to the client who asked, after re-randomisation."""
    return tensor_pb2.Tensor(shape=x.shape, frac_bits=x.frac_bits, ring_bits=64, data=bytes(Z64.pack(x.share)))


def _cost(phase: Phase) -> tensor_pb2.PhaseCost:
    return tensor_pb2.PhaseCost(
        seconds=phase.seconds,
        rounds=phase.rounds,
        bytes_sent=phase.bytes_sent,
        bytes_from_dealer=phase.bytes_from_dealer,
    )


def _spec(value: Value) -> tensor_pb2.TensorSpec:
    declared = value.limit if isinstance(value, Input) else 0.0
    limit = declared or (FixedPoint(value.frac_bits).limit if value.frac_bits else 0.0)
    return tensor_pb2.TensorSpec(
        name=value.name, shape=value.shape, frac_bits=value.frac_bits, ring_bits=64, limit=limit
    )


def _info(model: Model) -> party_pb2.ModelInfo:
    return party_pb2.ModelInfo(
        name=model.name,
        version=model.version,
        deployment_id=model.id,
        owner=model.owner,
        inputs=[_spec(v) for v in model.program.inputs],
        outputs=[_spec(v) for v in model.program.outputs],
        reveal=model.program.reveal,
        created_unix_seconds=model.created,
        parameters=model.program.size,
        sizes=[tensor_pb2.Size(name=s.name, low=s.low, high=s.high) for s in model.program.sizes],
        context=model.program.context,
        vocabulary_digest=hashlib.sha256(model.vocabulary).digest() if model.vocabulary else b"",
    )
