"""What a process logs: plain data only."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcinfer.errors import InputError
from mpcinfer.protocol.types import Shared
from mpcinfer.wire.server import configure_logging
from mpcinfer.wire.v1 import tensor_pb2

SECRET = 987654321


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What goes to stderr."""
    root = logging.getLogger()
    handlers, level, stream = root.handlers[:], root.level, io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    root.handlers = []
    configure_logging("info")
    yield stream
    root.handlers = handlers
    root.setLevel(level)


SECRETS = [
    torch.tensor([SECRET]),
    [SECRET],
    {"seed": SECRET},
    str(SECRET).encode(),
    Shared(torch.tensor([SECRET])),
    tensor_pb2.Tensor(data=str(SECRET).encode()),
    ValueError(SECRET),
]


@pytest.mark.parametrize("secret", SECRETS, ids=lambda x: type(x).__name__)
def test_what_is_no_plain_data_shows_as_its_type(logged: io.StringIO, secret: Any) -> None:
    logging.getLogger("x").warning("here is %s", secret)
    logging.getLogger("x").warning("and %r of %d", secret, 3)
    assert str(SECRET) not in logged.getvalue()
    assert logged.getvalue().count(type(secret).__name__) == 2


def test_plain_data_is_shown(logged: io.StringIO) -> None:
    logging.getLogger("x").info("%s %d %.1f %s %s", "words", 3, 2.5, Path("a/b"), InputError("why"))
    assert logged.getvalue().endswith("x: words 3 2.5 a/b why\n")


def test_without_the_filter_a_secret_would_show(logged: io.StringIO) -> None:
    for handler in logging.getLogger().handlers:
        handler.filters.clear()
    logging.getLogger("x").warning("here is %s", SECRETS[0])
    assert str(SECRET) in logged.getvalue()
