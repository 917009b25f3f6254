"""A shell in this process, and fake parties to talk to."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mpcinfer import cli
from tests.client.fakes import FakeCluster, info, running, spec


@dataclass
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Shell:
    """Runs commands in this process, in a directory of its own."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capsys = capsys
        self.monkeypatch = monkeypatch

    def __call__(self, *arguments: object) -> Done:
        self.monkeypatch.setattr(sys, "argv", ["mpcinfer", *map(str, arguments)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        said = self.capsys.readouterr()
        assert isinstance(exit_.value.code, int)
        return Done(exit_.value.code, said.out, said.err)


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    for variable in ("MPCINFER_CLUSTER", "MPCINFER_IDENTITY"):
        monkeypatch.delenv(variable, raising=False)
    return Shell(capsys, monkeypatch)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[FakeCluster]:
    """Two fake parties, with cluster file and keys in the working directory."""
    for fake in running(2):
        fake.write(tmp_path, "client/a", "owner/o")
        # a digest of a tokenizer, as models of text have it: the proxy lists no others
        fake.deploy(info("same", [spec("x", -1, 3)], [spec("y", -1, 3)], parameters=12, vocabulary_digest=bytes(32)))
        yield fake
