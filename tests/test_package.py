"""The package's front door: what it offers, and that looking at it loads nothing heavy."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mpcinfer
from mpcinfer import errors

NAMES = {"AsyncClient", "Audit", "Budget", "Client", "Deployed", "ModelOwner", "Terms"}


def test_what_it_offers() -> None:
    classes = {n for n, x in vars(errors).items() if inspect.isclass(x) and issubclass(x, errors.MpcInferError)}
    assert set(mpcinfer.__all__) == NAMES | classes
    assert list(mpcinfer.__all__) == sorted(mpcinfer.__all__)
    assert all(inspect.isclass(getattr(mpcinfer, name)) for name in mpcinfer.__all__)
    assert set(mpcinfer.__all__) <= set(dir(mpcinfer))
    assert mpcinfer.ShapeError is errors.ShapeError


def test_type_checkers_see_the_same() -> None:
    stub = Path(mpcinfer.__file__).with_suffix(".pyi").read_text()
    assert set(re.findall(r"import (\w+) as \1\n", stub)) == set(mpcinfer.__all__)


def test_what_it_does_not_offer() -> None:
    with pytest.raises(AttributeError, match="no attribute 'client_'"):
        mpcinfer.client_  # noqa: B018


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("mpcinfer", ["torch", "numpy", "grpc", "cryptography", "mpcinfer.client"]),
        ("mpcinfer.cli", ["torch", "numpy", "grpc", "mpcinfer.client", "mpcinfer.party"]),
    ],
)
def test_importing_it_loads_nothing_heavy(module: str, unwanted: list[str]) -> None:
    program = f"import {module}, sys; print([name for name in {unwanted} if name in sys.modules])"
    root = Path(mpcinfer.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_party_does_not_load_the_client() -> None:
    program = "import mpcinfer.party.server, sys; print([n for n in sys.modules if n.startswith('mpcinfer.client')])"
    root = Path(mpcinfer.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
