"""Looking for plaintext where none may be: in the memory of processes, in their files, in what they log.

`Needles` are values with every spelling in which they might lie around; a needle is a run of 16 bytes of them (two
int64, four float32, ...), so a part of a tensor is found as well as the whole. Only pages that exist are read:
resident or swapped out; what a process has mapped from files but never touched is in the files.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import os
import re
import signal
import stat
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import njit

RUN = 16  # bytes
_BITS = 21
_HASHES = (2654435761, 2246822519)
_BLOCK = 1 << 23
_PAGE = os.sysconf("SC_PAGE_SIZE")

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@njit("int64(uint8[::1], uint8[::1], uint32[::1], uint8[::1], uint8[:, ::1], int64[:, ::1])", nogil=True, cache=True)
def _search(data, table, keys, anchors, runs, found):  # type: ignore[no-untyped-def]
    """Every place in `data` where one of `runs` begins, into rows (place, run) of `found`; how many there are.

    Each run is looked up by the 4 bytes at its anchor: in a bit table under two hashes, then in the sorted `keys`.
    """
    count = 0
    key = np.uint32(0)
    for end in range(data.size):
        key = (key >> np.uint32(8)) | (np.uint32(data[end]) << np.uint32(24))
        one = np.uint32(key * np.uint32(_HASHES[0])) >> np.uint32(32 - _BITS)
        if table[one >> np.uint32(3)] & (np.uint8(1) << np.uint8(one & np.uint32(7))):
            two = np.uint32(key * np.uint32(_HASHES[1])) >> np.uint32(32 - _BITS)
            if not table[two >> np.uint32(3)] & (np.uint8(1) << np.uint8(two & np.uint32(7))):
                continue
            low, high = 0, keys.size
            while low < high:
                middle = (low + high) // 2
                if keys[middle] < key:
                    low = middle + 1
                else:
                    high = middle
            while low < keys.size and keys[low] == key:
                start = end - 3 - anchors[low]
                if start >= 0 and start + RUN <= data.size:
                    same = True
                    for i in range(RUN):
                        if data[start + i] != runs[low, i]:
                            same = False
                            break
                    if same:
                        if count < found.shape[0]:
                            found[count, 0] = start
                            found[count, 1] = low
                        count += 1
                low += 1
    return count


def canaries(*shape: int) -> torch.Tensor:
    """Distinctive values, fresh each time: 16 <= abs(x) < 64 with 16 fraction bits, so that float32 is exact."""
    count = int(np.prod(shape))
    raw = np.frombuffer(os.urandom(4 * count), "<u4").astype(np.int64)
    magnitude = (1 << 20) + raw % (3 << 20)
    return torch.from_numpy(np.where(raw >> 31, -magnitude, magnitude) / 65536).reshape(shape)


class Needles:
    """What to look for, by label."""

    def __init__(self) -> None:
        self._labels: dict[bytes, str] = {}
        self._reals: list[tuple[float, str]] = []
        self._integers: dict[int, str] = {}
        self._index: tuple[Bytes, ...] | None = None

    def __len__(self) -> int:
        return len(self._labels)

    def __or__(self, other: Needles) -> Needles:
        both = Needles()
        both._labels = other._labels | self._labels
        both._reals = self._reals + other._reals
        both._integers = other._integers | self._integers
        return both

    def add_raw(self, label: str, data: bytes, *, step: int = 1) -> None:
        """Every run of 16 bytes in `data` that begins at a multiple of `step`."""
        for start in range(0, len(data) - RUN + 1, step):
            run = data[start : start + RUN]
            if max(Counter(run).values()) <= RUN - 4 and len(set(run)) >= 5:  # anything else is found everywhere
                self._labels.setdefault(run, label)
        self._index = None

    def add_integers(self, label: str, values: torch.Tensor) -> None:
        """int64 numbers as they are (a share, an opened value): as int64, and in decimal in texts."""
        for order in _orders(values.numpy()):
            self.add_raw(label, np.ascontiguousarray(order, "<i8").tobytes(), step=8)
        self._integers |= dict.fromkeys(values.flatten().tolist(), label)

    def add_reals(self, label: str, values: torch.Tensor, *, scales: Sequence[int] = (16, 32)) -> None:
        """Reals as floats of every format, as int64 at each scale 2^s, in every layout; in texts in decimal."""
        exact = values.detach().double()
        for order in _orders(exact.numpy()):
            plain = torch.from_numpy(np.ascontiguousarray(order))
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                encoded = plain.to(dtype)
                self.add_raw(f"{label} as {str(dtype)[6:]}", _raw(encoded), step=dtype.itemsize)
            for scale in scales:
                fixed = torch.round(plain * 2.0**scale).to(torch.int64)
                self.add_raw(f"{label} as int64 at scale {scale}", _raw(fixed), step=8)
                if scale == min(scales):
                    self.add_raw(f"{label} as int32 at scale {scale}", _raw(fixed.to(torch.int32)), step=4)
        flat = exact.flatten()
        self._reals += [(x, label) for x in flat.tolist()]
        for scale in scales:
            fixed = torch.round(flat * 2.0**scale).to(torch.int64)
            self._integers |= dict.fromkeys(fixed.tolist(), f"{label} at scale {scale}")

    def add_rounded(self, label: str, values: torch.Tensor) -> None:
        """int64 numbers of which each may also be one larger, as after a truncation; also as float64 at scale 16."""
        for order in _orders(values.numpy()):
            flat = order.reshape(-1)
            for a, b in zip(flat[:-1].tolist(), flat[1:].tolist(), strict=True):
                for pair in product((a, a + 1), (b, b + 1)):
                    self.add_raw(f"{label} as int64", np.array(pair, "<i8").tobytes())
                    self.add_raw(f"{label} as float64", (np.array(pair, "<f8") / 65536).tobytes())

    def _build(self) -> tuple[Bytes, ...]:
        if self._index is None:
            runs = np.frombuffer(b"".join(self._labels), np.uint8).reshape(-1, RUN)
            # the anchor: the 4 bytes that are least like those of other data
            telling = np.cumsum(np.pad((runs != 0) & (runs != 255), ((0, 0), (1, 0))), axis=1)
            anchors = (telling[:, 4:] - telling[:, :-4]).argmax(axis=1)
            fours = np.ascontiguousarray(np.take_along_axis(runs, anchors[:, None] + np.arange(4), axis=1))
            keys = fours.view("<u4").reshape(-1)
            order = np.argsort(keys, kind="stable")
            table = np.zeros(1 << (_BITS - 3), np.uint8)
            for factor in _HASHES:
                places = (keys * np.uint32(factor)) >> np.uint32(32 - _BITS)
                np.bitwise_or.at(table, places >> np.uint32(3), np.uint8(1) << (places & np.uint32(7)).astype(np.uint8))
            self._index = (
                table,
                keys[order].astype(np.uint32),
                anchors[order].astype(np.uint8),
                np.ascontiguousarray(runs[order]),
            )
        return self._index

    def in_bytes(self, data: Bytes | bytes) -> Counter[str]:
        """How often each label occurs, at any alignment."""
        if not self._labels:
            return Counter()
        array = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
        array = array if array.flags.writeable else array.copy()
        index = self._build()
        found = np.empty((4096, 2), np.int64)
        count = min(_search(array, *index, found), len(found))
        return Counter(self._labels[index[3][run].tobytes()] for run in found[:count, 1])

    def in_text(self, text: str) -> Counter[str]:
        """As numbers in decimal with 6 digits or more, in hex, in base64, as a Python bytes literal, or raw."""
        found = self.in_bytes(text.encode(errors="surrogateescape"))
        reals = np.array(sorted(x for x, _ in self._reals))
        labels = dict(self._reals)
        for match in _NUMBER.finditer(text):
            token = match[0]
            digits = re.sub(r"[eE].*|\D", "", token).lstrip("0")
            if re.fullmatch(r"-?\d+", token):
                if len(digits) >= 6 and int(token) in self._integers:
                    found[f"{self._integers[int(token)]} in decimal"] += 1
            elif len(digits) >= 6 and reals.size:
                value = float(token)
                # the text is the number rounded or cut off after its last digit
                near = reals[np.abs(reals - value).argmin()]
                if abs(near - value) <= 10.0 ** (np.floor(np.log10(abs(value) or 1.0)) - len(digits) + 1):
                    found[f"{labels[near]} in decimal"] += 1
        for match in _HEX.finditer(text):
            for start in (0, 1):
                digits = match[0][start:]
                found += self.in_bytes(bytes.fromhex(digits[: len(digits) // 2 * 2]))
        for match in _BASE64.finditer(text):
            plain = match[0].replace("-", "+").replace("_", "/")
            for start in range(4):
                whole = plain[start : start + (len(plain) - start) // 4 * 4]
                try:
                    found += self.in_bytes(base64.b64decode(whole))
                except binascii.Error:
                    continue
        if "\\x" in text:
            for line in text.splitlines():
                try:
                    found += self.in_bytes(codecs.escape_decode(line.encode())[0])  # type: ignore[attr-defined]
                except ValueError:
                    continue
        return found


_NUMBER = re.compile(r"(?<![\w.])-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w])")
_HEX = re.compile(r"[0-9a-fA-F]{32,}")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{24,}")


def _raw(x: torch.Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def _orders(values: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    """The values in row-major order for every order of the axes longer than 1."""
    squeezed = values.squeeze()
    for axes in permutations(range(squeezed.ndim)):
        yield squeezed.transpose(axes).reshape(-1)


# --- where to look -------------------------------------------------------------------------------------------------


def mappings(pid: int) -> Iterator[tuple[int, int, str, str]]:
    """Start, end, permissions and name of every readable mapping of a process."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, permissions, _, _, _, *name = line.split(maxsplit=5)
        start, end = (int(x, 16) for x in span.split("-"))
        # [vvar] and [vsyscall] are the kernel's and cannot be read from outside
        if permissions[0] == "r" and not "".join(name).startswith(("[v", "/dev/")) or "/dev/shm/" in "".join(name):
            yield start, end, permissions, "".join(name)


