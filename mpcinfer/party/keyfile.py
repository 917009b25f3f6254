"""The file of the key that a store is encrypted under: 64 hex digits, for its owner's eyes only.

While the key is changed, the next one waits beside it under the same name with `.new` added.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from mpcinfer.errors import StoreError
from mpcinfer.party.record import sync_directory, writing

KEY_SIZE = 32


def load_key(path: Path, *, new: bool) -> bytes:
    """The key in a file, which is made if it is missing and the store is `new`.

    StoreError if it is missing otherwise, holds no key, or may be read by group or others.
    """
    if not path.exists():
        if not new:
            raise StoreError(
                f"store key {path} is missing, but its store holds deployments: restore the key from a backup, "
                "or empty the store's directory `deployments` and deploy the models again"
            )
        _write(path, secrets.token_bytes(KEY_SIZE))
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(4 * KEY_SIZE).strip()
    except OSError as error:
        raise StoreError(f"store key {path} cannot be read: {error.strerror}") from error
    refuse_open_mode(path, mode, "600")
    try:
        key = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != KEY_SIZE:  # chained to nothing: the cause would quote the key
        raise StoreError(f"store key {path} does not hold {2 * KEY_SIZE} hex digits: restore it from a backup")
    return key


def stage_key(path: Path) -> bytes:
    """A fresh key, on the disk beside the one at `path`, which still holds."""
    key, staged = secrets.token_bytes(KEY_SIZE), _staged(path)
    with writing(staged):
        staged.unlink(missing_ok=True)  # of a change that was cut short: nothing is left that it opens
    _write(staged, key)
    return key


def replace_key(path: Path) -> None:
    """The staged key takes the place of the one at `path`, at once."""
    with writing(path):
        _staged(path).rename(path)
        sync_directory(path.parent)


def refuse_open_mode(path: Path, mode: int, remedy: str) -> None:
    """StoreError if group or others may use a file or directory of this mode."""
    if mode & 0o077:
        raise StoreError(f"{path} is open to other users (mode {mode & 0o777:o}): run `chmod {remedy} {path}`")


def _staged(path: Path) -> Path:
    return path.with_name(f"{path.name}.new")


def _write(path: Path, key: bytes) -> None:
    with writing(path), open(path, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as created:
        created.write(key.hex() + "\n")
        created.flush()
        os.fsync(created.fileno())
        sync_directory(path.parent)
