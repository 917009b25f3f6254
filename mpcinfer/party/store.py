"""The encrypted store: one party's shares of the deployed models, at rest.

    <store>/lock                                   held while a process uses the store
    <store>/staging/<request id hex>.part          an upload in progress; removed on failure and at start
    <store>/deployments/<deployment id hex>.mpc    a committed deployment

One file is one deployment, and a rename makes it visible, so a crash at any point leaves all of it or nothing:

    header   magic, format version, key id, 16 random bytes of salt
    seal     AES-GCM of the version, zero until commit; its associated data hold the deployment id (the file's name)
    chunks   AES-256-GCM of 1 MiB of plaintext each: length of the JSON, JSON, weights (int64 little-endian)

The construction is STREAM: the key belongs to one file (HKDF of the store's key and the salt), the nonce is the
chunk's number and whether it is the last one, and the header is associated data of everything. So a flipped bit, a
missing, added or moved chunk and a file under another's name are all detected. What is not: an old copy of a removed
deployment that is put back under its own name. The parties' agreement on deployment ids at start finds that.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import secrets
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from mpcinfer.errors import ConflictError, InputError, NotFoundError, StoreError, UploadError

KEY_SIZE = 32
CHUNK = 1 << 20
TAG = 16
FORMAT = 1
MAGIC = b"mpcstore"
HEADER = struct.Struct(">8sH8s16s")  # magic, format version, key id, salt
VERSION = struct.Struct(">I")  # the seal's plaintext: the deployment's version
LENGTH = struct.Struct(">Q")  # of the JSON that starts the plaintext
SEAL_SIZE = VERSION.size + TAG

# The last byte of a nonce. The other eleven count the chunks; the key is the file's own, so no nonce occurs twice.
_MORE, _LAST, _SEAL = 0, 1, 2


@dataclass(frozen=True)
class WeightEntry:
    """One weight's share: `seed` if it is expanded from one, otherwise 8 bytes per element in the record."""

    name: str
    shape: tuple[int, ...]
    frac_bits: int
    seed: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if any(extent < 0 for extent in self.shape):
            raise UploadError(f"weight {self.name!r} has a negative extent in its shape {self.shape}")
        if self.seed == b"":
            raise UploadError(f"weight {self.name!r} has an empty seed; give None where the share itself is sent")

    @property
    def size(self) -> int:
        """Bytes that this weight takes in the record: 0 where a seed stands for it."""
        return 0 if self.seed is not None else 8 * math.prod(self.shape)


@dataclass(frozen=True)
class Deployment:
    """A committed deployment: `metadata` as given to `Store.stage`, after a round trip through JSON."""

    id: bytes
    version: int
    metadata: dict[str, Any] = field(repr=False)
    weights: tuple[WeightEntry, ...]


