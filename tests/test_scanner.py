"""The scanner finds what is planted, in every spelling, and nothing where nothing is."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mpcinfer.ring import prg
from mpcinfer.ring.domain import Z64
from mpcinfer.ring.sharing import split
from tests.scanner import (
    Needles,
    canaries,
    children,
    command,
    files_below,
    frozen,
    open_files,
    parent,
    scan_files,
    scan_memory,
)

VALUES = canaries(12, 9)
SCALED = torch.round(VALUES * 65536).to(torch.int64)
HOLDS = """
import sys
held = bytearray(sys.stdin.buffer.read(int(sys.argv[1])))
print("ready", flush=True)
sys.stdin.read()
"""
ADDS = """
import sys, numpy
size = int(sys.argv[1])
shares = [numpy.frombuffer(sys.stdin.buffer.read(size), "<i8") for _ in range(2)]
total = shares[0] + shares[1] if "add" in sys.argv else None
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def needles() -> Needles:
    found = Needles()
    found.add_reals("weight", VALUES)
    return found


@contextmanager
def process(code: str, *arguments: str, data: bytes) -> Iterator[int]:
    """A Python process that has read `data`."""
    started = subprocess.Popen([sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert started.stdin and started.stdout
    try:
        started.stdin.write(data)
        started.stdin.flush()
        assert started.stdout.readline() == b"ready\n"
        yield started.pid
    finally:
        started.stdin.close()
        started.kill()
        started.wait(10)
        started.stdout.close()


def spelled(x: torch.Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("spelling", "data"),
    [
        ("float64", spelled(VALUES)),
        ("float32", spelled(VALUES.float())),
        ("bfloat16", spelled(VALUES.bfloat16())),
        ("float16", spelled(VALUES.half())),
        ("int64 at scale 16", spelled(SCALED)),
        ("int64 at scale 32", spelled(SCALED << 16)),
        ("int32 at scale 16", spelled(SCALED.to(torch.int32))),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_plaintext_in_a_process_is_found(needles: Needles, spelling: str, data: bytes, transposed: bool) -> None:
    if transposed:
        whole = torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(12, 9, -1)
        data = whole.transpose(0, 1).contiguous().numpy().tobytes()
    data = b"?" * 3 + data  # alignment is no condition
    with process(HOLDS, str(len(data)), data=data) as pid:
        found = scan_memory(pid, needles)
    assert found[f"weight as {spelling}"] >= 80


def test_a_run_of_16_bytes_is_enough(needles: Needles) -> None:
    pair = spelled(SCALED[3, 4:6])
    with process(HOLDS, str(len(pair)), data=pair) as pid, frozen(pid):
        assert "weight as int64 at scale 16" in scan_memory(pid, needles, everything=False)


def test_a_party_that_adds_up_shares_is_found_and_one_that_only_holds_them_is_not(needles: Needles) -> None:
    seeds, last = split(SCALED, Z64, 2)
    first = prg.expand(seeds[0], tuple(SCALED.shape), Z64)
    control = Needles()
    control.add_integers("share", last)
    data = spelled(first) + spelled(last)
    for arguments, guilty in ((("add",), True), ((), False)):
        with process(ADDS, str(len(data) // 2), *arguments, data=data) as pid:
            assert bool(scan_memory(pid, needles)) == guilty
            assert set(scan_memory(pid, control)) == {"share"}


@pytest.mark.parametrize(
    "plant",
    [
        lambda: f"2026-01-01 12:00:00,123 DEBUG party: logit {VALUES[2, 3].item()!r}".encode(),
        lambda: f"DEBUG x = {VALUES.float()}".encode(),
        lambda: f'{{"value": {VALUES[0, 0].item():.4f}}}'.encode(),
        lambda: f"share of {SCALED[1, 1].item()}".encode(),
        lambda: f"DEBUG frame {spelled(SCALED[0]).hex()}".encode(),
        lambda: b"DEBUG frame a" + base64.b64encode(spelled(VALUES.float())),
        lambda: f"DEBUG frame {spelled(SCALED[0])!r}".encode(),
        lambda: b"\xff\xfe" + spelled(VALUES[0]),
    ],
    ids=["float", "tensor", "rounded", "integer", "hex", "base64", "bytes", "raw"],
)
def test_a_file_with_plaintext_is_found(needles: Needles, tmp_path: Path, plant: Callable[[], bytes]) -> None:
    (tmp_path / "store" / "deployments").mkdir(parents=True)
    harmless = tmp_path / "party.log"
    harmless.write_text(f"2026-01-01 12:00:00,123 INFO session {os.urandom(16).hex()} of 127.0.0.1:28347, 300.0 s\n")
    assert not scan_files(files_below(tmp_path), needles)
    (tmp_path / "store" / "deployments" / "x.mpc").write_bytes(plant())
    assert scan_files(files_below(tmp_path), needles)


def test_a_deleted_file_that_is_still_open_is_found(needles: Needles, tmp_path: Path) -> None:
    path = tmp_path / "temporary"
    with path.open("wb") as file:
        file.write(b"\xff" + spelled(VALUES))
        file.flush()
        path.unlink()
        assert not scan_files(files_below(tmp_path), needles)
        assert scan_files(open_files(os.getpid()), needles)


def test_random_data_is_not_found(needles: Needles) -> None:
    assert not needles.in_bytes(os.urandom(1 << 24))
    assert not needles.in_bytes(bytes(1 << 20))


def test_what_a_process_says_about_itself() -> None:
    with process(HOLDS, "1", data=b"x") as pid:
        assert parent(pid) == os.getpid() and pid in children(os.getpid()) and not children(pid)
        assert command(pid)[:2] == [sys.executable, "-c"]
