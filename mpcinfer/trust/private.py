"""Files that only their owner may read."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def write_private(path: Path, content: bytes) -> None:
    """Write a file that others cannot read, in the place of one that may be there. Raises OSError."""
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags & ~os.O_TRUNC, 0o600)) as file:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            os.fchmod(file.fileno(), 0o600)  # one that was there may have let others read it, or be somebody else's
            file.truncate()
        file.write(content)
