"""What each client has used of each model: counted by minutes, on disk before anything is answered.

Counts belong to an owner's name for a model and to a client, not to a version: a model that is deployed anew, or a
grant that is replaced, takes nothing back. What was counted in the future (the clock was set back) still counts.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mpcinfer.errors import StoreError

_KEPT_MINUTES = 2 * 366 * 24 * 60  # longer than any period
_SCHEMA = """
CREATE TABLE IF NOT EXISTS used (
    owner TEXT, name TEXT, client TEXT, minute INTEGER, queries INTEGER NOT NULL, tokens INTEGER NOT NULL,
    PRIMARY KEY (owner, name, client, minute)
) WITHOUT ROWID
"""


@dataclass(frozen=True)
class Account:
    """Whose use of what is counted together."""

    owner: str
    name: str
    client: str


class Ledger:
    """One party's counts, in one file. Safe to use from several threads; one process at a time (the store's lock)."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it; StoreError if it cannot be used."""
        self._path = path
        self._lock = threading.Lock()
        with self._usable():
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._base = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._base.execute("PRAGMA journal_mode = WAL")
            self._base.execute("PRAGMA synchronous = FULL")  # a commit is on the disk when it returns
            self._base.execute(_SCHEMA)
            if self._base.execute("PRAGMA quick_check").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("damaged")

    def used(self, account: Account, since: int) -> tuple[int, int]:
        """Queries and tokens from a minute on (counted from 1970)."""
        with self._usable():
            return self._used(account, since)

    def add(self, account: Account, minute: int, queries: int, tokens: int) -> None:
        """Count, or with negative numbers take back; on the disk once this returns."""
        with self._usable():
            row = (account.owner, account.name, account.client)
            self._base.execute("BEGIN IMMEDIATE")
            try:
                self._base.execute(
                    "INSERT INTO used VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE "
                    "SET queries = queries + excluded.queries, tokens = tokens + excluded.tokens",
                    (*row, minute, queries, tokens),
                )
                self._base.execute(
                    "DELETE FROM used WHERE owner = ? AND name = ? AND client = ? AND minute < ?",
                    (*row, minute - _KEPT_MINUTES),
                )
                self._base.execute("COMMIT")
            except BaseException:
                self._base.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._base.close()

    def _used(self, account: Account, since: int) -> tuple[int, int]:
        found = self._base.execute(
            "SELECT COALESCE(SUM(queries), 0), COALESCE(SUM(tokens), 0) FROM used "
            "WHERE owner = ? AND name = ? AND client = ? AND minute >= ?",
            (account.owner, account.name, account.client, since),
        ).fetchone()
        return int(found[0]), int(found[1])

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(
                f"the budgets in {self._path} cannot be read or written ({type(error).__name__}): repair the disk or "
                "restore the file; without it this party would begin to count anew"
            ) from error
