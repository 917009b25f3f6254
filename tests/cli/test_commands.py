"""The command line: what it prints, as text and as JSON, and how it exits."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mpcinfer
from mpcinfer import cli
from mpcinfer.cli.output import progress
from mpcinfer.client.local import LocalCluster
from mpcinfer.config import Cluster, Node
from mpcinfer.errors import AbortedError, BusyError
from mpcinfer.wire.identity import Identity, key_pin
from tests.cli.conftest import Done, Shell
from tests.client.fakes import FakeCluster, info, spec

# --- usage and errors ------------------------------------------------------------------------------------------------


def test_version_and_help(shell: Shell) -> None:
    assert shell("--version") == Done(0, f"mpcinfer {mpcinfer.__version__}\n", "")
    helped = shell("--help")
    assert helped.code == 0
    for command in ("party", "dealer", "up", "explain", "deploy", "models", "infer", "status", "certs"):
        assert command in helped.out
    assert "stop-at-eof" not in shell("party", "--help").out


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("infer",),
        ("deploy", "a.pt2"),
        ("up", "--parties", "1"),
        ("infer", "m", "x.npy", "--timeout", "soon"),
        ("party",),
        ("certs", "sign"),
        ("models", "--json", "list"),
    ],
)
def test_wrong_usage(shell: Shell, arguments: tuple[str, ...]) -> None:
    done = shell(*arguments)
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1
    if "--json" not in arguments:
        assert done.out == ""


def test_errors_are_one_line_and_an_object(shell: Shell) -> None:
    done = shell("models", "--json")
    assert done.code == 2
    assert done.json["error"]["type"] == "ConfigError" and "cluster.toml" in done.json["error"]["message"]
    assert done.err == f"error: {done.json['error']['message']}\n"


@pytest.mark.parametrize(("error", "code"), [(BusyError("full"), 1), (AbortedError("lost"), 3)])
def test_exit_codes_of_failures(shell: Shell, world: FakeCluster, error: Exception, code: int) -> None:
    def fail(method: str) -> None:
        if method == "RemoveModel":
            raise error

    world.parties[1].before = fail
    done = shell("models", "rm", "same")
    assert done.code == code and str(error) in done.err


def test_a_bug_is_not_hidden(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "list_models", broken)
    monkeypatch.setattr(sys, "argv", ["mpcinfer", "models"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


# --- owners and clients ----------------------------------------------------------------------------------------------


def test_inference(shell: Shell, world: FakeCluster, tmp_path: Path) -> None:
    x = np.array([[1.0, 2.0, 3.0], [-4.0, 5.0, 6.0]], dtype=np.float32)
    np.save("x.npy", x)
    done = shell("infer", "same", "x.npy", "--json")
    assert done.code == 0 and done.json["outputs"] == [x.tolist()] and done.json["shapes"] == [[2, 3]]
    assert done.json["online"] == {"seconds": 1.5, "rounds": 8, "bytes_sent_per_party": 101}
    assert done.json["offline"]["bytes_sent_by_dealer"] == 1000
    done = shell("infer", "same", "x.npy", "--out", "y.out")
    assert (done.code, done.out) == (0, "y.out\n") and "8 rounds" in done.err
    assert np.array_equal(np.load("y.out"), x)
    assert "-4." in shell("infer", "same", "x.npy").out


def test_inference_with_several_inputs_and_outputs(shell: Shell, world: FakeCluster) -> None:
    specs = [spec("a", -1, 3), spec("b", -1, 2)]
    world.deploy(info("pair", specs, specs))
    np.save("a.npy", np.ones((2, 3)))
    np.save("b.npy", np.zeros((2, 2)))
    done = shell("infer", "pair", "a.npy", "b.npy", "--out", "y.npy", "--json")
    assert done.json["files"] == ["y-0.npy", "y-1.npy"] and "outputs" not in done.json
    assert np.load("y-0.npy").shape == (2, 3) and np.load("y-1.npy").shape == (2, 2)


def test_inference_refuses_bad_files(shell: Shell, world: FakeCluster) -> None:
    Path("text.npy").write_text("no array")
    np.save("objects.npy", np.array([None]), allow_pickle=True)
    np.savez("several.npz", np.ones(3))
    np.save("wrong.npy", np.ones((2, 4)))
    for file in ("missing.npy", "text.npy", "objects.npy", "several.npz", "wrong.npy"):
        done = shell("infer", "same", file)
        assert done.code == 2 and done.err.startswith("error: ")
    assert not world.parties[0].inferences


def test_which_cluster_and_identity(
    shell: Shell, world: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert shell("models").code == 2
    for arguments in (["--cluster", tmp_path], ["--cluster", tmp_path / "cluster.toml", "--identity", "owner/o"]):
        assert shell("models", *arguments).code == 0
        assert shell("models", "list", *arguments).code == 0
    monkeypatch.setenv("MPCINFER_CLUSTER", str(tmp_path))
    assert shell("models").code == 0
    monkeypatch.setenv("MPCINFER_IDENTITY", "client/nobody")
    assert "client/nobody" in shell("models").err


def test_models(shell: Shell, world: FakeCluster) -> None:
    done = shell("models")
    head, row = done.out.splitlines()
    assert head.split() == ["NAME", "VERSION", "OWNER", "REVEAL", "PARAMETERS", "INPUTS", "OUTPUTS", "GRANTED"]
    assert row.split() == ["same", "1", "owner/o", "logits", "12", "Nx3", "Nx3", "to", "you"]
    assert shell("models", "list").out == done.out
    (model,) = shell("models", "--json").json["models"]
    assert (model["name"], model["version"], model["inputs"][0]["shape"]) == ("same", 1, [-1, 3])
    assert shell("models", "list", "--json").json["models"] == [model]


def test_removing_models(shell: Shell, world: FakeCluster) -> None:
    assert (
        shell("models", "rm", "same", "--version", 1).out == "removed 2 versions of same, confirmed by all 2 parties\n"
    )
    assert shell("models", "rm", "same", "--json").json == {"removed": 2, "confirmed_by": 2}
    assert [removal.version for removal in world.parties[0].removals] == [1, 0]


def test_status(shell: Shell, world: FakeCluster) -> None:
    done = shell("status")
    assert done.code == 0 and [line.split()[2] for line in done.out.splitlines()] == ["STATE", "ready", "ready"]
    assert "operator of party/1" in done.out and "self-reported, not proven" in done.out
    assert done.err.startswith("NOT PINNED")
    world.parties[0].status = {"state": "connecting", "detail": "waits for party 1"}
    world.stop_party(1)
    done = shell("status")
    assert done.code == 1 and done.err.startswith("NOT PINNED")
    assert "connecting" in done.out and "waits for party 1" in done.out and "unreachable" in done.out
    done = shell("status", "--json")
    assert done.code == 1 and done.json["ready"] is False
    assert [party["state"] for party in done.json["parties"]] == ["connecting", "unreachable"]
    assert done.json["pinned"] is False
    assert done.json["parties"][0]["models"][0]["name"] == "same"


def test_pinning(shell: Shell, world: FakeCluster) -> None:
    assert shell("pin", "--check").code == 2  # there is none yet
    done = shell("pin")
    assert done.code == 0 and "operator of party/0" in done.out and "pinned in manifest.pin" in done.out
    assert done.out.count("self-reported, not proven") == 2
    done = shell("pin", "--check", "--json")
    assert done.code == 0 and done.json["changed"] == [] and len(done.json["parties"]) == 2
    assert shell("status").err == "" and shell("models").code == 0
    world.operators[1] = "somebody else"
    for command in (("models",), ("pin", "--check")):
        done = shell(*command)
        assert done.code == 1 and "its operator was 'operator of party/1' and is now 'somebody else'" in done.err
    assert [p["state"] for p in shell("status", "--json").json["parties"]] == ["ready", "refused"]
    done = shell("pin")
    assert done.code == 0 and "changed: party/1: its operator was" in done.out
    assert shell("pin", "--check").code == 0
    Path("manifest.pin").write_text("{}")
    assert shell("models").code == 2


def test_unavailable_parties(shell: Shell, world: FakeCluster) -> None:
    world.stop_party(1)
    done = shell("models", "--json")
    assert done.code == 3 and done.json["error"]["type"] == "UnavailableError" and "party/1" in done.err


def test_progress_is_for_people_only(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    with progress(as_json=False) as report:
        assert report is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress(as_json=True) as report:
        assert report is None
    with progress(as_json=False) as report:
        report(0, 100)
        report(100, 100)


# --- certificates ----------------------------------------------------------------------------------------------------


def test_a_cluster_made_step_by_step(shell: Shell, tmp_path: Path) -> None:
    """As on several machines: requests are made where keys stay, and only public files travel."""
    assert shell("certs", "init", "hospital", "--directory", "ca").out == "ca/ca.key\nca/ca.pem\n"
    for role in ("party/0", "party/1", "dealer", "client/ann"):
        stem = role.replace("/", "-")
        assert shell("certs", "request", role, "--cluster-name", "hospital", "--directory", stem).code == 0
        signed = shell("certs", "sign", f"{stem}/{stem}.csr", "--role", role, "--ca", "ca")
        assert signed.out == f"{stem}/{stem}.pem\n"
        Identity.load(f"{stem}/{stem}.key", f"{stem}/{stem}.pem")
    pin = shell("certs", "pin", "party-0/party-0.csr").out.strip()
    assert pin == key_pin(Path("party-0/party-0.pem").read_bytes())
    parties = [x for i in (0, 1) for x in ("--party", f"10.0.0.{i + 1}:7100=party-{i}/party-{i}.pem")]
    done = shell(
        "certs", "cluster", "hospital", *parties, "--dealer", "10.0.0.9:7100=dealer/dealer.csr", "--ca", "ca/ca.pem"
    )
    assert done.out == "cluster.toml\n"
    cluster = Cluster.load("cluster.toml")
    assert cluster.parties[0].key_pin == pin and cluster.dealer.address == "10.0.0.9:7100"
    assert shell("certs", "init", "hospital", "--directory", "ca").code == 1  # nothing is overwritten
    assert (
        shell("certs", "sign", "client-ann/client-ann.csr", "--role", "owner/ann", "--ca", "ca", "--out", "x").code == 1
    )
    assert shell("certs", "cluster", "hospital", "--party", "nonsense", "--dealer", "also").code == 2
    assert shell("certs", "pin", "missing").code == 2


# --- processes -------------------------------------------------------------------------------------------------------


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(mpcinfer.__file__).parents[1])}
    command = [sys.executable, "-m", "mpcinfer", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True, **options
    )


@pytest.mark.timeout(300)
def test_a_whole_cluster_from_the_command_line(tmp_path: Path, shell: Shell) -> None:
    ready = tmp_path / "ready"
    with start("up", "--directory", tmp_path / "c", "--client", "ann", "--ready-file", ready) as process:
        try:
            assert process.stdout is not None
            lines = []
            while not lines or lines[-1] != "ready":
                line = process.stdout.readline()
                assert line, process.communicate()
                lines.append(line.strip())
            assert ready.read_text() == "ready\n"
            assert f"client/ann: {tmp_path / 'c' / 'client-ann'}" in lines
            assert f"cluster file: {tmp_path / 'c' / 'cluster.toml'}" in lines
            cluster = ("--cluster", tmp_path / "c")
            assert shell("status", *cluster).code == 0
            torch.export.save(torch.export.export(torch.nn.Linear(3, 2).eval(), (torch.zeros(1, 3),)), "m.pt2")
            done = shell("deploy", "m.pt2", "--name", "m", *cluster)
            assert done.code == 0 and "granted to all clients of the cluster; no budget; no expiry" in done.out
            np.save("x.npy", np.ones((1, 3)))
            assert shell("infer", "m", "x.npy", "--json", *cluster).json["shapes"] == [[1, 2]]
            granted = shell("grant", "m", "--client", "ann", "--queries", "2/day", "--until", "2099-01-01", *cluster)
            assert "client/ann; 2 queries per day each; until 2099-01-01 00:00 UTC" in granted.out
            assert (
                granted.out == shell("grant", "m", *cluster).out
                and "2 queries per day" in shell("models", *cluster, "--identity", "owner/owner").out
            )
            assert shell("infer", "m", "x.npy", *cluster).code == 0
            assert shell("infer", "m", "x.npy", "--json", *cluster).json["error"]["type"] == "BudgetError"
            assert shell("revoke", "m", "--json", *cluster).json["grants"][0]["revoked"]
            assert shell("infer", "m", "x.npy", "--json", *cluster).json["error"]["type"] == "GrantError"
            assert shell("grant", "m", "--everybody", "--rate", 5, *cluster).code == 2
            assert shell("grant", "m", "--until", "soon", *cluster).code == 2
            assert shell("grant", "m", "--everybody", "--json", *cluster).json["grants"][0]["serial"] == 4
            assert shell("infer", "m", "x.npy", *cluster).code == 0
            done = shell("refresh", "m", *cluster, "--identity", "owner/owner")
            assert done.out == "refreshed 1 version of m, confirmed by all 2 parties\n"
            operator = ("--identity", tmp_path / "c" / "party-1")
            assert shell("refresh", "owner/m", "--json", *cluster, *operator).json["refreshed"] == 1
            assert shell("infer", "m", "x.npy", *cluster).code == 0
            assert shell("models", "rm", "m", *cluster).code == 0
        finally:
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out == "stopped\n" and err == "" and not ready.exists()
    assert shell("status", *cluster).code == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_when_one_process_dies_the_others_are_stopped(tmp_path: Path) -> None:
    with start("up", "--directory", tmp_path / "c") as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() != "ready":
            assert process.poll() is None
        (pid,) = [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and f"{tmp_path / 'c' / 'party-1.toml'}".encode() in command_line(entry)
        ]
        os.kill(pid, signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 3
    assert err.startswith("error: party/1 was ended by SIGKILL; its log") and "ready" in err


def command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.timeout(300)
def test_a_process_that_cannot_start_says_why(tmp_path: Path, shell: Shell) -> None:
    local = LocalCluster(tmp_path / "c")
    address = local.cluster.parties[0].address
    assert shell("dealer", "--config", local.directory / "party-0.toml").err.startswith("error: ")
    assert shell("party", "--config", local.directory / "dealer.toml").code == 2
    assert shell("party", "--config", "missing.toml").code == 2
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        with start("party", "--config", local.directory / "party-0.toml") as process:
            _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err.splitlines()[-1].startswith(f"error: cannot listen on {address}") and "Traceback" not in err


def test_a_witness_is_started_as_one_or_not_at_all(tmp_path: Path, shell: Shell) -> None:
    local = LocalCluster(tmp_path / "local", witnesses=True)  # only its files
    for of, node, why in (
        ([], "witness-0", "start it with --witness-of 0"),
        (["--witness-of", 1], "witness-0", "is for witness/0, not for witness/1"),
        (["--witness-of", 0], "party-0", "is for party/0, not for witness/0"),
    ):
        done = shell("party", "--config", local.directory / f"{node}.toml", *of)
        assert done.code == 2 and why in done.err, done.err


# --- templates -------------------------------------------------------------------------------------------------------

LOCAL = Path(__file__).parents[2] / "parties" / "local"


def test_the_templates_are_what_the_processes_read(shell: Shell, tmp_path: Path) -> None:
    """With pins in place of the placeholders; what is commented out are the defaults."""
    made = LocalCluster(tmp_path / "c", base_port=7100)
    text = (LOCAL / "cluster.toml.example").read_text()
    for endpoint in (*made.cluster.parties, made.cluster.dealer):
        text = text.replace(f"sha256:<pin of {endpoint.role.replace('/', '-')}>", endpoint.key_pin)
    (made.directory / "cluster.toml").write_text(text)
    assert Cluster.load(made.cluster_path).digest() == made.cluster.digest()
    for name in ("party", "dealer"):
        text = (LOCAL / f"{name}.toml.example").read_text()
        (made.directory / "node.toml").write_text(text)
        node = Node.load(made.directory / "node.toml")
        spelled_out, count = re.subn(r"(?m)^# (?=\w+ = )", "", text)
        (made.directory / "node.toml").write_text(spelled_out)
        assert Node.load(made.directory / "node.toml") == node
        assert count == (17 if name == "party" else 0)


@pytest.mark.slow
def test_the_readme_makes_the_same_cluster(tmp_path: Path) -> None:
    script = (LOCAL / "README.md").read_text().partition("```sh\n")[2].partition("# then")[0]
    environment = {**os.environ, "PYTHONPATH": str(LOCAL.parents[1])}
    command = f'mpcinfer() {{ {sys.executable} -m mpcinfer "$@"; }}\nset -e\n{script}'
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=True, capture_output=True)
    again = LocalCluster(tmp_path)
    assert [e.address for e in (*again.cluster.parties, again.cluster.dealer)] == [
        f"127.0.0.1:{7100 + i}" for i in range(3)
    ]
    assert len(list(tmp_path.glob("*.pem"))) == 6