class Staged:
    """An upload in progress: `write` its bytes, `finish`, then `Store.commit` or `discard`. Any failure discards it."""

    def __init__(self, path: Path, key: bytes, record: bytes, forget: Callable[[], object]) -> None:
        """Create the file at `path` and write the head and `record` (JSON); `forget` is called once it is gone."""
        self.metadata, self.weights = _parse(record)
        self._path = path
        self._forget = forget
        self._expected = sum(entry.size for entry in self.weights)
        self._received = 0
        self._digest = hashlib.sha256()
        self._buffer = bytearray()
        self._chunks = 0
        self._complete = False
        self._lock = threading.RLock()  # a watchdog may discard while a handler writes
        salt = secrets.token_bytes(16)
        self._header = HEADER.pack(MAGIC, FORMAT, _key_id(key), salt)
        self._cipher = _cipher(key, salt)
        with _writing(path):
            self._file: BinaryIO | None = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "w+b")
        with self._guard() as file:
            file.write(self._header + bytes(SEAL_SIZE))
            self._append(file, LENGTH.pack(len(record)) + record)

    def write(self, chunk: bytes) -> None:
        """Append bytes of the weights' shares; UploadError if there are more than the manifest announces."""
        with self._guard() as file:
            if self._complete:
                raise ConflictError("bytes arrived after the upload was finished: deploy again")
            self._received += len(chunk)
            if self._received > self._expected:
                raise UploadError(f"upload is longer than the {self._expected} bytes of its weights: deploy again")
            self._digest.update(chunk)
            self._append(file, chunk)

    def finish(self, expected_size: int, expected_sha256: bytes) -> None:
        """Put the upload on the disk for good; UploadError if size or digest differ or don't fit the weights."""
        with self._guard() as file:
            if self._complete:
                raise ConflictError("the upload was finished before: commit or discard it")
            if expected_size != self._expected:
                raise UploadError(
                    f"upload announces {expected_size} bytes, but its weights take {self._expected}: deploy again"
                )
            if self._received != expected_size:
                raise UploadError(f"upload truncated: {self._received} of {expected_size} bytes arrived: deploy again")
            if self._digest.digest() != expected_sha256:
                raise UploadError("upload corrupted: its SHA-256 is not the one in its header: deploy again")
            self._seal_chunk(file, bytes(self._buffer), _LAST)
            self._buffer.clear()
            file.flush()
            os.fsync(file.fileno())  # a full disk shows here, before this party promises to commit
            self._complete = True

    def discard(self) -> None:
        """Delete the file; does nothing after `Store.commit` or a second time."""
        with self._lock:
            if self._file is not None:
                try:
                    with _writing(self._path):
                        self._path.unlink(missing_ok=True)
                finally:
                    self._close()

    def _commit(self, target: Path, deployment_id: bytes, version: int) -> Deployment:
        with self._guard() as file:
            if not self._complete:
                raise UploadError("upload is not finished: deploy again")
            if target.exists():
                raise ConflictError(f"deployment {deployment_id.hex()} exists already: deploy again under a new id")
            seal = self._cipher.encrypt(_nonce(0, _SEAL), VERSION.pack(version), self._header + deployment_id)
            os.pwrite(file.fileno(), seal, HEADER.size)
            os.fsync(file.fileno())
            os.rename(self._path, target)
            try:
                _sync_directory(target.parent)
            except BaseException:
                target.unlink()  # the caller is told that it failed, so it must not come back at the next start
                raise
            self._close()
            return Deployment(deployment_id, version, self.metadata, self.weights)

    def _append(self, file: BinaryIO, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) > CHUNK:  # not >=: a full chunk may be the last one
            self._seal_chunk(file, bytes(self._buffer[:CHUNK]), _MORE)
            del self._buffer[:CHUNK]

    def _seal_chunk(self, file: BinaryIO, chunk: bytes, flag: int) -> None:
        file.write(self._cipher.encrypt(_nonce(self._chunks, flag), chunk, self._header))
        self._chunks += 1

    def _close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # what was still buffered belongs to a file that is gone
                self._file.close()
        self._file = None
        self._buffer.clear()
        self._forget()

    @contextmanager
    def _guard(self) -> Iterator[BinaryIO]:
        with self._lock:
            if self._file is None:
                raise ConflictError("this upload was committed or discarded: deploy again")
            try:
                with _writing(self._path):
                    yield self._file
            except BaseException:
                self.discard()
                raise


class _DamagedError(Exception):
    """Why a file cannot be used, in words without secrets."""


