"""One deployment's file: how it is written, sealed and read. `store` says where such files lie and what they are for.

    header   magic, format version, key id, 16 random bytes of salt
    seal     AES-GCM of the version, zero until commit; its associated data hold the deployment id (the file's name)
    chunks   AES-256-GCM of 1 MiB of plaintext each: length of the JSON, JSON, weights (int64 little-endian)

The construction is STREAM: the key belongs to one file (HKDF of the store's key and the salt), the nonce is the
chunk's number and whether it is the last one, and the header is associated data of everything. So a flipped bit, a
missing, added or moved chunk and a file under another's name are all detected.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from mpcinfer.errors import ConflictError, StoreError, UploadError

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
    """A committed deployment: `metadata` as given to `Store.stage`, after a round trip through JSON.

    While `pending`, this party cannot know whether all others have committed it.
    """

    id: bytes
    version: int
    metadata: dict[str, Any] = field(repr=False)
    weights: tuple[WeightEntry, ...]
    pending: bool = False

    @property
    def generation(self) -> str:
        """Which refresh made these shares, at all parties; empty for those that the owner has sent."""
        return str(self.metadata.get("generation", ""))


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
        with writing(path):
            self._file: BinaryIO | None = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "w+b")
        with self._guard() as file:
            file.write(self._header + bytes(SEAL_SIZE))
            self._append(file, LENGTH.pack(len(record)) + record)

    def write(self, chunk: bytes | bytearray) -> None:
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
                    with writing(self._path):
                        self._path.unlink(missing_ok=True)
                finally:
                    self._close()

    def commit(self, target: Path, deployment_id: bytes, version: int) -> Deployment:
        """Seal the finished upload and make it the file `target`; for `Store.commit`."""
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
                sync_directory(target.parent)
            except BaseException:
                target.unlink()  # the caller is told that it failed, so it must not come back at the next start
                raise
            self._close()
            return Deployment(deployment_id, version, self.metadata, self.weights)

    def _append(self, file: BinaryIO, data: bytes | bytearray) -> None:
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
                with writing(self._path):
                    yield self._file
            except BaseException:
                self.discard()
                raise


class DamagedError(Exception):
    """Why a file cannot be used, in words without secrets."""


class Reader:
    """Decrypts one committed file from front to back. Use inside `reading`, which names the file in the errors."""

    def __init__(self, file: BinaryIO, key: bytes, deployment_id: bytes) -> None:
        file.seek(0)
        self._file = file
        self._header = _exactly(file, HEADER.size)
        magic, format_version, key_id, salt = HEADER.unpack(self._header)
        if magic != MAGIC:
            raise DamagedError("it is not a store file")
        if format_version != FORMAT:
            raise DamagedError(f"it has format {format_version}, this version of mpcinfer reads {FORMAT}")
        if key_id != _key_id(key):
            raise DamagedError("or was written under another store key (then restore that key and restart)")
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
            raise DamagedError("it is truncated")
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

    def pieces(self) -> Iterator[bytearray]:
        """All that was not read yet, a chunk at a time."""
        while self._left:
            yield self.read(min(CHUNK, self._left))

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


def sealed_under(path: Path, key: bytes) -> bool:
    """Whether a file says that it was written under this key."""
    try:
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
    except OSError:
        return False
    return len(header) == HEADER.size and HEADER.unpack(header)[2] == _key_id(key)


def _parse(record: bytes | bytearray) -> tuple[dict[str, Any], tuple[WeightEntry, ...]]:
    content = json.loads(record)
    weights = (
        WeightEntry(name, tuple(shape), frac_bits, seed and bytes.fromhex(seed))
        for name, shape, frac_bits, seed in content["weights"]
    )
    return content["metadata"], tuple(weights)


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
        raise DamagedError("it is truncated")
    return data


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong while `path` is read into a StoreError with the remedy."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or "read error"
        raise StoreError(
            f"{path} cannot be read, {reason}: repair that and restart, or remove the model and deploy it again"
        ) from error
    except (DamagedError, InvalidTag, ValueError, KeyError, TypeError, UploadError) as error:
        reason = "its contents or its name were changed"
        if isinstance(error, DamagedError):
            reason = str(error)
        raise StoreError(f"{path} is damaged, {reason}: remove the model and deploy it again") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or "write error"
        raise StoreError(
            f"{path} cannot be written, {reason}: repair the disk or free space, then try again"
        ) from error


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
