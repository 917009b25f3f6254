"""Compiled kernels are cached where only this user can write, or for this process alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os
access = os.access
os.access = lambda path, mode: {writable} and access(path, mode)
import mpcinfer.ring
print(os.environ.get("NUMBA_CACHE_DIR", "numba's own"))
import mpcinfer.ring.bits
"""


def _cache(*, writable: bool, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"} | environment
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(writable=writable)],
        env=clean, capture_output=True, text=True, timeout=100, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    return done.stdout.strip()


def test_numba_decides_where_it_can_write() -> None:
    assert _cache(writable=True) == "numba's own"


def test_a_hardened_service_gets_a_directory_of_its_own(tmp_path: Path) -> None:
    directory = Path(_cache(writable=False, TMPDIR=str(tmp_path)))
    assert directory.parent == tmp_path and directory.stat().st_mode & 0o077 == 0
    assert _cache(writable=False, TMPDIR=str(tmp_path)) != str(directory)  # never one that another process chose


def test_what_the_operator_sets_is_used(tmp_path: Path) -> None:
    assert _cache(writable=False, NUMBA_CACHE_DIR=str(tmp_path)) == str(tmp_path)