class _Reader:
    """Decrypts one committed file from front to back. Use inside `_reading`, which names the file in the errors."""

    def __init__(self, file: BinaryIO, key: bytes, deployment_id: bytes) -> None:
        file.seek(0)
        self._file = file
        self._header = _exactly(file, HEADER.size)
        magic, format_version, key_id, salt = HEADER.unpack(self._header)
        if magic != MAGIC:
            raise _DamagedError("it is not a store file")
        if format_version != FORMAT:
            raise _DamagedError(f"it has format {format_version}, this version of mpcinfer reads {FORMAT}")
        if key_id != _key_id(key):
            raise _DamagedError("or was written under another store key (then restore that key and restart)")
        self._cipher = _cipher(key, salt)
        seal = _exactly(file, SEAL_SIZE)
        self.version: int
        (self.version,) = VERSION.unpack(self._cipher.decrypt(_nonce(0, _SEAL), seal, self._header + deployment_id))
        body = os.fstat(file.fileno()).st_size - HEADER.size - SEAL_SIZE
        self._count = -(-body // (CHUNK + TAG))
        self._left = body - TAG * self._count  # plaintext bytes not yet read
        self._tail = body - (self._count - 1) * (CHUNK + TAG)  # bytes of the last chunk, with its tag
        self._index = 0
        self._chunk = memoryview(b"")
        (length,) = LENGTH.unpack(self.read(LENGTH.size))
        self.metadata, self.weights = _parse(self.read(length))

    def read(self, size: int) -> bytearray:
        """The next `size` bytes of the plaintext."""
        if size > self._left:
            raise _DamagedError("it is truncated")
        data = bytearray(size)
        target = memoryview(data)
        while target:
            if not self._chunk:
                self._next_chunk()
            count = min(len(target), len(self._chunk))
            target[:count] = self._chunk[:count]
            target, self._chunk = target[count:], self._chunk[count:]
        self._left -= size
        return data

    def verify(self) -> None:
        """Authenticate all chunks that were not read yet; nothing can be read afterwards."""
        while self._index < self._count:
            self._next_chunk()

    def _next_chunk(self) -> None:
        last = self._index == self._count - 1
        sealed = _exactly(self._file, self._tail if last else CHUNK + TAG)
        nonce = _nonce(self._index, _LAST if last else _MORE)
        self._chunk = memoryview(self._cipher.decrypt(nonce, sealed, self._header))
        self._index += 1


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
            for leftover in (directory / "staging").glob("*.part"):
                with _writing(leftover):
                    leftover.unlink()
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
            key = _load_key(key_path, directory)
        except BaseException:
            os.close(lock)
            raise
        return cls(directory, key, lock=lock)

    def stage(self, request_id: bytes, metadata: Mapping[str, Any], weights: Sequence[WeightEntry]) -> Staged:
        """Start an upload. `metadata` is JSON; the bytes to write are those of the weights without a seed, in order."""
        path = self.directory / "staging" / f"{_hex(request_id, 'request')}.part"
        manifest = [(e.name, e.shape, e.frac_bits, e.seed and e.seed.hex()) for e in weights]
        record = json.dumps({"metadata": dict(metadata), "weights": manifest}, allow_nan=False).encode()
        with self._mutex:
            if self._lock_file is None:
                raise ConflictError(f"store {self.directory} is closed")
            if request_id in self._staged:
                raise ConflictError(f"an upload with request id {request_id.hex()} is in progress: draw a new id")
            # Without the mutex, which a thread that holds an upload's own lock must never wait for.
            staged = Staged(path, self._key, record, forget=lambda: self._staged.pop(request_id, None))
            self._staged[request_id] = staged
            return staged

    def commit(self, request_id: bytes, deployment_id: bytes, version: int) -> Deployment:
        """Make a finished upload a deployment, for good once this returns; any error but InputError discards it."""
        target = self._path(deployment_id)
        if not 1 <= version < 1 << 32:
            raise InputError(f"version {version} is not between 1 and 2^32 - 1")
        with self._mutex:
            staged = self._staged.get(request_id)
            if staged is None:
                raise NotFoundError(f"no upload with request id {request_id.hex()}: deploy again")
            deployment = staged._commit(target, deployment_id, version)
            self._deployments[deployment_id] = deployment
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
        path = self._path(deployment_id)
        with self._mutex:
            if (known := self.damaged.get(deployment_id.hex())) is not None:
                raise StoreError(str(known))
            if deployment_id not in self._deployments:
                raise NotFoundError(f"no deployment {deployment_id.hex()} in this party's store")
        with _reading(path), open(path, "rb") as file:
            _Reader(file, self._key, deployment_id).verify()
            reader = _Reader(file, self._key, deployment_id)
            for entry in reader.weights:
                yield entry, None if entry.seed is not None else reader.read(entry.size)

    def remove(self, deployment_id: bytes) -> None:
        """Delete a deployment, damaged or not; NotFoundError if there is none."""
        path = self._path(deployment_id)
        with self._mutex:
            with _writing(path):
                exists = path.exists()
                path.unlink(missing_ok=True)
                _sync_directory(path.parent)
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

    def _path(self, deployment_id: bytes) -> Path:
        return self.directory / "deployments" / f"{_hex(deployment_id, 'deployment')}.mpc"

    def _list(self) -> None:
        for path in sorted((self.directory / "deployments").glob("*.mpc")):
            try:
                with _reading(path), open(path, "rb") as file:
                    deployment_id = bytes.fromhex(path.stem)
                    if deployment_id.hex() != path.stem:
                        raise _DamagedError("its name is not in lower case")
                    reader = _Reader(file, self._key, deployment_id)
                    reader.verify()
                self._deployments[deployment_id] = Deployment(
                    deployment_id, reader.version, reader.metadata, reader.weights
                )
            except StoreError as error:
                self.damaged[path.stem] = error

    def _unlock(self) -> None:
        lock, self._lock_file = self._lock_file, None
        if lock is not None:
            os.close(lock)


def _parse(record: bytes | bytearray) -> tuple[dict[str, Any], tuple[WeightEntry, ...]]:
    content = json.loads(record)
    weights = (
        WeightEntry(name, tuple(shape), frac_bits, seed and bytes.fromhex(seed))
        for name, shape, frac_bits, seed in content["weights"]
    )
    return content["metadata"], tuple(weights)


def _hex(identifier: bytes, what: str) -> str:
    if not 1 <= len(identifier) <= 64:  # it becomes a file name
        raise InputError(f"a {what} id has 1 to 64 bytes, not {len(identifier)}")
    return identifier.hex()


def _derive(key: bytes, salt: bytes | None, info: bytes, size: int) -> bytes:
    return HKDF(SHA256(), size, salt, b"mpcinfer store v1 " + info).derive(key)


def _key_id(key: bytes) -> bytes:
    return _derive(key, None, b"key id", 8)


def _cipher(key: bytes, salt: bytes) -> AESGCM:
    return AESGCM(_derive(key, salt, b"file", 32))


def _nonce(counter: int, flag: int) -> bytes:
    return counter.to_bytes(11, "big") + bytes([flag])


def _exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size) if size > 0 else b""
    if size <= 0 or len(data) != size:
        raise _DamagedError("it is truncated")
    return data


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong while `path` is read into a StoreError with the remedy."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or "read error"
        raise StoreError(
            f"{path} cannot be read, {reason}: repair that and restart, or remove the model and deploy it again"
        ) from error
    except (_DamagedError, InvalidTag, ValueError, KeyError, TypeError, UploadError) as error:
        reason = "its contents or its name were changed"
        if isinstance(error, _DamagedError):
            reason = str(error)
        raise StoreError(f"{path} is damaged, {reason}: remove the model and deploy it again") from error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or "write error"
        raise StoreError(
            f"{path} cannot be written, {reason}: repair the disk or free space, then try again"
        ) from error


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_open_mode(path: Path, mode: int, remedy: str) -> None:
    if mode & 0o077:
        raise StoreError(f"{path} is open to other users (mode {mode & 0o777:o}): run `chmod {remedy} {path}`")


