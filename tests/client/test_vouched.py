"""What a client makes of witnesses' answers."""

from __future__ import annotations

import pytest

from mpcinfer.client.vouched import vouched, with_witnesses
from mpcinfer.config import Cluster
from mpcinfer.errors import TamperingError
from mpcinfer.trust.commitment import output_commitment
from mpcinfer.wire.v1 import party_pb2, tensor_pb2
from tests.inprocess import Keys

OUTPUT = tensor_pb2.Tensor(shape=[1], frac_bits=16, ring_bits=64, data=bytes(8))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """Of two parties, the second with a witness."""
    return Keys(tmp_path_factory.mktemp("keys"), 2, witnesses=(1,)).cluster


def requests() -> list[party_pb2.InferRequest]:
    return [party_pb2.InferRequest(salt=bytes([i]) * 32) for i in range(2)]


def answers(commitment: bytes) -> list[party_pb2.InferResponse]:
    given = [party_pb2.InferResponse(outputs=[OUTPUT]) for _ in range(2)]
    return [*given, party_pb2.InferResponse(commitment=commitment)]


def test_a_witness_is_sent_what_its_party_is(cluster: Cluster) -> None:
    first, second = requests()
    assert with_witnesses(cluster, [first, second]) == [first, second, second]
    assert with_witnesses(cluster, [first, second, first]) == [first, second, first]


def test_answers_that_are_vouched_for_are_the_parties(cluster: Cluster) -> None:
    true = output_commitment(requests()[1].salt, [OUTPUT])
    assert vouched(cluster, requests(), answers(true)) == answers(true)[:2]


@pytest.mark.parametrize("salt", [bytes(32), None])
def test_answers_that_are_not_vouched_for_are_refused(cluster: Cluster, salt: bytes | None) -> None:
    commitment = output_commitment(salt, [OUTPUT]) if salt is not None else b""
    with pytest.raises(TamperingError, match="party/1 has answered with another share than witness/1"):
        vouched(cluster, requests(), answers(commitment))


def test_each_token_has_a_commitment_of_its_own(cluster: Cluster) -> None:
    true = output_commitment(requests()[1].salt, [OUTPUT], 2)
    vouched(cluster, requests(), answers(true), 2)
    with pytest.raises(TamperingError):
        vouched(cluster, requests(), answers(true), 3)


def test_what_has_no_outputs_needs_no_commitment(cluster: Cluster) -> None:
    taken = [party_pb2.GenerateResponse(taken=3) for _ in range(3)]
    assert vouched(cluster, requests(), taken) == taken[:2]
    removed = [party_pb2.RemoveModelResponse(removed=1) for _ in range(3)]
    assert vouched(cluster, requests(), removed) == removed[:2]
