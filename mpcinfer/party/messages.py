"""What requests carry in and answers carry out: shares, descriptions of models, costs."""

from __future__ import annotations

import hashlib
import math

from mpcinfer.errors import InputError, ShapeError
from mpcinfer.graph.program import Input, Value
from mpcinfer.party.catalogue import Model
from mpcinfer.party.part import Phase
from mpcinfer.protocol.types import Shared
from mpcinfer.ring import prg
from mpcinfer.ring.codec import FixedPoint
from mpcinfer.ring.domain import Z64
from mpcinfer.wire.v1 import party_pb2, tensor_pb2


def share(tensor: tensor_pb2.Tensor, declared: Value, max_bytes: int) -> Shared:
    """The share in a request, checked against the model's declaration."""
    shape = tuple(tensor.shape)
    if tensor.ring_bits not in (0, 64) or tensor.frac_bits != declared.frac_bits:
        raise InputError(f"input {declared.name!r} must be shared over 64 bits with {declared.frac_bits} fraction bits")
    if min(shape, default=0) < 0:
        raise ShapeError(f"input {declared.name!r} has a negative size; send its shape")
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


def cost(phase: Phase) -> tensor_pb2.PhaseCost:
    """What a phase has cost this party."""
    return tensor_pb2.PhaseCost(
        seconds=phase.seconds,
        rounds=phase.rounds,
        bytes_sent=phase.bytes_sent,
        bytes_from_dealer=phase.bytes_from_dealer,
    )


def spec(value: Value) -> tensor_pb2.TensorSpec:
    """What a model takes or gives, and the limit that holds for it."""
    declared = value.limit if isinstance(value, Input) else 0.0
    limit = declared or (FixedPoint(value.frac_bits).limit if value.frac_bits else 0.0)
    return tensor_pb2.TensorSpec(
        name=value.name, shape=value.shape, frac_bits=value.frac_bits, ring_bits=64, limit=limit
    )


def info(model: Model, viewer: str) -> party_pb2.ModelInfo:
    """What somebody for whom a model exists may know of it: the grant, which names all clients, is its owner's."""
    return party_pb2.ModelInfo(
        name=model.name,
        version=model.version,
        deployment_id=model.id,
        owner=model.owner,
        inputs=[spec(v) for v in model.program.inputs],
        outputs=[spec(v) for v in model.program.outputs],
        reveal=model.program.reveal,
        created_unix_seconds=model.created,
        parameters=model.program.size,
        sizes=[tensor_pb2.Size(name=s.name, low=s.low, high=s.high) for s in model.program.sizes],
        context=model.program.context,
        grant=model.granted.signed.message() if model.granted is not None and viewer == model.owner else None,
        vocabulary_digest=hashlib.sha256(model.vocabulary).digest() if model.vocabulary else b"",
    )
