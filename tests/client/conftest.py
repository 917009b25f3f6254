"""Fake parties for the tests of the client's side."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.client.fakes import FakeCluster, running


@pytest.fixture
def world() -> Iterator[FakeCluster]:
    """Two fake parties."""
    yield from running(2)


@pytest.fixture(params=[2, 3], ids="n={}".format)
def worlds(request: pytest.FixtureRequest) -> Iterator[FakeCluster]:
    """Two, then three fake parties."""
    yield from running(request.param)
