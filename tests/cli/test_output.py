"""Figures for people, and the file that says that all are ready."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpcinfer.cli.output import announcing, in_bytes, in_seconds, print_table
from mpcinfer.errors import ConfigError


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (7, "7 B"), (999, "999 B"), (1000, "1 kB"), (12_345, "12.3 kB"), (1.2e6, "1.2 MB"), (3e12, "3000 GB")],
)
def test_bytes(count: float, text: str) -> None:
    assert in_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 ms"), (1e-6, "<0.1 ms"), (0.0123, "12.3 ms"), (0.9996, "1 s"), (12.34, "12.3 s"), (4321, "4321 s")],
)
def test_seconds(seconds: float, text: str) -> None:
    assert in_seconds(seconds) == text


def test_numbers_stand_at_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["NAME", "N"], [["a", "1"], ["b", "100"]], numbers=["N"])
    assert capsys.readouterr().out == "NAME    N\na       1\nb     100\n"


def test_a_ready_file_is_whole_when_it_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, replace, seen = tmp_path / "ready", Path.replace, []

    def watched(self: Path, target: Path) -> Path:
        seen.append((target.exists(), self.read_text()))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    file.write_text("of an earlier run")
    with announcing(file) as announce:
        assert not file.exists()
        announce()
        assert seen == [(False, "ready\n")] and file.read_text() == "ready\n"
    assert not list(tmp_path.iterdir())


def test_a_ready_file_goes_when_a_run_fails(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="of the run"), announcing(tmp_path / "ready") as announce:
        announce()
        raise OSError("of the run")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="cannot write"), announcing(tmp_path / "no" / "ready"):
        raise AssertionError("started all the same")
    with announcing(None) as announce:
        announce()
