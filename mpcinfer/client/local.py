"""A whole cluster on this machine, every party and the dealer a process of its own: for demos, tests and benchmarks.

Everything is as on several machines (keys, mutual TLS, pins, an encrypted store each), except that one directory and
one user hold it all, so that nothing is protected from that user.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Self

import mpcinfer
from mpcinfer.client import certs
from mpcinfer.client.status import wait_until_ready
from mpcinfer.config import Cluster, Limits
from mpcinfer.errors import ConfigError, UnavailableError
from mpcinfer.wire.identity import Identity

AnyPath = str | os.PathLike[str]

_KILL_AFTER = 5.0  # seconds, on top of the grace that a process itself gives its calls
_LOG_LINES = 8
# Below the range from which the system takes ports for outgoing connections, which would come in between.
_PORTS = range(20000, 32000)


class LocalCluster:
    """A dealer, n parties and maybe witnesses as processes. A context manager: ready inside, stopped after it.

    `directory`, `cluster_path`, `cluster`; `logs` is where each role's output goes; `identity("client/client")` is
    what to connect with.
    """

    def __init__(
        self,
        directory: AnyPath | None = None,
        *,
        parties: int | None = None,
        owners: Sequence[str] = ("owner",),
        clients: Sequence[str] = ("client",),
        base_port: int | None = None,
        limits: Mapping[str, float] | None = None,
        log_level: str = "info",
        via: Callable[[str, int], int] | None = None,
        witnesses: bool = False,
    ) -> None:
        """Make in `directory` what is missing of keys, certificates and TOML files; start nothing yet.

        directory: an empty or new one, or that of an earlier local cluster, which is used again with its models
        (default: a temporary one, removed at `stop`). parties: 2 by default. base_port: party I listens there + I,
        the dealer after them (default: ports that are free now). limits: the [limits] of new node files. via: told a
        role and a port of 127.0.0.1 that it will listen on, says by which port others reach it; for what stands in
        between, such as the slower network of a benchmark. witnesses: one for each party of a new cluster; an existing
        one has those that it was made with.
        ConfigError if the directory holds something else, IdentityError if its certificates cannot be used.
        """
        self._temporary = directory is None
        self.directory = Path(tempfile.mkdtemp(prefix="mpcinfer-") if directory is None else directory).absolute()
        self.cluster_path = self.directory / "cluster.toml"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._ports: dict[str, list[str]] = {}  # what node files say of ports, where that is not in the cluster file
        try:
            if not self.cluster_path.exists():
                self._make(parties or 2, base_port, via, witnesses)
            self.cluster = Cluster.load(self.cluster_path)
            if parties not in (None, self.cluster.n):
                raise ConfigError(f"{self.directory} holds a cluster of {self.cluster.n} parties, not {parties}")
            self._roles = ["dealer", *(endpoint.role for endpoint in self.cluster.holders)]
            for role in self._roles:
                self._write_node_file(role, limits or {}, log_level)
            people = [*(f"owner/{name}" for name in owners), *(f"client/{name}" for name in clients)]
            for role in people:
                if not (self.directory / f"{certs.file_stem(role)}.pem").exists():
                    self._issue(self.cluster.name, role)
            if not people:
                raise ConfigError("a local cluster needs an owner or a client, to see whether the parties are ready")
            self._observer = people[-1]
        except BaseException:
            self._clean_up()
            raise

    @property
    def logs(self) -> dict[str, Path]:
        """The file with the output of each role."""
        return {role: self.directory / "logs" / f"{certs.file_stem(role)}.log" for role in self._roles}

    def identity(self, role: str) -> Path:
        """Where the key pair of "owner/NAME" or "client/NAME" is, without suffix."""
        return self.directory / certs.file_stem(role)

    def pid(self, role: str) -> int:
        """The process id of "party/I" or "dealer"."""
        return self._processes[role].pid

    def start(self, *, timeout: float = 120.0) -> None:
        """Start the processes that do not run, and wait until every party is ready.

        UnavailableError with the last log lines if one ends, or if they are not ready after `timeout` seconds; all
        are stopped then.
        """
        try:
            for role in self._roles:
                if role not in self._processes:
                    self._spawn(role)
            self.wait_until_ready(timeout=timeout)
        except BaseException:
            self.stop()
            raise

    def wait_until_ready(self, *, timeout: float = 120.0) -> None:
        """Wait until every party says it is ready; UnavailableError as in `start`, but stops nothing."""
        stem = self.identity(self._observer)
        observer = Identity.load(f"{stem}.key", f"{stem}.pem")
        wait_until_ready(self.cluster, observer, timeout=timeout, check=self.check)

    def check(self) -> None:
        """UnavailableError with the last log lines if a process has ended that nobody stopped."""
        with self._lock:
            ended = [(role, process.poll()) for role, process in self._processes.items()]
        for role, code in ended:
            if code is not None:
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                raise UnavailableError(f"{role} {how}; its log ({self.logs[role]}) ends with:\n{self.last_lines(role)}")

    def watch(self, interval: float = 0.2) -> None:
        """Check for ever; returns only by an exception."""
        while True:
            self.check()
            time.sleep(interval)

    def last_lines(self, role: str, count: int = _LOG_LINES) -> str:
        """The end of the log of a role."""
        path = self.logs[role]
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "\n".join(lines[-count:]) or "(nothing)"

    def kill(self, role: str) -> None:
        """End a process at once, as a power failure would, and wait until it is gone."""
        self._end(role, grace=0)

    def restart(self, role: str, *, ready_timeout: float | None = 120.0) -> None:
        """Start a process that was killed, or stop and start one that runs, and wait until all parties are ready.

        `ready_timeout` None: do not wait.
        """
        if role in self._processes:
            self._end(role, grace=Limits().stop_grace_s + _KILL_AFTER)
        self._spawn(role)
        if ready_timeout is not None:
            self.wait_until_ready(timeout=ready_timeout)

    def stop(self) -> dict[str, int]:
        """Stop all processes, giving each time to finish what it is at: their exit codes by role."""
        with self._lock:
            processes, self._processes = self._processes, {}
        deadline = time.monotonic() + Limits().stop_grace_s + _KILL_AFTER
        try:
            for process in processes.values():
                process.terminate()
            for process in processes.values():
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
        finally:
            for process in processes.values():
                if process.poll() is None:
                    process.kill()
                _reap(process)
            self._clean_up()
        return {role: process.returncode for role, process in processes.items()}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _spawn(self, role: str) -> None:
        config = self.directory / f"{certs.file_stem(role)}.toml"
        kind, _, index = role.partition("/")
        # which of the two it is, a witness must be told
        what = ["party", "--witness-of", index] if kind == "witness" else [kind]
        # A fresh interpreter, not a fork: nothing of this process, which may hold a model, is in its memory. It stops
        # when its standard input ends, that is also when this process is killed.
        command = [sys.executable, "-P", "-m", "mpcinfer", *what, "--config", str(config), "--stop-at-eof"]
        log = self.logs[role]
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,  # Ctrl-C in a terminal is for this process, which then stops the others
            )
        with self._lock:
            self._processes[role] = process

    def _end(self, role: str, grace: float) -> None:
        with self._lock:
            process = self._processes.pop(role)
        if grace:
            process.terminate()
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                pass
        process.kill()
        _reap(process)

    def _make(
        self, parties: int, base_port: int | None, via: Callable[[str, int], int] | None, witnesses: bool
    ) -> None:
        if self.directory.exists() and any(self.directory.iterdir()):
            raise ConfigError(f"{self.directory} is not empty and holds no cluster.toml; choose another directory")
        name = "local"
        self.directory.mkdir(parents=True, exist_ok=True)
        _, ca = certs.init_ca(self.directory, name)
        roles = [*(f"party/{index}" for index in range(parties)), "dealer"]
        roles += [f"witness/{index}" for index in range(parties if witnesses else 0)]
        ports = _free_ports(len(roles)) if base_port is None else list(range(base_port, base_port + len(roles)))
        if via is not None:
            ports = self._mapped(dict(zip(roles, ports, strict=True)), via)
        entries = [(f"127.0.0.1:{port}", self._issue(name, role)) for port, role in zip(ports, roles, strict=True)]
        watching = dict(enumerate(entries[parties + 1 :]))
        certs.write_cluster_file(
            self.cluster_path, name, ca, parties=entries[:parties], dealer=entries[parties], witnesses=watching
        )

    def _mapped(self, ports: Mapping[str, int], via: Callable[[str, int], int]) -> list[int]:
        """By which ports the roles are reached, when they listen on `ports`, and the parties on one more each."""
        peer_ports = [port for port in _free_ports(2 * len(ports)) if port not in ports.values()]
        for role, port in ports.items():
            self._ports[role] = [f'listen = "127.0.0.1:{port}"']
            if role != "dealer":
                peer = peer_ports.pop()
                self._ports[role] += [f"peer_port = {peer}", f"peer_advertised_port = {via(role, peer)}"]
        return [via(role, port) for role, port in ports.items()]

    def _issue(self, name: str, role: str) -> Path:
        """A key and certificate for `role`, by the same two steps as between machines."""
        _, request = certs.request(self.directory, name, role)
        certificate = self.directory / f"{certs.file_stem(role)}.pem"
        return certs.sign(self.directory, request, role, certificate)

    def _write_node_file(self, role: str, limits: Mapping[str, float], log_level: str) -> None:
        stem = certs.file_stem(role)
        path = self.directory / f"{stem}.toml"
        if path.exists():
            return
        unknown = set(limits) - {field.name for field in fields(Limits)}
        if unknown:
            raise ConfigError(f"unknown limits: {', '.join(sorted(unknown))}")
        lines = [
            'cluster = "cluster.toml"',
            f'role = "{role}"',
            f'key = "{stem}.key"',
            f'certificate = "{stem}.pem"',
            f'log_level = "{log_level}"',
            'operator = "whoever started this cluster on one machine"',
            *self._ports.get(role, ()),
        ]
        if role != "dealer":
            lines += [f'store = "{stem}-store"', f'store_key = "{stem}-store.key"']
        lines += ["", "[limits]", *(f"{name} = {value}" for name, value in limits.items()), ""]
        path.write_text("\n".join(lines))

    def _clean_up(self) -> None:
        if self._temporary:
            shutil.rmtree(self.directory, ignore_errors=True)


def _environment() -> dict[str, str]:
    """This process's environment, with this very package importable, and nothing that overrides the node files."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MPCINFER_LISTEN", "MPCINFER_STORE")}
    package = str(Path(mpcinfer.__file__).absolute().parents[1])
    inherited = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([package, inherited] if inherited else [package])
    return environment


def _reap(process: subprocess.Popen[bytes]) -> None:
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _free_ports(count: int) -> list[int]:
    """`count` different ports of 127.0.0.1 that are free now."""
    with ExitStack() as stack:
        found: list[int] = []
        for _ in range(1000):
            port = secrets.choice(_PORTS)
            probe = stack.enter_context(socket.socket())
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
            if len(found) == count:
                return found
    raise ConfigError(f"no {count} free ports from {_PORTS.start} to {_PORTS.stop}; choose base_port")
