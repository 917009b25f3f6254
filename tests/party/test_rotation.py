"""A store's key is replaced: all models load afterwards, the old key opens nothing, and a crash loses nothing."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mpcinfer.errors import ConflictError, StoreError
from mpcinfer.party.record import WeightEntry
from mpcinfer.party.store import Store
from tests.party.test_store import deploy, read_all, upload

IDS = [bytes([i]) * 16 for i in (1, 2, 3)]

CRASHING_ROTATION = """
import os, sys
from pathlib import Path
from mpcinfer.party.store import Store

done, crash_before = 0, int(sys.argv[3])

def crashing(real):
    def step(*args, **kwargs):
        global done
        if done == crash_before:
            os._exit(9)
        done += 1
        return real(*args, **kwargs)
    return step

for name in ("fsync", "rename"):
    setattr(os, name, crashing(getattr(os, name)))
Store.rotate_key(Path(sys.argv[1]), Path(sys.argv[2]))
os._exit(0)
"""


@pytest.fixture
def key_path(tmp_path: Path) -> Path:
    return tmp_path / "store.key"


@pytest.fixture
def directory(tmp_path: Path, key_path: Path) -> Path:
    """A store with three deployments, one pending, one with other shares waiting, and what else a party keeps there."""
    directory = tmp_path / "store"
    with Store.open(directory, key_path) as store:
        deploy(store, IDS[0])
        upload(store, [WeightEntry("w", (2,), 16)], b"x" * 16)
        store.commit(b"request", IDS[1], 2, pending=True)
        upload(store, [WeightEntry("w", (2,), 16)], b"x" * 16)
        store.commit(b"request", IDS[2], 3)
        store.refresh(IDS[2], "next", [b"y" * 16])
    (directory / "audit.log").write_text("a line")
    (directory / "budgets.sqlite").write_text("a count")
    return directory


def contents(directory: Path, key_path: Path) -> list[object]:
    """All that a store holds, whole."""
    with Store.open(directory, key_path) as store:
        assert not store.damaged
        assert not list((directory / "rotated").iterdir())
        return [(d, read_all(store, d.id), store.fresh(d.id)) for d in store.deployments()]


def opened_by(directory: Path, key: bytes) -> int:
    """How many files a key opens."""
    with Store(directory, key) as store:
        return len(store.deployments()) + sum(store.fresh(i) != "" for i in IDS)


def key_in(path: Path) -> bytes:
    return bytes.fromhex(path.read_text())


def test_all_models_load_under_the_new_key_and_none_under_the_old(directory: Path, key_path: Path) -> None:
    before, old = contents(directory, key_path), key_in(key_path)
    assert opened_by(directory, old) == 4
    assert Store.rotate_key(directory, key_path) == 3
    assert key_in(key_path) != old
    assert stat.S_IMODE(key_path.stat().st_mode) == 0o600
    assert contents(directory, key_path) == before
    assert opened_by(directory, old) == 0
    assert (directory / "audit.log").read_text() == "a line"
    assert (directory / "budgets.sqlite").read_text() == "a count"
    assert not list(key_path.parent.glob("*.new"))
    with Store.open(directory, key_path) as store:
        assert store.take_fresh(IDS[2]).generation == "next"
        assert [data for _, data in read_all(store, IDS[2])] == [b"y" * 16]


def test_a_crash_before_any_step_leaves_one_key_for_all_and_another_try(directory: Path, key_path: Path) -> None:
    before = contents(directory, key_path)
    states = set()
    for crash_before in range(60):
        old = key_in(key_path)
        command = [sys.executable, "-c", CRASHING_ROTATION, str(directory), str(key_path), str(crash_before)]
        code = subprocess.run(command, env=os.environ, check=False).returncode
        states.add((code, key_in(key_path) == old))
        assert contents(directory, key_path) == before
        if key_in(key_path) != old:
            assert opened_by(directory, old) == 0
        if not code:
            break
    assert states == {(9, True), (9, False), (0, False)}  # crashes on both sides of the change, then none
    assert Store.rotate_key(directory, key_path) == 3
    assert contents(directory, key_path) == before


def test_a_third_key_loses_nothing_of_a_change_that_was_cut_short(
    directory: Path, key_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(directory, key_path)
    monkeypatch.setattr(Store, "_settle_rotation", lambda store: None)  # a crash as soon as the key has changed
    Store.rotate_key(directory, key_path)
    monkeypatch.undo()
    assert len(list((directory / "rotated").iterdir())) == 4
    assert opened_by(directory, bytes(32)) == 0
    assert contents(directory, key_path) == before


def test_what_keeps_a_key_from_being_replaced(directory: Path, key_path: Path) -> None:
    before, right = contents(directory, key_path), key_path.read_text()
    with Store.open(directory, key_path), pytest.raises(ConflictError, match="in use by another process.*stop it"):
        Store.rotate_key(directory, key_path)
    key_path.write_text("00" * 32)
    with pytest.raises(StoreError, match="nothing was changed.*another store key"):
        Store.rotate_key(directory, key_path)
    key_path.unlink()
    with pytest.raises(StoreError, match="is missing: restore it"):
        Store.rotate_key(directory, key_path)
    assert not key_path.exists()
    key_path.write_text(right)
    key_path.chmod(0o600)
    assert contents(directory, key_path) == before
