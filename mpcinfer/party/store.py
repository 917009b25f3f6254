"""The encrypted store: one party's shares of the deployed models, at rest.

    <store>/lock                                   held while a process uses the store
    <store>/staging/<request id hex>.part          an upload in progress; removed on failure and at start
    <store>/deployments/<deployment id hex>.new    committed here; whether everywhere is not known yet
    <store>/deployments/<deployment id hex>.mpc    committed by all parties
    <store>/deployments/<deployment id hex>.fresh  other shares of it, until all parties have theirs (see `refresh`)
    <store>/rotated/                               the same files under the next key, while the key is changed

One file is one deployment (see `record`), and a rename makes it visible, so a crash at any point leaves all of it or
nothing. What encryption does not detect is an old copy of a removed deployment that is put back under its own name.
The parties' agreement on deployment ids at start finds that.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from mpcinfer.errors import ConflictError, InputError, NotFoundError, StoreError
from mpcinfer.party.keyfile import KEY_SIZE, load_key, refuse_open_mode, replace_key, stage_key
from mpcinfer.party.record import (
    DamagedError,
    Deployment,
    Reader,
    Staged,
    WeightEntry,
    reading,
    sealed_under,
    sync_directory,
    writing,
)

_KINDS = ("mpc", "new", "fresh")


class Store:
    """One party's deployments, encrypted under `key` (32 bytes). Safe to use from several threads of one process.

    `damaged` maps deployment ids (hex; else the file's stem) to what is wrong with their files, found at opening.
    """

    def __init__(self, directory: Path, key: bytes, *, lock: int | None = None) -> None:
        """Lock `directory` (made if missing), wipe its staging area, authenticate every byte of what is committed.

        ConflictError if another store object or process holds it, StoreError if it is open to other users or `key`
        has the wrong size. `lock` is the descriptor of a lock already held, which the store then owns.
        """
        self._lock_file: int | None = _lock(directory) if lock is None else lock
        try:
            if len(key) != KEY_SIZE:
                raise StoreError(f"the key of store {directory} has {len(key)} bytes instead of {KEY_SIZE}")
            self.directory = directory
            self.damaged: dict[str, StoreError] = {}
            self._key = key
            self._mutex = threading.Lock()
            self._staged: dict[bytes, Staged] = {}
            self._deployments: dict[bytes, Deployment] = {}
            self._fresh: dict[bytes, Deployment] = {}
            for leftover in (directory / "staging").glob("*.part"):
                with writing(leftover):
                    leftover.unlink()
            self._settle_rotation()
            self._list()
        except BaseException:
            self._unlock()
            raise

    @classmethod
    def open(cls, directory: Path, key_path: Path) -> Store:
        """The store under the key in the file `key_path`: 64 hex digits, mode 0600.

        The file is made if it is missing and nothing is committed yet. StoreError if it is missing and the store is
        not empty, if it holds no key, or if group or others may read it.
        """
        lock = _lock(directory)
        try:
            key = load_key(key_path, new=not any((directory / "deployments").iterdir()))
        except BaseException:
            os.close(lock)
            raise
        return cls(directory, key, lock=lock)

    @classmethod
    def rotate_key(cls, directory: Path, key_path: Path) -> int:
        """Put everything under a fresh key, which replaces the one in the file `key_path`: how many deployments.

        A crash leaves the old key with the old files, or the new key with files that the next opening puts in their
        place. The errors are those of `open`, and StoreError, before anything is changed, for a damaged file.
        """
        key_path = key_path.resolve()  # a link stays one
        if not key_path.exists():
            raise StoreError(f"store key {key_path} is missing: restore it; a store cannot be re-encrypted without")
        with cls.open(directory, key_path) as store:
            if store.damaged:
                raise StoreError(f"nothing was changed: {next(iter(store.damaged.values()))}")
            key = stage_key(key_path)
            for deployment in store._deployments.values():
                store._rotate(deployment, store._path(deployment.id, _kind(deployment)), key)
            for deployment in store._fresh.values():
                store._rotate(deployment, store._path(deployment.id, "fresh"), key)
            replace_key(key_path)  # from here on the new files hold
            store._key = key
            store._settle_rotation()
            return len(store._deployments)

    def stage(self, request_id: bytes, metadata: Mapping[str, Any], weights: Sequence[WeightEntry]) -> Staged:
        """Start an upload. `metadata` is JSON; the bytes to write are those of the weights without a seed, in order."""
        path, record = self._part(_hex(request_id, "request")), _record(metadata, weights)
        with self._mutex:
            if self._lock_file is None:
                raise ConflictError(f"store {self.directory} is closed")
            if request_id in self._staged:
                raise ConflictError(f"an upload with request id {request_id.hex()} is in progress: draw a new id")
            # Without the mutex, which a thread that holds an upload's own lock must never wait for.
            staged = Staged(path, self._key, record, forget=lambda: self._staged.pop(request_id, None))
            self._staged[request_id] = staged
            return staged

    def commit(self, request_id: bytes, deployment_id: bytes, version: int, *, pending: bool = False) -> Deployment:
        """Make a finished upload a deployment, for good once this returns; any error but InputError discards it.

        A `pending` one waits for `confirm` or `remove`, also across a restart.
        """
        target = self._path(deployment_id, "new" if pending else "mpc")
        if not 1 <= version < 1 << 32:
            raise InputError(f"version {version} is not between 1 and 2^32 - 1")
        with self._mutex:
            staged = self._staged.get(request_id)
            if staged is None:
                raise NotFoundError(f"no upload with request id {request_id.hex()}: deploy again")
            if deployment_id in self._deployments:
                staged.discard()
                raise ConflictError(f"deployment {deployment_id.hex()} exists already: deploy again under a new id")
            deployment = replace(staged.commit(target, deployment_id, version), pending=pending)
            self._deployments[deployment_id] = deployment
            return deployment

    def confirm(self, deployment_id: bytes) -> Deployment:
        """All parties have committed a pending deployment: it is no longer pending. NotFoundError if there is none."""
        with self._mutex:
            if (deployment := self._deployments.get(deployment_id)) is None:
                raise NotFoundError(f"no deployment {deployment_id.hex()} in this party's store")
            if deployment.pending:
                path = self._path(deployment_id)
                with writing(path):
                    self._path(deployment_id, "new").rename(path)
                    sync_directory(path.parent)
                self._deployments[deployment_id] = deployment = replace(deployment, pending=False)
            return deployment

    def deployments(self) -> list[Deployment]:
        """All committed deployments whose files were whole when the store was opened, by name and version."""
        with self._mutex:
            return sorted(self._deployments.values(), key=lambda d: (str(d.metadata.get("name")), d.version, d.id))

    def weights(self, deployment_id: bytes) -> Iterator[tuple[WeightEntry, bytearray | None]]:
        """Each weight with its share's bytes (int64 little-endian), None where a seed stands for it.

        The whole file is authenticated before the first weight is handed out, so StoreError (and NotFoundError) come
        from the first step of the iteration.
        """
        with self._mutex:
            if (known := self.damaged.get(_hex(deployment_id, "deployment"))) is not None:
                raise StoreError(str(known))
            if (deployment := self._deployments.get(deployment_id)) is None:
                raise NotFoundError(f"no deployment {deployment_id.hex()} in this party's store")
        path = self._path(deployment_id, _kind(deployment))
        with reading(path), open(path, "rb") as file:
            Reader(file, self._key, deployment_id).verify()
            reader = Reader(file, self._key, deployment_id)
            for entry in reader.weights:
                yield entry, None if entry.seed is not None else reader.read(entry.size)

    def fresh(self, deployment_id: bytes) -> str:
        """The generation of the shares that wait to replace those of a deployment; empty if none do."""
        with self._mutex:
            waiting = self._fresh.get(deployment_id)
        return waiting.generation if waiting is not None else ""

    def refresh(self, deployment_id: bytes, generation: str, shares: Iterable[bytes]) -> bytes:
        """Put another share of each weight on the disk; the old ones hold until `take_fresh`, also across a restart.

        The SHA-256 of the new ones.
        """
        self.drop_fresh(deployment_id)
        with self._mutex:
            current = self._deployments[deployment_id]
        metadata, weights = (
            {**current.metadata, "generation": generation},
            [replace(w, seed=None) for w in current.weights],
        )
        fresh = replace(current, metadata=metadata, weights=tuple(weights))
        digest = self._write(fresh, shares, self._path(deployment_id, "fresh"), self._key)
        with self._mutex:
            self._fresh[deployment_id] = fresh
        return digest

    def take_fresh(self, deployment_id: bytes) -> Deployment:
        """All parties have other shares on the disk: they replace the old ones, whose file is gone."""
        with self._mutex:
            path = self._path(deployment_id)
            with writing(path):
                self._path(deployment_id, "fresh").rename(path)
                sync_directory(path.parent)
            self._deployments[deployment_id] = self._fresh.pop(deployment_id)
            return self._deployments[deployment_id]

    def drop_fresh(self, deployment_id: bytes) -> None:
        """Not all parties have other shares: the old ones stay. Fine if there are no others."""
        path = self._path(deployment_id, "fresh")
        with self._mutex, writing(path):
            path.unlink(missing_ok=True)
            self._fresh.pop(deployment_id, None)

    def _rotate(self, deployment: Deployment, path: Path, key: bytes) -> None:
        """Write a deployment under the next key beside the file that holds."""
        with reading(path), open(path, "rb") as file:
            reader = Reader(file, self._key, deployment.id)
            self._write(deployment, reader.pieces(), self._rotated / path.name, key)

    def _write(self, deployment: Deployment, pieces: Iterable[bytes | bytearray], target: Path, key: bytes) -> bytes:
        """A deployment's file, whole and on the disk, with these bytes, whose SHA-256 it is, for what has no seed."""
        part = self._part(secrets.token_hex(16))
        staged = Staged(part, key, _record(deployment.metadata, deployment.weights), forget=lambda: None)
        size, digest = 0, hashlib.sha256()
        try:
            for piece in pieces:
                staged.write(piece)
                size += len(piece)
                digest.update(piece)
            staged.finish(size, digest.digest())
            staged.commit(target, deployment.id, deployment.version)
            return digest.digest()
        finally:
            staged.discard()

    def _settle_rotation(self) -> None:
        """Finish or undo a change of the key: of two files of a deployment that one holds which is under this key."""
        committed = self.directory / "deployments"
        for path in sorted(self._rotated.iterdir()):
            if sealed_under(path, self._key):
                with writing(path):
                    path.rename(committed / path.name)
        # under a key that is none of the two, nothing may be lost
        if (left := list(self._rotated.iterdir())) and all(sealed_under(p, self._key) for p in committed.iterdir()):
            for path in left:
                with writing(path):
                    path.unlink()
        with writing(self.directory):
            for changed in (committed, self._rotated):
                sync_directory(changed)

    @property
    def _rotated(self) -> Path:
        return self.directory / "rotated"

    def _part(self, name: str) -> Path:
        return self.directory / "staging" / f"{name}.part"

    def remove(self, deployment_id: bytes) -> None:
        """Delete a deployment, damaged or not; NotFoundError if there is none."""
        paths = [self._path(deployment_id, kind) for kind in _KINDS]
        with self._mutex:
            with writing(paths[0]):
                exists = any(path.exists() for path in paths)
                for path in paths:
                    path.unlink(missing_ok=True)
                sync_directory(paths[0].parent)
            self._fresh.pop(deployment_id, None)
            listed = self._deployments.pop(deployment_id, None) or self.damaged.pop(deployment_id.hex(), None)
        if not exists and not listed:
            raise NotFoundError(f"no deployment {deployment_id.hex()} in this party's store")

    def close(self) -> None:
        """Discard the uploads in progress and let go of the lock."""
        with self._mutex:
            for staged in list(self._staged.values()):
                staged.discard()
            self._unlock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _path(self, deployment_id: bytes, kind: str = "mpc") -> Path:
        return self.directory / "deployments" / f"{_hex(deployment_id, 'deployment')}.{kind}"

    def _list(self) -> None:
        files = self.directory / "deployments"
        for path in sorted(path for kind in _KINDS for path in files.glob(f"*.{kind}")):
            fresh = path.suffix == ".fresh"
            try:
                with reading(path), open(path, "rb") as file:
                    deployment_id = bytes.fromhex(path.stem)
                    if deployment_id.hex() != path.stem:
                        raise DamagedError("its name is not in lower case")
                    reader = Reader(file, self._key, deployment_id)
                    reader.verify()
                (self._fresh if fresh else self._deployments)[deployment_id] = Deployment(
                    deployment_id, reader.version, reader.metadata, reader.weights, pending=path.suffix == ".new"
                )
            except StoreError as error:
                if not fresh:  # the shares that hold may be whole; that these are missed shows if they are needed
                    self.damaged[path.stem] = error

    def _unlock(self) -> None:
        lock, self._lock_file = self._lock_file, None
        if lock is not None:
            os.close(lock)


def _kind(deployment: Deployment) -> str:
    return "new" if deployment.pending else "mpc"


def _record(metadata: Mapping[str, Any], weights: Sequence[WeightEntry]) -> bytes:
    manifest = [(e.name, e.shape, e.frac_bits, e.seed and e.seed.hex()) for e in weights]
    return json.dumps({"metadata": dict(metadata), "weights": manifest}, allow_nan=False).encode()


def _hex(identifier: bytes, what: str) -> str:
    if not 1 <= len(identifier) <= 64:  # it becomes a file name
        raise InputError(f"a {what} id has 1 to 64 bytes, not {len(identifier)}")
    return identifier.hex()


def _lock(directory: Path) -> int:
    """Make the store's directories and lock them; the lock goes with the process, however it ends."""
    with writing(directory):
        for path in (directory, *(directory / name for name in ("staging", "deployments", "rotated"))):
            if not path.exists():
                path.mkdir(mode=0o700, parents=True)
                sync_directory(path.parent)
            refuse_open_mode(path, path.stat().st_mode, "700")
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
        except BlockingIOError as error:
            holder = os.pread(lock, 20, 0).decode("ascii", "replace") or "unknown"
            os.close(lock)
            raise ConflictError(
                f"store {directory} is in use by another process (pid {holder}): stop it, or use another store"
            ) from error
        except BaseException:
            os.close(lock)
            raise
    return lock
