"""All parties of PriX in one of its modes (lut is its default; 16 fraction bits), in its own environment; see serve.py.

run_prix.py MODE PARTIES. One process that forks the parties, which is how `prix.run` works: they talk through shared
memory. Its mode for several machines does not start with the jax that belongs to it. Parties that evaluate a function
are forked for it; those that are timed stay, and are told what to do.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Each request is new processes, which would compile everything anew.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(sys.prefix, "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import numpy as np
import prix
from graphs import GRAPHS, TensorOps, evaluate
from serve import peak_memory, reset_peak_memory, serve

# What it has no function for is written with those it has; its GELU, a table of the erf form, stands for both.
FUNCTIONS: dict[str, Any] = {
    "relu": lambda x: x.relu(),
    "gelu": lambda x: x.gelu(),
    "gelu_tanh": lambda x: x.gelu(),
    "silu": lambda x: x.silu(),
    "sigmoid": lambda x: x.sigmoid(),
    "tanh": lambda x: x.tanh(),
    "erf": lambda x: x.erf(),
    "exp": lambda x: x.exp(),
    "reciprocal": lambda x: x.reciprocal(),
    "rsqrt": lambda x: x.inv_sqrt(),
    "softmax": lambda x: x.softmax(dim=-1),
    "layernorm": lambda x, weight, bias: x.layernorm(weight, bias, eps=1e-5),
    "rmsnorm": lambda x, weight: x * (x.square().mean(-1, keepdim=True) + 1e-5).inv_sqrt() * weight,
    "log": lambda x: x.log(),
    "sqrt": lambda x: x.sqrt(),
}
OPERATIONS: dict[str, Any] = {
    "matmul": lambda x, w: x.matmul(w),
    "max": lambda x: x.max(),
    "argmax": lambda x: x.argmax(one_hot=False),
}
_SLOW = 5.0  # seconds; a run that takes so long is not repeated but to be timed


class PrixOps(TensorOps):
    """What graphs are made of."""

    def layernorm(self, x: Any, w: Any, name: str, eps: float) -> Any:
        return x.layernorm(w[f"{name}_g"], w[f"{name}_b"], eps=eps)

    def gelu(self, x: Any) -> Any:
        return x.gelu()

    gelu_tanh = gelu

    def silu(self, x: Any) -> Any:
        return x.silu()

    def concatenate(self, parts: list[Any], axis: int) -> Any:
        return prix.cat(parts, dim=axis)


def _shared(arrays: str) -> dict[str, Any]:
    """All arrays, private; x before weight and bias."""
    with np.load(arrays) as stored:
        return {name: prix.array(np.asarray(stored[name], np.float64), src=0) for name in sorted(stored, reverse=True)}


def _revealed(result: Any) -> Any:
    return np.asarray(result.reveal(), np.float64) / result.scale


def _evaluate(function: str, arrays: str, output: str) -> None:
    """What each of the forked processes does; rank 0 writes the file, or why there is none, as `prix.run` won't say."""
    rank = prix.comm.get().get_rank()
    try:
        value = _revealed(FUNCTIONS[function](*_shared(arrays).values()))
        if rank == 0:
            np.save(output, value)
    except Exception as error:
        if rank == 0:
            Path(output).with_suffix(".txt").write_text(f"{type(error).__name__}: {error}")
        raise


