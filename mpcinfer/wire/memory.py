"""What a process holds in memory stays there: no core dump, no other process of its user looking in, no swap.

And it holds no more than it must: what large tensors have left is used again.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import resource
from contextlib import suppress
from pathlib import Path

_log = logging.getLogger(__name__)

_PR_SET_DUMPABLE = 4
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEPT_BYTES = 1 << 30
_LARGEST_KEPT = 32 << 20, 256 << 20  # of these what glibc allows: before 2.35 the first
# Present and future pages, each once it is touched: address space that is only reserved takes no memory.
_MCL_ALL_ON_FAULT = 1 | 2 | 4
_CAP_IPC_LOCK = 14
_beside = 0  # of memory, beside what is in use, after it was last given back
_SWAPS = Path("/proc/swaps")  # a line of titles, and one for each


def guard_memory(*, swap: bool = True) -> None:
    """Call at the start of a process that will hold shares or seeds. What the system does not allow is logged.

    swap: also keep all memory out of the swap, if there is any. That needs an unlimited RLIMIT_MEMLOCK or CAP_IPC_LOCK;
    with less, memory would run out instead, so it is left alone. It is not done for nothing: of locked memory the
    allocator gives back less, so that a process has up to 1.7 times as much.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")
    except (OSError, AttributeError):
        _log.warning("this system lets other processes of the same user read this one's memory (no PR_SET_DUMPABLE)")
        return
    if not swap or not _swaps():
        return
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
    if hard != resource.RLIM_INFINITY and not _may_lock_all():
        _unlocked(f"RLIMIT_MEMLOCK is {hard >> 20} MiB")
    elif libc.mlockall(_MCL_ALL_ON_FAULT):
        _unlocked(os.strerror(ctypes.get_errno()))


def one_heap() -> None:
    """Call before there are threads. With a heap for each, as glibc has, what one has freed no other can have: tensors
    that are made in one thread and dropped in another would take half as much memory again. Others have one anyway.

    What was freed is kept for the next request, which needs as much: pages that the system takes back and gives again
    cost a tenth of a request's time.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 1)
        for size in _LARGEST_KEPT:
            mallopt(_M_MMAP_THRESHOLD, size)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def settle() -> None:
    """Call once all is loaded that stays: modules and their classes, half a million objects, are not gone through again
    each time the interpreter looks for what nobody refers to, in the middle of a request.
    """
    gc.collect()
    gc.freeze()


def give_back(*, unless: int = 0) -> None:
    """Return to the system what was freed and is not in use: after much more was needed than will be again.

    unless: nothing is done for so many bytes or fewer since the last time, where glibc says what is in use.
    """
    global _beside
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        if unless and _beside and _beside_used(libc) <= _beside + unless:
            return
        libc.malloc_trim(0)
        _beside = _beside_used(libc)


def _beside_used(libc: ctypes.CDLL) -> int:
    """Bytes of memory that hold something else than what was allocated and not freed: code, and what was freed. (The
    bytes that glibc counts as free are no measure: those it has given back are among them.)"""
    libc.mallinfo2.restype = _Mallinfo2
    heap = libc.mallinfo2()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return int(resident - heap.uordblks - heap.hblkhd)


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def _swaps() -> bool:
    """Whether this machine swaps. Who adds a swap later starts the processes again."""
    try:
        return len(_SWAPS.read_text().splitlines()) > 1
    except OSError:
        return True


def _unlocked(why: str) -> None:
    _log.warning(
        "this process's memory, shares included, may be swapped to disk (%s): set LimitMEMLOCK=infinity, or use no or "
        "encrypted swap",
        why,
    )


def _may_lock_all() -> bool:
    """Whether this process may lock memory whatever the limit."""
    lines = Path("/proc/self/status").read_text().splitlines()
    effective = next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")), 0)
    return bool(effective >> _CAP_IPC_LOCK & 1)
