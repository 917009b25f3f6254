"""docs/operate.md, followed to the letter: every member on a machine of its own, as far as one machine can be several.

A machine is a network namespace with the address that the page gives it, in which the page's directory is this
member's own and the others' directories do not exist. What `scp` sends is carried by the test, which looks at it.
"""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "operate.md"
HOME = Path("/srv/mpcinfer")  # where the page has everybody work
ADDRESSES = {
    "ca": "10.20.0.2",
    "dealer": "10.20.0.9",
    "party-0": "10.20.0.10",
    "party-1": "10.20.0.11",
    "alice": "10.20.0.20",
    "bob": "10.20.0.30",
}
PORT = 7100
RETRY_SECONDS = 180.0  # the first start may have to compile the kernels


# --- the page ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A block of the page with its host and flags, or a `<!-- test: ACTION HOST -->`, whose action is its flag."""

    host: str
    flags: frozenset[str]
    script: str = ""


def steps() -> list[Step]:
    """What the page tells its readers to do, in order."""
    found = []
    pattern = r"^```sh on=(\S+)([^\n]*)\n(.*?)^```$|^<!-- test: (\w+) (\S+) -->$"
    for host, flags, script, action, target in re.findall(pattern, PAGE.read_text(), re.MULTILINE | re.DOTALL):
        found.append(Step(host or target, frozenset(flags.split() or [action]) - {""}, script))
    return found


