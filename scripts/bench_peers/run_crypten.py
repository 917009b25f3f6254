"""One party of CrypTen (default configuration: party 0 deals, 16 fraction bits), in its own environment; see serve.py.

run_crypten.py RANK PARTIES RENDEZVOUS: the parties are joined by torch.distributed's gloo over TCP on the loopback
device; RENDEZVOUS is a file that does not exist yet.

`import crypten` wants parts of torch.onnx that current torch no longer has, and torchvision. Its ONNX converter and its
examples use them, nothing here does: empty modules stand in for them.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
import types
import warnings
from typing import Any

import numpy as np
import torch
import torch.distributed
from serve import peak_memory, reset_peak_memory, serve

_MISSING = (
    "torch.onnx._internal.registration",
    "torch.onnx.symbolic_registry",
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.transforms",
)


def _larger(a: Any, b: Any) -> Any:
    return b + (a - b).relu()


def _pool_in_pairs(x: Any) -> Any:
    """Max over 2x2 windows as maxima of pairs; CrypTen's own pooling costs many times as much."""
    rows = _larger(x[:, :, ::2], x[:, :, 1::2])
    return _larger(rows[:, :, :, ::2], rows[:, :, :, 1::2])


OPERATIONS: dict[str, Any] = {
    "matmul": lambda x, w: x.matmul(w),
    "conv": lambda x, w: x.conv2d(w, padding=1),
    "relu": lambda x: x.relu(),
    "maxpool": lambda x: x.max_pool2d(2, stride=2),
    "argmax": lambda x: x.argmax(dim=-1, one_hot=False),
}


def _scaled(x: Any) -> Any:
    """x over the root of its mean square."""
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).inv_sqrt()


def _layernorm(x: Any, weight: Any, bias: Any) -> Any:
    centred = x - x.mean(-1, keepdim=True)
    return _scaled(centred) * weight + bias


def _gelu(x: Any) -> Any:
    """The tanh form, which stands for the erf form too: CrypTen's erf is a series that diverges from about 3 on."""
    return x * (((x + x * x.square() * 0.044715) * (2 / math.pi) ** 0.5).tanh() + 1) * 0.5


# What it has no function for is written with those it has.
FUNCTIONS: dict[str, Any] = {
    "relu": lambda x: x.relu(),
    "gelu": _gelu,
    "gelu_tanh": _gelu,
    "silu": lambda x: x * x.sigmoid(),
    "sigmoid": lambda x: x.sigmoid(),
    "tanh": lambda x: x.tanh(),
    "erf": lambda x: x.erf(),
    "exp": lambda x: x.exp(),
    "reciprocal": lambda x: x.reciprocal(),
    "rsqrt": lambda x: x.inv_sqrt(),
    "softmax": lambda x: x.softmax(-1),
    "layernorm": _layernorm,
    "rmsnorm": lambda x, weight: _scaled(x) * weight,
    "log": lambda x: x.log(),
    "sqrt": lambda x: x.sqrt(),
}


class Runner:
    """Prepares cases (an operation on given arrays) and runs them together with the other parties."""

    def __init__(self, rank: int, parties: int, rendezvous: str) -> None:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(parties),
            RENDEZVOUS=f"file://{rendezvous}",
            DISTRIBUTED_BACKEND="gloo",
            GLOO_SOCKET_IFNAME="lo",
        )
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        for name in _MISSING:
            sys.modules.setdefault(name, types.ModuleType(name))
        import crypten

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // parties))
        crypten.init()
        self.rank, self.crypten = rank, crypten
        self.cases: dict[str, tuple[Any, list[Any], Any]] = {}

    def prepare(self, case: str, operation: str, arrays: str, variant: str) -> dict[str, Any]:
        """Share the arrays, run: once cold, once counted."""
        reset_peak_memory()
        began = time.perf_counter()
        with np.load(arrays) as stored:
            names = sorted(stored.files, reverse=True)  # x before w
            private = [self.crypten.cryptensor(torch.from_numpy(stored[k]), src=0) for k in names]
        shared = time.perf_counter()
        self.cases[case] = _pool_in_pairs if variant == "pairs" else OPERATIONS[operation], private, None
        first = self.run(case)["seconds"]
        communicator = self.crypten.communicator.get()
        self.crypten.cfg.communicator.verbose = True
        communicator.reset_communication_stats()
        self.run(case)
        statistics = communicator.get_communication_stats()
        self.crypten.cfg.communicator.verbose = False
        return {
            "share_seconds": shared - began,
            "first_run_seconds": first,
            "bytes_sent": int(statistics["bytes"] / 2),  # it counts sent and received
            "rounds": int(statistics["rounds"]),
        }

    def run(self, case: str) -> dict[str, float]:
        """One timed run: from when all parties are ready until all have their share of the result."""
        operation, private, _ = self.cases[case]
        torch.distributed.barrier()
        began = time.perf_counter()
        with self.crypten.no_grad():
            result = operation(*private)
        torch.distributed.barrier()
        seconds = time.perf_counter() - began
        self.cases[case] = operation, private, result
        return {"seconds": seconds}

    def finish(self, case: str, output: str) -> dict[str, int]:
        """Forget the case; rank 0 writes its last result, revealed, to the file `output`."""
        result = self.cases.pop(case)[2].get_plain_text()
        if self.rank == 0:
            np.save(output, result.double().numpy())
        return {"peak_rss_bytes": peak_memory()}

    def evaluate(self, function: str, arrays: str, output: str) -> None:
        """Share the arrays, evaluate a function once; rank 0 writes the result, revealed, to the file `output`.

        It is decoded here: CrypTen's own decoder is off by one for some negative numbers just above an integer.
        """
        with np.load(arrays) as stored:
            names = sorted(stored.files, reverse=True)  # x, weight, bias
            private = [self.crypten.cryptensor(torch.from_numpy(stored[k]), src=0) for k in names]
        all_positive = {"functions.reciprocal_all_pos": True}  # as are the points of the reciprocal
        with self.crypten.no_grad(), self.crypten.cfg.temp_override(all_positive):
            result = FUNCTIONS[function](*private)
        encoded = result.reveal()
        if self.rank == 0:
            np.save(output, encoded.double().numpy() / result.encoder.scale)


if __name__ == "__main__":
    serve(lambda: Runner(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
