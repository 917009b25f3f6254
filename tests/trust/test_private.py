"""Files that only their owner may read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mpcinfer.trust.private import write_private


def test_a_file_that_others_could_read_becomes_private(tmp_path: Path) -> None:
    path = tmp_path / "receipt"
    path.write_bytes(b"older and longer")
    path.chmod(0o644)
    write_private(path, b"new")
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o600


def test_what_cannot_be_made_private_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> None:
        raise PermissionError("another user's")

    path = tmp_path / "receipt"
    path.write_bytes(b"older")
    monkeypatch.setattr(os, "fchmod", refused)
    with pytest.raises(PermissionError):
        write_private(path, b"new")
    assert path.read_bytes() == b"older"
