"""All parties of PriX in one of its modes (lut is its default; 16 fraction bits), in its own environment; see serve.py.

run_prix.py MODE PARTIES. One process that forks the parties anew for every request, which is how `prix.run` works: they
talk through shared memory. Its mode for several machines does not start with the jax that belongs to it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Each request is new processes, which would compile everything anew.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(sys.prefix, "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import numpy as np
import prix
from serve import serve

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


def _party(function: str, arrays: str, output: str) -> None:
    """What each of the forked processes does; rank 0 writes the file, or why there is none, as `prix.run` won't say."""
    rank = prix.comm.get().get_rank()
    try:
        with np.load(arrays) as stored:
            private = [
                prix.array(stored[name], src=0) for name in sorted(stored.files, reverse=True)
            ]  # x, weight, bias
        result = FUNCTIONS[function](*private)
        encoded = np.asarray(result.reveal(), np.float64)
        if rank == 0:
            np.save(output, encoded / result.scale)
    except Exception as error:
        if rank == 0:
            Path(output).with_suffix(".txt").write_text(f"{type(error).__name__}: {error}")
        raise


class Runner:
    """Evaluates functions on given arrays."""

    def __init__(self, mode: str, parties: int) -> None:
        self.mode, self.n = mode, parties

    def evaluate(self, function: str, arrays: str, output: str) -> None:
        """Share the arrays, evaluate a function once; the result, revealed, is written to the file `output`."""
        reason = Path(output).with_suffix(".txt")
        reason.unlink(missing_ok=True)
        try:
            prix.run(_party, function, arrays, output, world_size=self.n, mode=self.mode)
        except RuntimeError as error:
            raise RuntimeError(reason.read_text() if reason.exists() else str(error)) from error


if __name__ == "__main__":
    serve(lambda: Runner(sys.argv[1], int(sys.argv[2])))
