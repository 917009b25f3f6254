"""Counts that survive what happens to processes and disks."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mpcinfer.errors import StoreError
from mpcinfer.party.ledger import Account, Ledger

BOB = Account("owner/alice", "m", "client/bob")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "budgets.sqlite"


def test_counts_by_minute_client_name_and_owner(path: Path) -> None:
    ledger = Ledger(path)
    for account in (BOB, Account("owner/eve", "m", "client/bob"), Account("owner/alice", "n", "client/bob")):
        ledger.add(account, 10, 1, 5)
    ledger.add(BOB, 10, 2, 0)
    ledger.add(BOB, 12, 1, 7)
    assert [ledger.used(BOB, since) for since in (0, 10, 11, 12, 13)] == [(4, 12), (4, 12), (1, 7), (1, 7), (0, 0)]
    ledger.add(BOB, 12, -1, -7)
    assert ledger.used(BOB, 11) == (0, 0) and ledger.used(Account("owner/eve", "m", "client/bob"), 0) == (1, 5)
    ledger.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_was_counted_outlives_a_process_that_is_killed(path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from mpcinfer.party.ledger import *; "
        "Ledger(Path(sys.argv[1])).add(Account('owner/alice', 'm', 'client/bob'), 10, 3, 0); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False, env={**os.environ})
    assert done.returncode == 9 and Ledger(path).used(BOB, 0) == (3, 0)


def test_several_threads(path: Path) -> None:
    ledger = Ledger(path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: ledger.add(BOB, 1, 1, 2), range(40)))
    assert ledger.used(BOB, 0) == (40, 80)
    ledger.close()


def test_old_counts_are_dropped(path: Path) -> None:
    ledger = Ledger(path)
    ledger.add(BOB, 10, 1, 0)
    ledger.add(BOB, 10 + 3 * 366 * 24 * 60, 1, 0)
    assert ledger.used(BOB, 0) == (1, 0)
    ledger.close()


def test_a_file_that_cannot_be_used_is_an_error_and_not_a_new_beginning(path: Path) -> None:
    Ledger(path).close()
    path.write_bytes(b"x" * 4096)
    with pytest.raises(StoreError, match="cannot be read or written"):
        Ledger(path)
    with pytest.raises(StoreError):
        Ledger(path.parent)  # a directory
    ledger = Ledger(path.with_name("other.sqlite"))
    ledger.close()
    with pytest.raises(StoreError):
        ledger.add(BOB, 1, 1, 0)
