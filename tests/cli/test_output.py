"""Figures for people."""

from __future__ import annotations

import pytest

from mpcinfer.cli.output import in_bytes, in_seconds, print_table


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
