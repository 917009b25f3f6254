"""One party of CrypTen (default configuration: party 0 deals, 16 fraction bits), in its own environment; see serve.py.

run_crypten.py RANK PARTIES RENDEZVOUS [RATE DELAY]: the parties are joined by torch.distributed's gloo over TCP on the
loopback device, through relays if there are a rate and a delay for them; RENDEZVOUS is a file that does not exist yet.

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
from graphs import GRAPHS, TensorOps, evaluate
from reroute import reroute
from serve import peak_memory, reset_peak_memory, serve

_MISSING = (
    "torch.onnx._internal.registration",
    "torch.onnx.symbolic_registry",
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.transforms",
)


_ALL_POSITIVE = {"functions.reciprocal_all_pos": True}  # as is all that is inverted here


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
    "max": lambda x: x.max(dim=-1, one_hot=False)[0],
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


class CrypTenOps(TensorOps):
    """What graphs are made of; public operands of + and * are torch tensors, see `accept_arrays`."""

    def gelu(self, x: Any) -> Any:
        return _gelu(x)

    gelu_tanh = gelu

    def silu(self, x: Any) -> Any:
        return x * x.sigmoid()

    def concatenate(self, parts: list[Any], axis: int) -> Any:
        import crypten

        return crypten.cat(parts, dim=axis)


def accept_arrays(tensor: Any) -> None:
    """Make the class of private tensors take numpy arrays as public operands."""

    def taking(method: Any) -> Any:
        return lambda self, y: method(self, torch.from_numpy(y) if isinstance(y, np.ndarray) else y)

    for name in ("add", "sub", "mul"):
        method = taking(getattr(tensor, name))
        setattr(tensor, name, method)
        setattr(tensor, f"__{name}__", method)


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
        accept_arrays(crypten.mpc.MPCTensor)
        self.rank, self.crypten = rank, crypten
        self.cases: dict[str, tuple[Any, list[Any], Any]] = {}

    def prepare(
        self, case: str, operation: str, arrays: str, variant: str, settings: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Share the arrays, run: once cold, once counted."""
        reset_peak_memory()
        began = time.perf_counter()
        with np.load(arrays) as stored:
            names = sorted(stored.files, reverse=True)  # x before w
            private = [self.crypten.cryptensor(torch.from_numpy(stored[k]), src=0) for k in names]
        shared = time.perf_counter()

        def graph(*args: Any) -> Any:
            return evaluate(operation, CrypTenOps(), dict(zip(names, args, strict=True)), settings or {})

        function = graph if operation in GRAPHS else (OPERATIONS | FUNCTIONS)[operation]
        self.cases[case] = _pool_in_pairs if variant == "pairs" else function, private, None
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
        with self.crypten.no_grad(), self.crypten.cfg.temp_override(_ALL_POSITIVE):
            result = operation(*private)
        torch.distributed.barrier()
        seconds = time.perf_counter() - began
        self.cases[case] = operation, private, result
        return {"seconds": seconds}

    def finish(self, case: str, output: str) -> dict[str, int]:
        """Forget the case; rank 0 writes its last result, revealed, to the file `output`; see `_decoded`."""
        result = self.cases.pop(case)[2]
        value, misread = self._decoded(result), result.get_plain_text().double().numpy()
        if self.rank == 0:
            np.save(output, value)
        return {"peak_rss_bytes": peak_memory(), "misread": int((np.abs(value - misread) > 0.5).sum())}

    def evaluate(self, function: str, arrays: str, output: str) -> None:
        """Share the arrays, evaluate a function once; rank 0 writes the result, revealed, to the file `output`."""
        with np.load(arrays) as stored:
            names = sorted(stored.files, reverse=True)  # x, weight, bias
            private = [self.crypten.cryptensor(torch.from_numpy(stored[k]), src=0) for k in names]
        with self.crypten.no_grad(), self.crypten.cfg.temp_override(_ALL_POSITIVE):
            result = FUNCTIONS[function](*private)
        value = self._decoded(result)
        if self.rank == 0:
            np.save(output, value)

    @staticmethod
    def _decoded(result: Any) -> Any:
        """The revealed value; CrypTen's own decoder is off by one for some negative numbers just above an integer."""
        return result.reveal().double().numpy() / result.encoder.scale


if __name__ == "__main__":
    if sys.argv[4:]:
        reroute(*sys.argv[4:])
    serve(lambda: Runner(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
