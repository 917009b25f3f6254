"""What a data owner makes of the parties' answers: outputs, and what they have cost."""

from __future__ import annotations

import math

import numpy as np
import torch

from mpcinfer.client.model import TensorSpec
from mpcinfer.errors import ProtocolError
from mpcinfer.graph.sizes import agrees
from mpcinfer.ring.domain import Ring
from mpcinfer.ring.sharing import combine
from mpcinfer.wire.v1 import party_pb2, tensor_pb2

Cost = dict[str, dict[str, float]]


def output_of(
    answers: list[party_pb2.InferResponse], position: int, spec: TensorSpec, expected: tuple[int, ...]
) -> torch.Tensor:
    """Output number `position`: the sum of all parties' shares, signed."""
    ring = Ring(spec.ring_bits)
    shares: list[torch.Tensor] = []
    for index, answer in enumerate(answers):
        message = answer.outputs[position] if position < len(answer.outputs) else tensor_pb2.Tensor()
        shape = tuple(message.shape)
        form = message.frac_bits, message.ring_bits or 64
        same = not shares or shape == tuple(shares[0].shape)
        if not agrees(expected, shape) or not same or form != (spec.frac_bits, spec.ring_bits):
            raise ProtocolError(f"party/{index} answered with another output {spec.name!r} than the model declares")
        if len(message.data) == 8 * math.prod(shape):
            # A copy, because a tensor over bytes that cannot be written to makes torch warn.
            data = np.frombuffer(message.data, "<i8").astype(np.int64)
            shares.append(ring.reduce(torch.from_numpy(data).reshape(shape)))
        else:
            raise ProtocolError(f"party/{index} answered with a damaged share of output {spec.name!r}")
    total = combine(shares, ring)
    return total if spec.ring_bits == 64 else total - ((total >> (spec.ring_bits - 1)) << spec.ring_bits)


def cost_of(answers: list[party_pb2.InferResponse]) -> Cost:
    """What a request has cost, as the parties counted it."""

    def phase(costs: list[tensor_pb2.PhaseCost]) -> dict[str, float]:
        return {
            "seconds": max(cost.seconds for cost in costs),
            "rounds": max(cost.rounds for cost in costs),
            "bytes_sent_per_party": max(cost.bytes_sent for cost in costs),
        }

    offline = [answer.offline for answer in answers]
    dealt = sum(cost.bytes_from_dealer for cost in offline)
    return {
        "online": phase([answer.online for answer in answers]),
        "offline": {**phase(offline), "bytes_sent_by_dealer": dealt},
    }


def total(costs: list[Cost]) -> Cost:
    """Of several requests."""
    return {phase: {item: sum(cost[phase][item] for cost in costs) for item in costs[0][phase]} for phase in costs[0]}
