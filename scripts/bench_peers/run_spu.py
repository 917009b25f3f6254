"""One party of SPU (SEMI2K, 64-bit ring, default 18 fraction bits), in SPU's own environment; see serve.py.

run_spu.py RANK PORT,PORT... LOG: the parties are joined by brpc on 127.0.0.1. The ports are as this party sees them:
its own is where it listens, the others' may be a relay's. LOG is this process's standard error, where SPU prints what
its link has sent.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import spu
from graphs import GRAPHS, Ops, evaluate
from jax import lax
from serve import peak_memory, reset_peak_memory, serve
from spu import libspu
from spu.experimental import make_cached_var
from spu.utils import frontend

_SENT = re.compile(r"Link details: total send bytes (\d+), recv bytes \d+, send actions (\d+)")
_WAIT_MS = 1_000_000
_SLOW = 5.0  # seconds; a first run that takes so long is not followed by others that are not timed


def _pool(x: Any) -> Any:
    """Max over 2x2 windows; x is NHWC."""
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def _pool_in_pairs(x: Any) -> Any:
    """The same, written as maxima of pairs, which SPU evaluates faster than its own pooling."""
    rows = jnp.maximum(x[:, ::2], x[:, 1::2])
    return jnp.maximum(rows[:, :, ::2], rows[:, :, 1::2])


def _conv(x: Any, w: Any) -> Any:
    """3x3, padding 1; x is NHWC and w HWIO."""
    return lax.conv_general_dilated(x, w, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))


OPERATIONS: dict[str, Any] = {
    "matmul": jnp.matmul,
    "conv": _conv,
    "relu": jax.nn.relu,
    "maxpool": _pool,
    "argmax": lambda x: jnp.argmax(x, axis=-1),
    "max": lambda x: jnp.max(x, axis=-1),
}


class JaxOps(Ops):
    """What graphs are made of, as JAX writes it."""

    mm, reshape, transpose = staticmethod(jnp.matmul), staticmethod(jnp.reshape), staticmethod(jnp.transpose)
    square, rsqrt = staticmethod(jnp.square), staticmethod(lax.rsqrt)
    silu, softmax = staticmethod(jax.nn.silu), staticmethod(jax.nn.softmax)  # softmax over the last dimension

    def mean(self, x: Any) -> Any:
        return jnp.mean(x, -1, keepdims=True)

    def gelu(self, x: Any) -> Any:
        return jax.nn.gelu(x, approximate=False)

    def gelu_tanh(self, x: Any) -> Any:
        return jax.nn.gelu(x, approximate=True)

    def take(self, x: Any, axis: int, start: int, stop: int) -> Any:
        return lax.slice_in_dim(x, start, stop, axis=axis)

    def concatenate(self, parts: list[Any], axis: int) -> Any:
        return jnp.concatenate(parts, axis)


def _scaled(x: Any) -> Any:
    """x over the root of its mean square."""
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)


FUNCTIONS: dict[str, Any] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "erf": lax.erf,
    "exp": jnp.exp,
    "reciprocal": lambda x: 1.0 / x,
    "rsqrt": lax.rsqrt,
    "softmax": lambda x: jax.nn.softmax(x, axis=-1),
    "layernorm": lambda x, weight, bias: _scaled(x - jnp.mean(x, -1, keepdims=True)) * weight + bias,
    "rmsnorm": lambda x, weight: _scaled(x) * weight,
    "log": jnp.log,
    "sqrt": jnp.sqrt,
    "softplus": jax.nn.softplus,
    "hardswish": jax.nn.hard_swish,
    "elu": jax.nn.elu,
    "mish": jax.nn.mish,
}
# SPU computes convolutions and pooling in NHWC; what is private is laid out so beforehand
_LAYOUT = {"x": (0, 2, 3, 1), "w": (2, 3, 1, 0)}


def _ordered(inputs: dict[str, Any]) -> list[tuple[str, Any]]:
    """By name, x first: x, weight, bias."""
    return sorted(inputs.items(), reverse=True)


def _compiled(function: Any, name: str, inputs: dict[str, Any]) -> Any:
    """SPU's executable of a function of private `inputs`, whose result it calls out0."""

    def called(*args: Any) -> Any:
        return function(*args)

    called.__name__ = re.sub(r"\W", "_", name)
    names, examples = zip(*_ordered(inputs), strict=True)
    executable, _ = frontend.compile(
        frontend.Kind.JAX, called, list(examples), {}, list(names), [libspu.Visibility.VIS_SECRET] * len(names),
        lambda outputs: [f"out{i}" for i in range(len(outputs))],
    )  # fmt: skip
    return executable


