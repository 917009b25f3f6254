"""Our side of the peers: their environments, installed once, and their parties as processes that answer requests.

Nothing of a peer is ever imported here.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assets import CACHE
from bench_network import Relay

from mpcinfer.graph.explain import Network

HERE = Path(__file__).parent
INSTALL_TIMEOUT = 1800.0  # seconds, for each call of pip


class PeerFailed(Exception):
    """A peer could not be installed, crashed, answered with an error or not in time; the text says which."""


@dataclass(frozen=True)
class Peer:
    """What to install (steps of pip arguments, one after the other), and what of it can be run.

    `package` names the environment and the runner; peers of one package are configurations of it.
    """

    name: str
    package: str
    version: str
    python: str
    frac_bits: int
    steps: tuple[tuple[str, ...], ...]
    variants: dict[str, tuple[str, ...]]  # ways to do an operation that has more than one; what counts is the fastest
    lacks: tuple[str, ...] = ()  # functions it does not have
    large_bytes: int = 0  # what large workloads take of memory, at least, all parties together

    def ways(self, operation: str) -> tuple[str, ...]:
        """The variants of an operation."""
        return self.variants.get(operation, ("default",))


PEERS = {
    # its wheels are for CPython 3.10 and 3.11
    "spu": Peer(
        "spu",
        "spu",
        "0.9.5",
        "3.11",
        18,
        (("spu==0.9.5", "numpy"),),
        {"maxpool": ("default", "pairs")}
        | {operation: ("default", "cached") for operation in ("matmul", "conv", "gpt2", "bert", "llama")},
    ),
    # it asks for `sklearn`, a package that refuses to be installed, so what it needs is listed here
    "crypten": Peer(
        "crypten",
        "crypten",
        "0.4.1",
        "3.11",
        16,
        (
            tuple("torch>=2.13,<2.14 numpy scipy omegaconf pyyaml future onnx tensorboard scikit-learn pandas".split()),
            ("--no-deps", "crypten==0.4.1"),
        ),
        {"maxpool": ("default", "pairs")},
        lacks=("softplus", "hardswish", "elu", "mish"),
        large_bytes=16 << 30,  # with ours it did not fit into 24 GB
    ),
    # one peer for each of its modes: they share no method; its parties are one process, see run_prix.py
    **{
        f"prix-{mode}": Peer(
            f"prix-{mode}",
            "prix",
            "0.2.0",
            "3.11",
            16,
            (("prix-jax==0.2.0", "numpy"),),
            {},
            lacks=("softplus", "hardswish", "elu", "mish"),
        )
        for mode in ("lut", "shaft", "crypten")
    },
}
SOCKETS = ("spu", "crypten")  # what runs over sockets, as we do


def install(peer: Peer) -> Path:
    """The interpreter of the peer's environment, which is made if it is not there yet. PeerFailed if that fails."""
    home = CACHE / "peers" / peer.package
    interpreter, stamp = home / "bin" / "python", home / ".installed"
    wanted = json.dumps(peer.steps)
    home.parent.mkdir(parents=True, exist_ok=True)
    with (home.parent / f"{peer.package}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two benchmarks must not install into one environment at once
        if stamp.exists() and stamp.read_text() == wanted:
            return interpreter
        if not interpreter.exists():
            _quietly(_python(peer.python), "-m", "venv", "--clear", str(home))
        for step in peer.steps:
            _quietly(str(interpreter), "-m", "pip", "install", "-q", "--disable-pip-version-check", *step)
        stamp.write_text(wanted)
    return interpreter


def _python(version: str) -> str:
    """A Python interpreter of this version."""
    if sys.version_info[:2] == tuple(int(part) for part in version.split(".")):
        return sys.executable
    found = shutil.which(f"python{version}")
    if found is None:
        raise PeerFailed(f"needs Python {version}, which is not on the PATH")
    return found


def _quietly(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise PeerFailed(f"installing took more than {INSTALL_TIMEOUT:.0f} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise PeerFailed(f"could not be installed: {lines[-1] if lines else 'no reason given'}")


class Parties:
    """The parties of one peer, a process each; PriX's are one process that forks them.

    `call` asks all of them; after a PeerFailed they are gone.

    A context manager; processes are started by the first call and again by the first after a failure.
    """

    def __init__(self, peer: Peer, parties: int, network: Network | None = None) -> None:
        self.peer, self.n, self.network = peer, parties, network
        self._relay: Relay | None = None
        self.starts = 0  # how often the processes were started; what was prepared before the last time is gone
        self._count = 1 if peer.package == "prix" else parties
        self._interpreter: Path | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._received: list[bytes] = []
        self._directory: Path | None = None
        self._broken = ""  # why it cannot be installed; not tried again

    def install(self) -> Path:
        """Its interpreter, installed if need be; PeerFailed, the same at every call, if that failed."""
        if self._broken:
            raise PeerFailed(self._broken)
        try:
            self._interpreter = self._interpreter or install(self.peer)
        except PeerFailed as error:
            self._broken = str(error)
            raise
        return self._interpreter

    def call(self, do: str, timeout: float, **arguments: Any) -> list[Any]:
        """Ask every party to do something at the same time: their results, by rank."""
        if not self._processes:
            self._start()
        deadline = time.monotonic() + timeout
        try:
            request = json.dumps({"do": do, **arguments}).encode() + b"\n"
            for process in self._processes:
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError):  # it has ended: reading its answer tells how
                    process.stdin.write(request)
                    process.stdin.flush()
            return [self._answer(rank, do, deadline, timeout) for rank in range(self._count)]
        except BaseException:
            self.stop()
            raise

    def _answer(self, rank: int, do: str, deadline: float, timeout: float) -> Any:
        process = self._processes[rank]
        assert process.stdout is not None
        while b"\n" not in self._received[rank]:
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise PeerFailed(f"no answer to {do!r} in {timeout:.0f} s")
            part = os.read(process.stdout.fileno(), 65536)
            if not part:
                raise PeerFailed(f"party {rank} ended with exit code {process.wait()} during {do!r}{self._last(rank)}")
            self._received[rank] += part
        line, _, self._received[rank] = self._received[rank].partition(b"\n")
        answer = json.loads(line)
        if "failed" in answer:
            raise PeerFailed(answer["failed"])
        return answer["ok"]

    def _last(self, rank: int) -> str:
        assert self._directory is not None
        lines = (self._directory / f"{rank}.log").read_text(errors="replace").splitlines()
        return f": {lines[-1][:200]}" if lines else ""

    def _start(self) -> None:
        interpreter = self.install()
        self.starts += 1
        if self.network is not None and self.peer.package == "prix":
            raise PeerFailed("its parties share memory, so that no network can be put between them")
        self._directory = directory = Path(tempfile.mkdtemp(prefix=f"bench-{self.peer.name}-"))
        self._received = [b""] * self._count
        ports = _free_ports(self.n)
        reached = self._reached(ports)
        network = [str(self.network.bandwidth), str(self.network.round_trip / 2)] if self.network else []
        for rank in range(self._count):
            log = directory / f"{rank}.log"
            seen = ",".join(str(ports[i] if i == rank else reached[i]) for i in range(self.n))
            arguments = {
                "spu": [str(rank), seen, str(log)],
                "crypten": [str(rank), str(self.n), str(directory / "rendezvous"), *network],  # has relays of its own
                "prix": [self.peer.name.partition("-")[2], str(self.n)],
            }[self.peer.package]
            with log.open("ab") as errors:
                self._processes.append(
                    subprocess.Popen(
                        [str(interpreter), str(HERE / f"run_{self.peer.package}.py"), *arguments],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        env={k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")},
                        start_new_session=True,
                    )
                )

    def _reached(self, ports: list[int]) -> list[int]:
        """By which ports the others reach the one that listens on each."""
        if self.network is None or self.peer.package != "spu":
            return ports
        self._relay = Relay(self.network)
        return [self._relay.route(f"party {i}", port) for i, port in enumerate(ports)]

    def stop(self) -> None:
        """End the processes, if there are any."""
        processes, self._processes = self._processes, []
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a session of its own, see start_new_session
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        if self._relay is not None:
            self._relay.__exit__()
            self._relay = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def __enter__(self) -> Parties:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