def table(title: str) -> list[list[str]]:
    """The cells of the body of the first table in the section with this title."""
    section = PAGE.read_text().partition(f". {title}\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_every_block_for_a_host_is_a_step() -> None:
    """No typing error in a marker makes a block silently untested."""
    blocks = re.findall(r"^```(\S*)(.*)$", PAGE.read_text(), re.MULTILINE)
    assert [kind for kind, rest in blocks if kind not in ("sh", "text", "ini", "toml", "")] == []
    assert sum(kind == "sh" for kind, _ in blocks) == sum(bool(step.script) for step in steps()) > 20
    assert {step.host for step in steps()} == set(ADDRESSES)
    allowed = [{"start"}, {"retry"}, {"restart"}, {"stop"}, set()]
    assert [step for step in steps() if set(step.flags) not in allowed] == []


def test_the_troubleshooting_table_quotes_what_the_programs_say() -> None:
    sources = "\n".join(path.read_text() for path in sorted((ROOT / "mpcinfer").rglob("*.py")))
    text = re.sub(r'"\s*\n\s*f?"', "", sources)  # strings written in several parts
    quoted = [re.fullmatch("`(.*)`", row[0]) for row in table("When something is wrong")]
    assert len(quoted) > 20
    assert [match and match[1] for match in quoted if match is None or match[1] not in text] == []


def test_the_table_of_limits_is_complete() -> None:
    from mpcinfer.config import Limits

    page = PAGE.read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([0-9.]+) \|", page, re.MULTILINE)
    assert {name: float(value) for name, value in rows} == {k: float(v) for k, v in vars(Limits()).items()}


def test_the_unit_starts_what_the_page_starts_by_hand() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    (text,) = re.findall(r"^```ini\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    unit.read_string(text)
    program, *arguments = unit["Service"]["ExecStart"].split()
    assert program.endswith("/mpcinfer")
    by_hand = [
        step.script.split() for step in steps() if step.flags == {"start"} and step.host == "party-0" and step.script
    ]
    assert by_hand == [["mpcinfer", *(argument.removeprefix(f"{HOME}/") for argument in arguments)]]
    assert unit["Service"]["ReadWritePaths"] == str(HOME)
    assert unit["Service"]["Environment"].startswith(f"NUMBA_CACHE_DIR={HOME}/")


# --- the machines ------------------------------------------------------------------------------------------------


def run(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert not check or done.returncode == 0, f"{command}: {done.stderr}"
    return done


def require_namespaces() -> None:
    """Skip, loudly, where this test cannot run."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("NOT ROOT ON LINUX: docs/operate.md is NOT tested; run this test as root")
    if shutil.which("ip") is None and shutil.which("apt-get") is not None:
        run("apt-get", "install", "-y", "-q", "iproute2", check=False)
    if shutil.which("ip") is None:
        pytest.skip("`ip` IS MISSING: docs/operate.md is NOT tested; install iproute2")
    name = f"mpc-{os.getpid()}-probe"
    made = run("ip", "netns", "add", name, check=False)
    tried = run("ip", "netns", "exec", name, "mount", "-t", "tmpfs", "tmpfs", "/srv", check=False)
    run("ip", "netns", "del", name, check=False)
    if made.returncode or tried.returncode:
        pytest.skip(f"NO NETWORK NAMESPACES HERE: docs/operate.md is NOT tested ({made.stderr}{tried.stderr})")


# What stands before every command: of all members' directories only this one exists, at the place the page says.
ENTER = f'set -eu; mount --bind "$OWN" {HOME}; mount -t tmpfs tmpfs "$EVERYBODY"; cd {HOME}; '
# `scp FILE... HOST:DIRECTORY/`: the test delivers what is put here.
SCP = """#!/bin/sh
set -eu
for last; do :; done
target="$OUTBOX/${last%%:*}${last#*:}"
mkdir -p "$target"
while [ $# -gt 1 ]; do cp "$1" "$target"; shift; done
"""
MPCINFER = f"""#!/bin/sh
exec {sys.executable} -P -m mpcinfer "$@"
"""


@dataclass
class Machines:
    """One namespace and one directory per host, joined by a switch. `carried`: what went from host to host."""

    directory: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    commands: dict[str, str] = field(default_factory=dict)
    carried: set[str] = field(default_factory=set)

    def namespace(self, host: str) -> str:
        return f"mpc-{os.getpid()}-{host}"

    def home(self, host: str) -> Path:
        return self.directory / "hosts" / host

    def build(self, stack: ExitStack) -> None:
        """Make everything; `stack` takes it apart again."""
        switch = self.namespace("switch")
        for name in (switch, *map(self.namespace, ADDRESSES)):
            run("ip", "netns", "add", name)
            stack.callback(run, "ip", "netns", "del", name, check=False)
        stack.callback(self.stop_all)
        run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge", "forward_delay", "0")
        run("ip", "-n", switch, "link", "set", "bridge", "up")
        for i, (host, address) in enumerate(ADDRESSES.items()):
            name = self.namespace(host)
            run("ip", "-n", switch, "link", "add", f"port{i}", "type", "veth", "peer", "name", "eth0", "netns", name)
            run("ip", "-n", switch, "link", "set", f"port{i}", "master", "bridge", "up")
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                run("ip", "-n", name, "link", "set", device, "up")
            self.home(host).mkdir(parents=True, mode=0o700)
        if not HOME.exists():  # only a place to mount on, in the namespaces
            HOME.mkdir(parents=True)
            stack.callback(HOME.rmdir)
        for name, text in (("scp", SCP), ("mpcinfer", MPCINFER)):
            path = self.directory / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        (self.directory / "logs").mkdir()

    def command(self, host: str, script: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace(host), "sh", "-c", ENTER + script]

    def environment(self, host: str) -> dict[str, str]:
        path = [str(self.directory / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        return {
            "PATH": os.pathsep.join(path),
            "PYTHONPATH": str(ROOT),
            "OWN": str(self.home(host)),
            "EVERYBODY": str(self.directory / "hosts"),
            "OUTBOX": str(self.directory / "outbox"),
        }

    def execute(self, host: str, script: str) -> subprocess.CompletedProcess[str]:
        """Run a script on a host and deliver what it sends."""
        done = subprocess.run(
            self.command(host, script), env=self.environment(host), capture_output=True, text=True, timeout=180
        )
        outbox = self.directory / "outbox"
        for path in [path for path in outbox.rglob("*") if path.is_file()]:
            to, _, where = path.relative_to(outbox).as_posix().partition("/")
            content = path.read_bytes()
            assert b"PRIVATE KEY" not in content and path.suffix in (".csr", ".pem", ".toml"), path.name
            self.carried.add(f"{host} > {to}: {path.name}")
            target = self.home(to) / Path("/", where).relative_to(HOME)
            assert target.parent.is_dir(), f"{to} has no {where}"
            target.write_bytes(content)
        shutil.rmtree(outbox, ignore_errors=True)
        return done

    def start(self, host: str, script: str | None = None) -> None:
        """Start the process of a host (the one that the page started there first)."""
        script = self.commands.setdefault(host, script or "")
        assert host not in self.processes and len(script.splitlines()) == 1
        with (self.directory / "logs" / host).open("ab") as log:
            self.processes[host] = subprocess.Popen(
                self.command(host, f"exec {script}"), env=self.environment(host), stdout=log, stderr=log
            )

    def stop(self, host: str) -> None:
        """Stop it as systemd does, and see that it goes well."""
        process = self.processes.pop(host)
        process.terminate()
        assert process.wait(30) == 0, self.log(host)

    def stop_all(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()

    def log(self, host: str) -> str:
        return (self.directory / "logs" / host).read_text()

    def connections(self, host: str) -> set[str]:
        """The hosts whose service port this one has connected to, a moment ago at the latest."""
        names = {address: name for name, address in ADDRESSES.items()}
        lines = run("ip", "netns", "exec", self.namespace(host), "ss", "-Htan").stdout.splitlines()
        remotes = [line.split()[4].rpartition(":") for line in lines if "LISTEN" not in line]
        return {names[address.strip("[]").removeprefix("::ffff:")] for address, _, port in remotes if port == str(PORT)}


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    require_namespaces()
    with ExitStack() as stack:
        built = Machines(tmp_path)
        built.build(stack)
        yield built


def secrets_of(home: Path) -> dict[str, list[bytes]]:
    """Every form in which the secrets of a host might turn up elsewhere."""
    found = {}
    for path in [*home.rglob("*.key"), *home.rglob("*.key.old")]:
        text = path.read_bytes()
        if b"PRIVATE KEY" in text:
            key = load_pem_private_key(text, None)
            assert isinstance(key, EllipticCurvePrivateKey)
            scalar = key.private_numbers().private_value.to_bytes(32, "big")
            lines = text.splitlines()[1:3]  # base64; the third and last has only the public key
            found[path.name] = [scalar, scalar.hex().encode(), *lines]
        else:
            found[path.name] = [text.strip(), bytes.fromhex(text.decode())]
    return found


def check_answer(machines: Machines) -> None:
    """bob's answer is what alice's network says in plain."""
    answer = machines.home("bob") / "answer.npy"
    model, _ = run_path(str(machines.home("alice") / "model.py"))["build"]()
    x = np.load(machines.home("bob") / "input.npy")
    with torch.no_grad():
        plain = model(torch.from_numpy(x).float()).numpy()
    private = np.load(answer)
    assert private.shape == plain.shape == (3, 3)
    assert np.abs(private - plain).max() < 0.005
    answer.unlink()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_page_works_on_separate_machines(machines: Machines) -> None:
    answers = 0
    for step in steps():
        if step.flags == {"start"}:
            machines.start(step.host, step.script or None)
        elif step.flags == {"stop"}:
            machines.stop(step.host)
        elif step.flags == {"restart"}:
            machines.stop(step.host)
            machines.start(step.host)
        else:
            end = time.monotonic() + (RETRY_SECONDS if "retry" in step.flags else 0)
            while True:
                done = machines.execute(step.host, step.script)
                ended = [host for host, process in machines.processes.items() if process.poll() is not None]
                assert not ended, "\n".join(machines.log(host) for host in ended)
                if done.returncode == 0 or time.monotonic() > end:
                    break
                time.sleep(0.5)
            logs = "\n".join(machines.log(host) for host in machines.processes)
            assert done.returncode == 0, f"on {step.host}:\n{step.script}\n{done.stdout}{done.stderr}\n{logs}"
            if "--out answer.npy" in step.script:
                check_answer(machines)
                answers += 1
    assert answers >= 5
    check_status(machines)
    check_health(machines)
    check_connections(machines)
    check_isolation(machines)
    for host in list(machines.processes):
        machines.stop(host)
    check_secrets(machines)


def check_status(machines: Machines) -> None:
    done = machines.execute("bob", "mpcinfer status")
    assert [line.split()[:4] for line in done.stdout.splitlines()[1:]] == [
        [f"party/{i}", f"{ADDRESSES[f'party-{i}']}:{PORT}", "ready", "1"] for i in range(2)
    ]


def check_health(machines: Machines) -> None:
    """The health service answers to the options of the page's grpc_health_probe, which not every machine has."""
    line = next(line for line in PAGE.read_text().splitlines() if line.startswith("grpc_health_probe "))
    options = dict(re.findall(r"-([\w-]+)=(\S+)", line))
    assert set(options) == {"addr", "tls-ca-cert", "tls-client-cert", "tls-client-key", "tls-server-name"}
    probe = f"""python3 - <<'EOF'
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
read = lambda name: open(name, "rb").read()
credentials = grpc.ssl_channel_credentials(
    read({options["tls-ca-cert"]!r}), read({options["tls-client-key"]!r}), read({options["tls-client-cert"]!r})
)
override = [("grpc.ssl_target_name_override", {options["tls-server-name"]!r})]
with grpc.secure_channel({options["addr"]!r}, credentials, override) as channel:
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
print(answer.status)
EOF
"""
    done = machines.execute("bob", probe)
    assert (done.stdout, done.returncode) == ("1\n", 0), done.stderr  # SERVING


def check_connections(machines: Machines) -> None:
    """Who connects to whom is what the page's table, and so the reader's firewall, says."""
    words = {"nobody": set(), "dealer": {"dealer"}, "party 1, dealer": {"party-1", "dealer"}}
    words["all parties"] = {"party-0", "party-1"}
    rows = {row[0].strip("`"): row for row in table("The plan")}
    assert set(rows) == set(ADDRESSES)
    for host in ("party-0", "party-1", "dealer"):
        assert machines.connections(host) == words[rows[host][3]], host
        assert rows[host][2] == f"{ADDRESSES[host]}:{PORT}"
    for host in ("alice", "bob", "ca"):
        assert machines.connections(host) <= words[rows[host][3]], host


def check_isolation(machines: Machines) -> None:
    """The control of this test itself: a host sees nobody else's files."""
    assert machines.execute("bob", 'ls -A "$EVERYBODY"').stdout == ""
    assert set(machines.execute("bob", "ls -A").stdout.split()) == set(os.listdir(machines.home("bob")))
    assert len(list((machines.directory / "hosts").glob("*/*.key"))) == len(ADDRESSES) + 2  # from here all are seen


def check_secrets(machines: Machines) -> None:
    """No private or store key ever was outside of the directory it was made in."""
    expected = {
        "ca": {"ca.key"},
        "dealer": {"dealer.key"},
        "party-0": {"party-0.key", "store.key"},
        "party-1": {"party-1.key", "party-1.key.old", "store.key"},
        "alice": {"owner-alice.key"},
        "bob": {"client-bob.key"},
    }
    files = [path for path in machines.directory.rglob("*") if path.is_file()]
    contents = {path: path.read_bytes() for path in files}
    for host, names in expected.items():
        home = machines.home(host)
        secrets = secrets_of(home)
        assert set(secrets) == names
        for name, forms in secrets.items():
            holders = {path for path, content in contents.items() for form in forms if form in content}
            assert {path.name for path in holders} == {name}, f"{host}: {name}"
            assert all(path.is_relative_to(home) and path.stat().st_mode & 0o077 == 0 for path in holders)
    stems = {
        host: next(iter(names - {"store.key"})).partition(".")[0] for host, names in expected.items() if host != "ca"
    }
    there = {f"{host} > ca: {stem}.csr" for host, stem in stems.items()}
    back = {
        f"ca > {host}: {name}" for host, stem in stems.items() for name in (f"{stem}.pem", "ca.pem", "cluster.toml")
    }
    assert machines.carried == there | back
