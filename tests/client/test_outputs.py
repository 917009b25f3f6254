"""What a request is said to have cost, from what each party says."""

from __future__ import annotations

import pytest

from mpcinfer.client.outputs import seconds_online
from mpcinfer.wire.v1 import tensor_pb2


def costs(*seconds: float) -> list[tensor_pb2.PhaseCost]:
    return [tensor_pb2.PhaseCost(seconds=each) for each in seconds]


@pytest.mark.parametrize(
    ("online", "offline", "expected"),
    [
        ((2.0, 2.5), (1.0, 1.0), 2.5),  # both had all they needed
        ((5.0, 2.0), (1.0, 4.0), 2.0),  # party 0 waited for what party 1 was waiting for
        ((5.0, 3.0, 4.5), (1.0, 3.0, 2.0), 3.5),
        ((2.0, 2.0), (0.5, 4.0), 2.0),  # fetched long before
        ((2.0, 2.1), (4.0, 0.5), 2.0),
    ],
)
def test_waiting_for_randomness_is_no_online_time(
    online: tuple[float, ...], offline: tuple[float, ...], expected: float
) -> None:
    assert seconds_online(costs(*online), costs(*offline)) == pytest.approx(expected)