class Runner:
    """Prepares cases (an operation on given arrays, as a variant) and runs them together with the other parties."""

    def __init__(self, rank: int, ports: list[int], log: Path) -> None:
        self.rank, self.n, self.log = rank, len(ports), log
        desc = libspu.link.Desc()
        desc.id = "bench"
        desc.recv_timeout_ms = desc.http_timeout_ms = _WAIT_MS
        desc.http_max_payload_size = 32 * 1024 * 1024
        desc.connect_retry_times, desc.connect_retry_interval_ms = 300, 100
        for i, port in enumerate(ports):
            desc.add_party(f"p{i}", f"127.0.0.1:{port}")
        self.link = libspu.link.create_brpc(desc, rank)
        self.io = spu.Io(self.n, self._config(False))
        self.cases: dict[str, tuple[Any, Any]] = {}

    def prepare(
        self, case: str, operation: str, arrays: str, variant: str, settings: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Compile, share the arrays, run: once cold, once counted, once to warm up what is timed later."""
        reset_peak_memory()
        began = time.perf_counter()
        with np.load(arrays) as stored:
            inputs = {k: stored[k].astype(np.float32) for k in stored.files}
        if operation in ("conv", "maxpool"):
            inputs = {k: np.ascontiguousarray(v.transpose(_LAYOUT[k])) for k, v in inputs.items()}

        names = [name for name, _ in _ordered(inputs)]

        def function(*args: Any) -> Any:
            if variant == "cached":  # keeps the opened, masked weight for the products to come
                weights = [name == "w" or name.endswith("_w") for name in names]
                args = tuple(make_cached_var(a) if weight else a for a, weight in zip(args, weights, strict=True))
            if operation in GRAPHS:
                return evaluate(operation, JaxOps(), dict(zip(names, args, strict=True)), settings or {})
            return (_pool_in_pairs if variant == "pairs" else (OPERATIONS | FUNCTIONS)[operation])(*args)

        executable = _compiled(function, case, inputs)
        compiled = time.perf_counter()
        shares = {name: self._share(x) for name, x in _ordered(inputs)}
        shared = time.perf_counter()
        counted = self._runtime(shares, profile=True)
        first = self._timed(counted, executable)
        # what a runtime keeps of its first run is not there in the first
        warm = variant == "cached" or self._agreed(first) < _SLOW
        if warm:
            self._timed(counted, executable)
        sent = _SENT.findall(self.log.read_text(errors="replace"))
        del counted
        runtime = self._runtime(shares, profile=False)
        if warm:
            self._timed(runtime, executable)
        self.cases[case] = runtime, executable
        return {
            "compile_seconds": compiled - began,
            "share_seconds": shared - compiled,
            "first_run_seconds": first,
            "bytes_sent": int(sent[-1][0]),
            "rounds": int(sent[-1][1]),
        }

    def run(self, case: str) -> dict[str, float]:
        """One timed run: from when all parties are ready until all have their share of the result."""
        return {"seconds": self._timed(*self.cases[case])}

    def finish(self, case: str, output: str) -> dict[str, int]:
        """Forget the case; rank 0 writes its last result, revealed, to the file `output`."""
        runtime, _ = self.cases.pop(case)
        value = self._reveal(runtime)
        if value is not None:
            np.save(output, value.transpose(0, 3, 1, 2) if value.ndim == 4 else value)
        return {"peak_rss_bytes": peak_memory()}

    def evaluate(self, function: str, arrays: str, output: str) -> None:
        """Share the arrays, evaluate a function once; rank 0 writes the result, revealed, to the file `output`."""
        with np.load(arrays) as stored:
            inputs = {k: stored[k].astype(np.float32) for k in stored.files}
        executable = _compiled(FUNCTIONS[function], function, inputs)
        runtime = self._runtime({name: self._share(x) for name, x in _ordered(inputs)}, profile=False)
        runtime.run(executable)
        value = self._reveal(runtime)
        if value is not None:
            np.save(output, value)

    def _reveal(self, runtime: Any) -> Any:
        """The result, float64, at rank 0; None at the others."""
        result = runtime.get_var("out0")
        own = [result.meta, *result.share_chunks]
        if self.rank:
            self._send(0, own)
            return None
        every = [own, *(self._receive(peer) for peer in range(1, self.n))]
        return np.asarray(self.io.reconstruct([self._build(parts) for parts in every]), np.float64)

    def _config(self, profile: bool) -> Any:
        config = libspu.RuntimeConfig(protocol=libspu.ProtocolKind.SEMI2K, field=libspu.FieldType.FM64)
        config.enable_pphlo_profile = profile  # prints what the link sent
        return config

    def _runtime(self, shares: dict[str, Any], profile: bool) -> Any:
        runtime = spu.Runtime(self.link, self._config(profile))
        for name, share in shares.items():
            runtime.set_var(name, share)
        return runtime

    def _timed(self, runtime: Any, executable: Any) -> float:
        self.link.barrier()
        began = time.perf_counter()
        runtime.run(executable)
        self.link.barrier()
        return time.perf_counter() - began

    def _agreed(self, value: float) -> float:
        """What rank 0 says, since all must do the same."""
        if self.rank:
            return float(self.link.recv(0))
        for peer in range(1, self.n):
            self.link.send(peer, repr(value).encode())
        return value

    def _share(self, x: Any) -> Any:
        if self.rank:
            return self._build(self._receive(0))
        shares = self.io.make_shares(x, libspu.Visibility.VIS_SECRET)
        for peer in range(1, self.n):
            self._send(peer, [shares[peer].meta, *shares[peer].share_chunks])
        return shares[0]

    def _send(self, peer: int, parts: list[bytes]) -> None:
        self.link.send(peer, json.dumps(len(parts)).encode())
        for part in parts:
            self.link.send(peer, part)

    def _receive(self, peer: int) -> list[bytes]:
        return [self.link.recv(peer) for _ in range(json.loads(self.link.recv(peer)))]

    @staticmethod
    def _build(parts: list[bytes]) -> Any:
        share = libspu.Share()
        share.meta, share.share_chunks = parts[0], parts[1:]
        return share


if __name__ == "__main__":
    serve(lambda: Runner(int(sys.argv[1]), [int(port) for port in sys.argv[2].split(",")], Path(sys.argv[3])))
