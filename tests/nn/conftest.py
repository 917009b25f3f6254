"""Fixtures for the operators' tests."""

from __future__ import annotations

import pytest


@pytest.fixture(params=[2, pytest.param(3, marks=pytest.mark.slow)], ids="n={}".format)
def parties(request: pytest.FixtureRequest) -> int:
    return int(request.param)