def _existing(pagemap: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of a mapping whose pages are in memory or swapped out."""
    raw = os.pread(pagemap, (end - start) // _PAGE * 8, start // _PAGE * 8)
    there = (np.frombuffer(raw, "<u8") >> np.uint64(62)) != 0
    edges = np.flatnonzero(np.diff(np.concatenate([[False], there, [False]]).astype(np.int8)))
    for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield start + first * _PAGE, start + last * _PAGE


def read_memory(pid: int, *, everything: bool = True) -> Iterator[Bytes]:
    """What a process has in memory, in new arrays that overlap by less than a run.

    everything: all readable mappings; else only those that are no unchangeable views of files.
    """
    read = 0
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
    try:
        for start, end, permissions, name in mappings(pid):
            if not everything and "w" not in permissions and name.startswith("/"):
                continue
            for first, last in _existing(pagemap, start, end):
                at = first
                while at < last:
                    block = np.empty(min(_BLOCK, last - at), np.uint8)
                    try:
                        size = os.preadv(memory, [memoryview(block)], at)
                    except OSError:  # unmapped in the meantime
                        break
                    if size == 0:
                        break
                    yield block[:size]
                    read += size
                    at += size if at + size >= last else size - RUN + 1
    finally:
        os.close(memory)
        os.close(pagemap)
    assert read > 1 << 20, f"only {read} bytes of process {pid} could be read"


def scan_memory(pid: int, needles: Needles, *, everything: bool = True) -> Counter[str]:
    """How often each needle occurs in a process's memory."""
    found: Counter[str] = Counter()
    for block in read_memory(pid, everything=everything):
        found += needles.in_bytes(block)
    return found


def scan_files(paths: Iterable[Path], needles: Needles) -> Counter[str]:
    """How often each needle occurs in files, raw, or as text where a file is text."""
    found: Counter[str] = Counter()
    for path in paths:
        try:
            data = path.read_bytes()
        except FileNotFoundError:  # a temporary file that is gone
            continue
        try:
            found += needles.in_text(data.decode())
        except UnicodeDecodeError:
            found += needles.in_bytes(data)
    return found


def files_below(directory: Path) -> list[Path]:
    """All regular files in a directory and below."""
    return [path for path in sorted(directory.rglob("*")) if path.is_file() and not path.is_symlink()]


def open_files(pid: int) -> list[Path]:
    """The regular files that a process has open, deleted ones too."""
    paths = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if stat.S_ISREG(link.stat().st_mode):
                paths.append(link)
        except FileNotFoundError:
            continue
    return paths


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Stop a process in whatever it is doing, and let it go on afterwards."""
    os.kill(pid, signal.SIGSTOP)
    try:
        end = time.monotonic() + 5
        while _state(pid) != "T":
            assert time.monotonic() < end, f"process {pid} did not stop"
            time.sleep(0.001)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def parent(pid: int) -> int:
    """The process that started this one."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def command(pid: int) -> list[str]:
    """The command line of a process."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode().split("\0")


def children(pid: int) -> list[int]:
    """The processes that a process has started and that still run."""
    listed = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for line in listed for child in line]
