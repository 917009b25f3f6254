"""Calls in a cluster with witnesses: each is sent what its party is, and vouches for what its party answers."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Any

from mpcinfer.config import Cluster
from mpcinfer.errors import TamperingError
from mpcinfer.trust.commitment import output_commitment
from mpcinfer.wire.v1 import party_pb2

_WITH_OUTPUTS = (party_pb2.InferResponse, party_pb2.GenerateResponse)


def with_witnesses(cluster: Cluster, requests: Sequence[Any]) -> list[Any]:
    """The requests of all parties, and for each witness that of its party, unless they are there already."""
    if len(requests) == cluster.n:
        return [*requests, *(requests[endpoint.index] for endpoint in cluster.witnesses)]
    return list(requests)


def vouched(cluster: Cluster, requests: Sequence[Any], answers: Sequence[Any], number: int = 0) -> list[Any]:
    """The parties' answers, once each witness's commitment was compared with what its party has answered.

    number: of the answer, where a request has several. TamperingError naming the pair if one differs.
    """
    for endpoint, answer in zip(cluster.witnesses, answers[cluster.n :], strict=True):
        given = answers[endpoint.index]
        if not isinstance(answer, _WITH_OUTPUTS) or not (given.outputs or answer.commitment):
            continue
        computed = output_commitment(requests[endpoint.index].salt, given.outputs, number)
        if not hmac.compare_digest(computed, answer.commitment):
            raise TamperingError(
                f"party/{endpoint.index} has answered with another share than {endpoint.role} vouches for; do not use "
                "this answer, and ask both their operators"
            )
    return list(answers[: cluster.n])
