"""What `guard_memory` does to a process, looked up in /proc in processes of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

CHILD = """
import ctypes, logging, os, resource, sys
user, swap, plant = int(sys.argv[1]), sys.argv[2] == "swap", sys.argv[3]
import pathlib, tempfile
import mpcinfer.wire.memory as memory
swaps = pathlib.Path(tempfile.mkstemp()[1])
lines = ["Filename Type Size Used Priority", "/dev/sdb1 partition 1 0 -2"]
swaps.write_text("\\n".join(lines[:1] if plant == "no swap" else lines))
memory._SWAPS = swaps
from mpcinfer.wire.server import configure_logging
configure_logging("info")
if user:
    os.setuid(user)
if plant != "nothing":
    memory.guard_memory(swap=swap)
held = bytearray(os.urandom(1 << 20)) * 8
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE), int(status["VmLck"].split()[0]))
"""
NOBODY = 65534


def child(user: int = 0, swap: str = "swap", plant: str = "") -> tuple[str, str]:
    """What a guarded process says of itself, and what it logs."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(user), swap, plant], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.strip(), done.stderr


def may_lock() -> bool:
    from mpcinfer.wire.memory import _may_lock_all

    return _may_lock_all()


def test_no_core_dump_and_nobody_looks_in() -> None:
    said, _ = child()
    assert said.startswith("0 (0, 0) ")
    unguarded, _ = child(plant="nothing")  # this test can fail
    assert not unguarded.startswith("0 (0, 0) ")


@pytest.mark.skipif(not may_lock(), reason="needs CAP_IPC_LOCK")
def test_memory_is_locked_where_that_is_allowed() -> None:
    said, log = child()
    assert int(said.split()[-1]) >= 8 << 10, "what was written since is not locked"
    assert "swap" not in log
    assert int(child(swap="none")[0].split()[-1]) == 0
    assert int(child(plant="no swap")[0].split()[-1]) == 0  # nothing to keep it out of


@pytest.mark.skipif(os.getuid() != 0, reason="takes another user's limits")
def test_what_is_not_protected_is_said_once() -> None:
    import resource

    said, log = child(NOBODY)
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[1] == resource.RLIM_INFINITY:
        pytest.skip("everybody may lock memory here")
    assert said.startswith("0 (0, 0) ") and said.endswith(" 0")
    assert log.count("may be swapped to disk") == 1 and "LimitMEMLOCK" in log


HEAPS = """
import ctypes, sys, threading
import mpcinfer.wire.memory as memory
if sys.argv[1] == "one":
    memory.one_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.fopen.restype = ctypes.c_void_p, ctypes.c_void_p
libc.free.argtypes, libc.fclose.argtypes = [ctypes.c_void_p], [ctypes.c_void_p]
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
together = threading.Barrier(4)
def work():
    held = libc.malloc(100_000)
    together.wait()
    libc.free(held)
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
memory.give_back()
out = libc.fopen(b"/dev/stdout", b"w")
libc.malloc_info(0, out)
libc.fclose(out)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others have one heap anyway")
def test_threads_share_a_heap() -> None:
    def heaps(which: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", HEAPS, which], capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout.count("<heap nr=")

    assert heaps("one") == 1
    assert heaps("own") > 1  # this test can fail


FREED = """
import ctypes
import mpcinfer.wire.memory as memory
memory.one_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
memory.give_back()
held = []
for _ in range(2):  # what was given back before does not count again
    held = [libc.malloc(1 << 20) for _ in range(128)]
    for block in held:
        ctypes.memset(block, 1, 1 << 20)
    above = libc.malloc(1 << 10)  # so that they are no end of the heap
    for block in held:
        libc.free(block)
    before = resident()
    memory.give_back(unless=160 << 20)
    kept = resident()
    memory.give_back(unless=64 << 20)
    print(before - kept, before - resident())
"""


@pytest.mark.skipif(platform.libc_ver() < ("glibc", "2.33"), reason="does not say how much is free")
def test_what_was_freed_is_given_back_if_it_is_much() -> None:
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True, timeout=60)
    for kept, given in (map(int, line.split()) for line in done.stdout.splitlines()):
        assert abs(kept) < 8 and given > 100


SETTLED = """
import gc
import mpcinfer.wire.memory as memory
class Loop:
    pass
ended = []
def loop():
    one = Loop()
    one.self, one.__class__.__del__ = one, lambda self: ended.append(1)
before = len(gc.get_objects())
memory.settle()
loop()
gc.collect()
print(len(gc.get_objects()) * 10 < before, gc.isenabled(), len(ended))
"""


def test_what_stays_is_not_searched_and_what_comes_later_is() -> None:
    done = subprocess.run([sys.executable, "-c", SETTLED], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["True", "True", "1"]
