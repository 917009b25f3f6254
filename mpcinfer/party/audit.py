"""A party's audit log: who has asked for what, when, and what was decided. Metadata only, in lines that are chained.

A line is with the operating system before what it is about goes on, and on the disk a moment later: a process that is
killed loses nothing. What a failing machine has left of a last line is taken away, and that is written down.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from mpcinfer.errors import MpcInferError, StoreError
from mpcinfer.party.record import sync_directory
from mpcinfer.trust.chain import Head, linked, parsed

NAME = "audit.log"
NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,128}")
_SYNC_SECONDS = 0.2
_LONGEST = 1 << 20  # bytes of a line
_DUE = 64  # lines, after which the other parties are told the head again
_log = logging.getLogger(__name__)


class Audit:
    """The log in a directory, which nobody else writes to: the store's lock is held. Thread-safe."""

    def __init__(self, directory: Path, role: str, cluster: bytes) -> None:
        """Continue the log, or begin one. StoreError if it cannot be read or its last line was changed."""
        self._path = directory / NAME
        self._lock = threading.Lock()
        self._dirty, self._ended = threading.Event(), threading.Event()
        self._told = -1
        self._unsynced = ""  # why what was written is not on the disk
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            sync_directory(directory)
        except OSError as error:
            raise StoreError(f"{self._path} cannot be opened: {error.strerror}") from error
        try:
            self.head, torn = self._last()
            if self.head == Head():
                begin = {"party": role, "cluster": cluster.hex(), "nonce": secrets.token_hex(16)}
                self.write("begin", **begin)
            if torn:
                _log.warning("%s ended in the middle of a line, which was removed", self._path)
                self.write("repair", bytes=len(torn), digest=hashlib.sha256(torn).hexdigest())
        except BaseException:
            os.close(self._file)
            raise
        self._sync = threading.Thread(target=self._keep_synced, name="audit-sync", daemon=True)
        self._sync.start()

    def write(self, action: str, **facts: Any) -> Head:
        """Add a line; StoreError, and nothing is added, if that is not possible. `facts` are plain data, no secrets."""
        with self._lock:
            line, head = linked(self.head, {"time": round(time.time(), 3), "action": action, **facts})
            if self._ended.is_set():
                raise StoreError(f"{self._path} is closed: this party is stopping")
            if self._unsynced:
                raise StoreError(
                    f"{self._path} cannot be brought to the disk, {self._unsynced}: nothing is done that cannot be "
                    "written down; look after the disk, then restart this party"
                )
            size = os.fstat(self._file).st_size
            try:
                if os.write(self._file, line) != len(line):
                    raise OSError(0, "no space left")
            except OSError as error:
                os.ftruncate(self._file, size)
                raise StoreError(
                    f"{self._path} cannot be written, {error.strerror}: nothing is done that cannot be written down; "
                    "free space, then try again"
                ) from error
            self.head = head
        self._dirty.set()
        return head

    def refused(self, action: str, who: str, request: Any, error: Exception) -> None:
        """Somebody was not given what was asked for: what kind of error, nothing of what it says."""
        kind = type(error).__name__ if isinstance(error, MpcInferError) else "failure"
        name = str(getattr(request, "model", "") or getattr(request, "name", ""))
        facts = {"model": name} if NAMES.fullmatch(name) else {}
        id_ = bytes(getattr(request, "request_id", b""))
        with suppress(StoreError):  # it is refused in any case
            self.write(action, outcome=kind, who=who, request=id_[:16].hex(), **facts)

    @property
    def due(self) -> bool:
        """Whether the other parties should be told the head."""
        return self.head.sequence - self._told >= _DUE

    def met(self, action: str, heads: dict[str, Head], **facts: Any) -> None:
        """The parties have told each other the heads of their logs."""
        head = self.write(action, heads={role: each.to_json() for role, each in heads.items()}, **facts)
        self._told = head.sequence

    def close(self) -> None:
        """Write no more; what is written is on the disk."""
        with self._lock:
            if self._ended.is_set():
                return
            self._ended.set()
        self._dirty.set()
        self._sync.join()
        os.fsync(self._file)
        os.close(self._file)

    def _last(self) -> tuple[Head, bytes]:
        """The last line, and what is left of one that was not completed, which is removed."""
        size = os.fstat(self._file).st_size
        start = max(0, size - _LONGEST)
        tail = os.pread(self._file, size - start, start)
        complete, newline, torn = tail.rpartition(b"\n")
        if torn:
            os.ftruncate(self._file, size - len(torn))
        if not newline:
            return Head(), torn
        try:
            content = parsed(complete.rpartition(b"\n")[2] + newline)
            return Head(content["sequence"], content["hash"]), torn
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StoreError(
                f"the last line of {self._path} is damaged or was changed: `mpcinfer audit verify` says more. Keep the "
                "file, move it elsewhere, and start again: a new log begins"
            ) from error

    def _keep_synced(self) -> None:
        while not self._ended.is_set():
            self._dirty.wait()
            self._dirty.clear()
            try:
                os.fsync(self._file)
            except OSError as error:  # trying again says nothing: it may succeed without what was lost
                _log.error("%s cannot be brought to the disk: %s", self._path, error.strerror)
                self._unsynced = error.strerror or "unknown"
                return
            self._ended.wait(_SYNC_SECONDS)
