"""docs/migrate-from-crypten.md: its programs run as they stand there, and what it says can be called exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcinfer.interop import crypten as interop
from tests.e2e.clusters import local_cluster

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "migrate-from-crypten.md").read_text()
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def run(program: str, directory: Path) -> str:
    """What a program of the page prints."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_model_of_the_page_deploys_and_answers(crypten: Any, tmp_path: Path) -> None:
    with local_cluster(tmp_path / "cluster", 2):
        said = run(PROGRAMS[0], tmp_path)
    found = re.fullmatch(r"largest error (\S+)\n", said)
    assert found and 0 < float(found[1]) < 0.001, said


def test_the_shares_of_the_page_move(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save(torch.tensor([rank, -5]), tmp_path / f"share-{rank}.pt")
    assert run(PROGRAMS[1], tmp_path) == f"[{', '.join(['Shared(shape=(2,), frac_bits=16)'] * 3)}]\n"


def test_there_is_no_other_program_and_everything_public_is_named() -> None:
    assert len(PROGRAMS) == 2
    assert all(re.search(rf"`[^`]*\b{name}\(", PAGE) for name in interop.__all__)


def test_calls_of_crypten_that_the_page_names_exist(crypten: Any) -> None:
    names = set(re.findall(r"\bcrypten(?:\.\w+)+", PAGE))
    assert len(names) > 8
    for name in names:
        thing = crypten
        for part in name.split(".")[1:]:
            thing = getattr(thing, part)
