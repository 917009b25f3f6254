"""The real CrypTen, which scripts/test installs: in this process, and as processes that talk to each other."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcinfer.interop.crypten import install_shim

ROOT = Path(__file__).parents[2]
TIMEOUT = 240.0


@pytest.fixture(scope="session")
def crypten() -> Any:
    """The package; an error that says how to install it where it is missing."""
    return install_shim()


def run_parties(tasks: str, parties: int, directory: Path) -> None:
    """Have the parties of CrypTen do tasks of party.py, joined by +; AssertionError with their words if one fails."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "party.py"), tasks, str(rank), str(parties), str(directory)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for rank in range(parties)
    ]
    try:
        said = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert all(process.returncode == 0 for process in processes), "\n".join(said)


@pytest.fixture
def use(crypten: Any, tmp_path: Path) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    """What parties of CrypTen make of shares they are given: the number itself and its ReLU, in float64."""

    def give(shares: list[torch.Tensor]) -> list[torch.Tensor]:
        for rank, share in enumerate(shares):
            torch.save(share, tmp_path / f"exported-{rank}.pt")
        run_parties("use", len(shares), tmp_path)
        results: list[torch.Tensor] = torch.load(tmp_path / "used-0.pt")
        return results

    return give