def _lock(directory: Path) -> int:
    """Make the store's directories and lock them; the lock goes with the process, however it ends."""
    with _writing(directory):
        for path in (directory, directory / "staging", directory / "deployments"):
            if not path.exists():
                path.mkdir(mode=0o700, parents=True)
                _sync_directory(path.parent)
            _refuse_open_mode(path, path.stat().st_mode, "700")
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


def _load_key(path: Path, directory: Path) -> bytes:
    if not path.exists():
        if any((directory / "deployments").iterdir()):
            raise StoreError(
                f"store key {path} is missing, but {directory} holds deployments: restore the key from a backup, "
                f"or empty {directory / 'deployments'} and deploy the models again"
            )
        with _writing(path), open(path, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as created:
            created.write(secrets.token_hex(KEY_SIZE) + "\n")
            created.flush()
            os.fsync(created.fileno())
            _sync_directory(path.parent)
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(4 * KEY_SIZE).strip()
    except OSError as error:
        raise StoreError(f"store key {path} cannot be read: {error.strerror}") from error
    _refuse_open_mode(path, mode, "600")
    try:
        key = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != KEY_SIZE:  # chained to nothing: the cause would quote the key
        raise StoreError(f"store key {path} does not hold {2 * KEY_SIZE} hex digits: restore it from a backup")
    return key
