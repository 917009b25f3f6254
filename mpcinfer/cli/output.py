"""What commands read and write: arrays in files, tables, JSON, a progress bar."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mpcinfer.errors import ConfigError, InputError


def load_array(file: Path) -> Any:
    """The array in a .npy file; InputError if there is none."""
    import numpy as np

    try:
        array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"cannot read {file} as a .npy file: {getattr(error, 'strerror', None) or 'not one'}"
        ) from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise InputError(f"{file} holds several arrays; give a .npy file for each input")
    return array


def write_array(file: Path, array: Any) -> None:
    """Write a .npy file under exactly this name."""
    import numpy as np

    try:
        with file.open("wb") as stream:  # np.save would add a suffix
            np.save(stream, array, allow_pickle=False)
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error


@contextmanager
def announcing(file: Path | None) -> Iterator[Callable[[], object]]:
    """Yields what makes the file appear; it is whole when it is first seen, and only there while the body runs.

    One that an earlier run left is taken away at once: whoever waits for it must not take it for this run's.
    """
    if file is None:
        yield lambda: None
        return
    fresh = file.with_name(file.name + ".new")
    try:  # a place that cannot be written to is told before anything has started
        file.unlink(missing_ok=True)
        fresh.write_text("ready\n")
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error
    try:
        yield lambda: fresh.replace(file)
    finally:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
            file.unlink(missing_ok=True)


@contextmanager
def progress(as_json: bool) -> Iterator[Any]:
    """A progress bar to be called with (bytes done, bytes in all), or None if nobody is looking."""
    if as_json or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("exporting", total=None)

        def report(done: int, total: int) -> None:
            bar.update(task, description="sharing" if done < total else "committing", completed=done, total=total)

        yield report


def shapes(specs: Sequence[Any]) -> str:
    """The shapes of inputs or outputs, like Nx3."""
    return " ".join("x".join("N" if size == -1 else str(size) for size in spec.shape) or "scalar" for spec in specs)


def print_json(content: dict[str, Any]) -> None:
    """One object on one line."""
    print(json.dumps(content))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Container[str] = ()) -> None:
    """Columns as wide as they need to be; those in `numbers` are aligned to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        cells = zip(head, row, widths, strict=True)
        print("  ".join(c.rjust(w) if title in numbers else c.ljust(w) for title, c, w in cells).rstrip())


def in_bytes(count: float) -> str:
    """1.23 MB: a number of bytes in three digits, powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"


def in_seconds(seconds: float) -> str:
    """12 ms, 1.2 s."""
    if 0 < seconds < 1e-4:
        return "<0.1 ms"
    if seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:.0f} s"