class Party:
    """One of the processes that stay: prepares cases and runs them together with the others."""

    def __init__(self) -> None:
        self.comm = prix.comm.get()
        self.cases: dict[str, tuple[Any, Any]] = {}

    def prepare(self, case: str, operation: str, arrays: str, settings: dict[str, Any]) -> dict[str, Any]:
        reset_peak_memory()
        began = time.perf_counter()
        private = _shared(arrays)
        shared = time.perf_counter()

        def function() -> Any:
            if operation in GRAPHS:
                return evaluate(operation, PrixOps(), private, settings)
            return (OPERATIONS | FUNCTIONS)[operation](*private.values())

        self.cases[case] = function, None
        first = self.run(case)["seconds"]
        self.comm.set_verbosity(True)
        self.comm.reset_communication_stats()
        warm = self.run(case)["seconds"]
        sent = self.comm.comm_bytes + self.comm.eval_comm_bytes
        rounds = self.comm.comm_rounds + self.comm.eval_comm_rounds
        self.comm.set_verbosity(False)
        if self.comm.broadcast_obj(warm, 0) < _SLOW:
            self.run(case)
        return {
            "share_seconds": shared - began,
            "first_run_seconds": first,
            "bytes_sent": int(sent),
            "rounds": int(rounds),
        }

    def run(self, case: str) -> dict[str, float]:
        function, _ = self.cases[case]
        self.comm.barrier()
        began = time.perf_counter()
        result = function()
        result.share.block_until_ready()
        self.comm.barrier()
        seconds = time.perf_counter() - began
        self.cases[case] = function, result
        return {"seconds": seconds}

    def finish(self, case: str, output: str) -> dict[str, int]:
        value = _revealed(self.cases.pop(case)[1])
        if self.comm.get_rank() == 0:
            np.save(output, value)
        return {"peak_rss_bytes": peak_memory()}


def _stay(addresses: list[str]) -> None:
    """Do what comes from this party's address, for as long as there is somebody; PriX closes what it inherits."""
    pipe, party = Client(addresses[prix.comm.get().get_rank()]), Party()
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send({"ok": getattr(party, request.pop("do"))(**request)})
        except Exception as error:
            pipe.send({"failed": f"{type(error).__name__}: {error}"})
            raise  # the others wait for this party


class Runner:
    """Evaluates functions on given arrays, or prepares cases and runs them."""

    def __init__(self, mode: str, parties: int) -> None:
        self.mode, self.n = mode, parties
        self.pipes: list[Any] = []
        self.running: threading.Thread | None = None

    def evaluate(self, function: str, arrays: str, output: str) -> None:
        """Share the arrays, evaluate a function once; the result, revealed, is written to the file `output`."""
        reason = Path(output).with_suffix(".txt")
        reason.unlink(missing_ok=True)
        try:
            prix.run(_evaluate, function, arrays, output, world_size=self.n, mode=self.mode)
        except RuntimeError as error:
            raise RuntimeError(reason.read_text() if reason.exists() else str(error)) from error

    def prepare(
        self, case: str, operation: str, arrays: str, variant: str, settings: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Share the arrays, run: once cold, once counted, once to warm up what is timed later."""
        if self.running is None:
            listeners = [Listener(family="AF_UNIX") for _ in range(self.n)]
            addresses = [listener.address for listener in listeners]
            self.running = threading.Thread(
                target=prix.run, args=[_stay, addresses], kwargs={"world_size": self.n, "mode": self.mode}, daemon=True
            )
            self.running.start()
            self.pipes = [listener.accept() for listener in listeners]
        return self._all(do="prepare", case=case, operation=operation, arrays=arrays, settings=settings or {})

    def run(self, case: str) -> dict[str, Any]:
        """One timed run: from when all parties are ready until all have their share of the result."""
        return self._all(do="run", case=case)

    def finish(self, case: str, output: str) -> dict[str, Any]:
        """Forget the case; its last result, revealed, is written to the file `output`."""
        return self._all(do="finish", case=case, output=output)

    def _all(self, **request: Any) -> dict[str, Any]:
        """Ask every party: the largest of each figure."""
        assert self.running is not None
        for pipe in self.pipes:
            pipe.send(request)
        answers = []
        for pipe in self.pipes:
            while not pipe.poll(0.01):
                if not self.running.is_alive():
                    raise RuntimeError(f"a party ended during {request['do']!r}")
            answers.append(pipe.recv())
            if "failed" in answers[-1]:
                raise RuntimeError(answers[-1]["failed"])
        return {key: max(answer["ok"][key] for answer in answers) for key in answers[0]["ok"]}


if __name__ == "__main__":
    serve(lambda: Runner(sys.argv[1], int(sys.argv[2])))
