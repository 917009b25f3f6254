"""What the runners of all peers share: answer JSON requests from standard input, one a line, until it ends.

Runs in the peer's own environment: standard library only. Requests name a method of the runner and its arguments; an
answer is {"ok": result} or {"failed": reason}. Standard output carries answers only: whatever the peer prints goes
where standard error goes, a log file.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


def serve(make_runner: Any) -> None:
    """Make the runner and answer until standard input ends; then end the process, whatever threads it has."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a benchmark that was killed leaves nothing behind
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    runner = None
    try:
        for line in sys.stdin:
            request = json.loads(line)
            try:
                if runner is None:
                    runner = make_runner()
                answer = {"ok": getattr(runner, request.pop("do"))(**request)}
            except Exception as error:
                traceback.print_exc()
                answer = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            answers.write(json.dumps(answer) + "\n")
    finally:
        os._exit(0)


def reset_peak_memory() -> None:
    """Begin to measure `peak_memory` from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """The largest resident size of this process since `reset_peak_memory`, in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
