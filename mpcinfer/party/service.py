"""The party's gRPC face: identities, limits, and shapes are checked here; the lane does the work."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc

from mpcinfer import __version__
from mpcinfer.config import PROTOCOL_VERSION, Cluster, Limits
from mpcinfer.errors import DeadlineError, ForbiddenError, InputError, ShapeError, UploadError
from mpcinfer.graph.interpret import check_inputs
from mpcinfer.graph.program import Program, Value
from mpcinfer.party.catalogue import Catalogue, Model, check_manifest
from mpcinfer.party.epoch import Former
from mpcinfer.party.inbox import Inbox, Job
from mpcinfer.party.lane import Inferred, Lane, Phase
from mpcinfer.party.store import Store, WeightEntry
from mpcinfer.protocol.types import Shared
from mpcinfer.ring import prg
from mpcinfer.ring.codec import FixedPoint
from mpcinfer.ring.domain import Z64
from mpcinfer.wire import channel
from mpcinfer.wire.identity import Peer, peer_of, require
from mpcinfer.wire.v1 import mesh_pb2_grpc, party_pb2, party_pb2_grpc, tensor_pb2

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DEFAULT_SECONDS = 300.0


class PartyService(party_pb2_grpc.PartyServiceServicer):
    """See party.proto."""

    def __init__(self, cluster: Cluster, lane: Lane, inbox: Inbox, catalogue: Catalogue, store: Store, limits: Limits) -> None:
        self._cluster = cluster
        self._lane = lane
        self._inbox = inbox
        self._catalogue = catalogue
        self._store = store
        self._limits = limits
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
                uptime_seconds=time.monotonic() - self._started,
                models=[_info(m) for m in self._catalogue.models()],
            )
        except Exception as error:
            channel.abort(context, error)

    def ListModels(
        self, request: party_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> party_pb2.ListModelsResponse:
        """See party.proto."""
        try:
            require(peer_of(context, self._cluster), "owner/", "client/", "party/")
            self._lane.wait_ready(self._patience(context))
            return party_pb2.ListModelsResponse(models=[_info(m) for m in self._catalogue.models()])
        except Exception as error:
            channel.abort(context, error)

    def Infer(self, request: party_pb2.InferRequest, context: grpc.ServicerContext) -> party_pb2.InferResponse:
        """See party.proto."""
        try:
            peer = self._caller(context, "client/", "owner/")
            self._lane.wait_ready(self._patience(context))
            model = self._catalogue.find(request.model, request.version)
            inputs = [_share(t, v) for t, v in zip(request.inputs, model.program.inputs, strict=False)]
            check_inputs(model.program, [tuple(t.shape) for t in request.inputs])
            facts = {
                "model": request.model,
                "version": request.version,
                "shapes": [list(x.shape) for x in inputs],
            }
            done: Inferred = self._run(context, Job(request.request_id, "infer", peer.role, facts, inputs))
            return party_pb2.InferResponse(
                outputs=[_tensor(x) for x in done.outputs],
                version=done.model.version,
                online=_cost(done.online),
                offline=_cost(done.offline),
            )
        except Exception as error:
            channel.abort(context, error)

    def Deploy(
        self, request_iterator: Iterator[party_pb2.DeployRequest], context: grpc.ServicerContext
    ) -> party_pb2.DeployResponse:
        """See party.proto."""
        staged = None
        try:
            peer = self._caller(context, "owner/")
            self._lane.wait_ready(self._patience(context))
            with self._uploads:
                first = next(iter(request_iterator), None)
                if first is None or first.WhichOneof("part") != "header":
                    raise UploadError("an upload begins with its header")
                header = first.header
                self._check_header(header)
                entries = [WeightEntry(w.name, tuple(w.shape), w.frac_bits, w.seed or None) for w in header.weights]
                program = Program.from_bytes(header.program)
                check_manifest(program, entries)
                metadata = {
                    "name": header.name,
                    "owner": peer.role,
                    "program": program.to_bytes().decode(),
                    "created": time.time(),
                }
                staged = self._store.stage(header.request_id, metadata, entries)
                for part in request_iterator:
                    staged.write(part.chunk)
                staged.finish(header.size, header.digest)
            facts = {"name": header.name, "program": program.digest().hex()}
            model: Model = self._run(context, Job(header.request_id, "deploy", peer.role, facts, None))
            return party_pb2.DeployResponse(name=model.name, version=model.version, deployment_id=model.id)
        except Exception as error:
            if isinstance(error, grpc.RpcError):  # the caller's stream broke in the middle
                error = UploadError("the upload ended before it was complete")
            channel.abort(context, error)
        finally:
            if staged is not None:
                staged.discard()

    def RemoveModel(
        self, request: party_pb2.RemoveModelRequest, context: grpc.ServicerContext
    ) -> party_pb2.RemoveModelResponse:
        """See party.proto."""
        try:
            peer = self._caller(context, "owner/")
            self._lane.wait_ready(self._patience(context))
            facts = {"name": request.name, "version": request.version}
            removed: int = self._run(context, Job(request.request_id, "remove", peer.role, facts, None))
            return party_pb2.RemoveModelResponse(removed=removed)
        except Exception as error:
            channel.abort(context, error)

    def _caller(self, context: grpc.ServicerContext, *roles: str) -> Peer:
        peer = peer_of(context, self._cluster)
        require(peer, *roles)
        return peer

    def _patience(self, context: grpc.ServicerContext) -> float:
        left = context.time_remaining()
        return min(self._limits.connect_timeout_s, _DEFAULT_SECONDS if left is None else max(0.0, left - 0.1))

    def _run(self, context: grpc.ServicerContext, job: Job) -> Any:
        left = context.time_remaining()
        seconds = _DEFAULT_SECONDS if left is None else left
        job.deadline = time.monotonic() + seconds
        self._inbox.put(job)
        context.add_callback(lambda: self._inbox.discard(job))
        try:
            return job.result.result(max(0.0, seconds - 0.05))
        except TimeoutError:
            error = DeadlineError(f"not finished in {seconds:.1f} s; allow more time ({self._lane.detail or 'the parties are busy'})")
            job.fail(error)
            raise error from None
        finally:
            self._inbox.discard(job)

    def _check_header(self, header: party_pb2.DeployHeader) -> None:
        if not _NAME.fullmatch(header.name):
            raise InputError("a model's name is 1 to 64 letters, digits, dots, dashes and underscores, a letter or digit first")
        if header.size > self._limits.max_upload_mb << 20:
            raise UploadError(f"the upload is larger than this party allows ({self._limits.max_upload_mb} MiB)")


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
                raise ForbiddenError(f"party {number} waits for party {self._index} to connect, not the other way round")
            outgoing = self._former.accept(number, request_iterator, context)
        except Exception as error:
            channel.abort(context, error)
        yield from outgoing


def _share(tensor: tensor_pb2.Tensor, declared: Value) -> Shared:
    """The share in a request, checked against the model's declaration."""
    shape = tuple(tensor.shape)
    if tensor.ring_bits not in (0, 64) or tensor.frac_bits != declared.frac_bits:
        raise InputError(f"input {declared.name!r} must be shared over 64 bits with {declared.frac_bits} fraction bits")
    if any(size < 1 for size in shape):
        raise ShapeError(f"input {declared.name!r} has shape {list(shape)}: every size must be at least 1")
    count = 1
    for size in shape:
        count *= size
    if tensor.WhichOneof("content") == "seed":
        if len(tensor.seed) != prg.SEED_BYTES:
            raise InputError(f"a seed has {prg.SEED_BYTES} bytes")
        if count > 1 << 28:
            raise ShapeError(f"input {declared.name!r} is too large; send smaller batches")
        return Shared(prg.expand(tensor.seed, shape, Z64), tensor.frac_bits)
    if len(tensor.data) != 8 * count:
        raise InputError(f"input {declared.name!r} has {len(tensor.data)} bytes of data, its shape needs {8 * count}")
    return Shared(Z64.unpack(tensor.data, shape), tensor.frac_bits)


def _tensor(x: Shared) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(shape=x.shape, frac_bits=x.frac_bits, ring_bits=64, data=bytes(Z64.pack(x.share)))


def _cost(phase: Phase) -> tensor_pb2.PhaseCost:
    return tensor_pb2.PhaseCost(
        seconds=phase.seconds,
        rounds=phase.rounds,
        bytes_sent=phase.bytes_sent,
        bytes_from_dealer=phase.bytes_from_dealer,
    )


def _spec(value: Value) -> tensor_pb2.TensorSpec:
    limit = FixedPoint(value.frac_bits).limit if value.frac_bits else 0.0
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
    )


