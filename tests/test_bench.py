"""scripts/bench, as it is run: the report's form, right results, and peers that fail without taking anything along."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
OPERATIONS = 6


def bench(tmp_path: Path, peers: str, repeat: int, timeout: float, **environment: str) -> tuple[Any, str]:
    """The report and the page of a tiny run."""
    report, page = tmp_path / "ops.json", tmp_path / "ops.md"
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), "ops", "--tiny", "--repeat", str(repeat)]
    command += ["--peers", peers, "--json", str(report), "--markdown", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(report.read_text()), page.read_text()


def fake_environment(cache: Path, peer: str, script: str) -> None:
    """A peer's environment whose interpreter is a shell script."""
    interpreter = cache / "peers" / peer / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text(f"#!/bin/sh\n{script}\n")
    interpreter.chmod(0o755)


def check_ours(report: Any) -> None:
    """Every operation is there, right, and counted."""
    assert len(report["rows"]) == OPERATIONS
    assert report["machine"]["cores"] and report["machine"]["versions"]["mpcinfer"]
    for row in report["rows"]:
        ours = row["ours"]
        assert ours["right"] is True and 0 <= ours["max_abs_error"] <= 0.005, row["name"]
        online, offline, total = ours["online"], ours["offline"], ours["total"]
        assert online["rounds"] >= 2 and online["bytes_sent_per_party"] > 0 and offline["bytes_sent_by_dealer"] > 0
        assert 0 < online["seconds"] < total["seconds"] and total["client_seconds"] > 0
        assert total["seconds"] == pytest.approx(online["seconds"] + offline["seconds"])
        assert (
            ours["deploy_seconds"] > 0 and ours["peak_rss_bytes"]["party"] > 0 and ours["peak_rss_bytes"]["dealer"] > 0
        )
        assert len(ours["samples"]["total"]) == report["settings"]["repeat"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_report_is_complete_and_says_why_peers_failed(tmp_path: Path) -> None:
    # one cannot be installed, the other can but crashes; --repeat 1, so that medians are the samples
    fake_environment(tmp_path, "crypten", 'echo "no such package" >&2; exit 1')
    fake_environment(tmp_path, "spu", 'test "$1" = -m && exit 0; echo "a wheel for another processor" >&2; exit 3')
    report, page = bench(tmp_path, "spu,crypten", 1, 280, MPCINFER_CACHE=str(tmp_path))
    check_ours(report)
    for row in report["rows"]:
        assert "exit code 3" in row["peers"]["spu"]["failed"]
        assert "a wheel for another processor" in row["peers"]["spu"]["failed"]
        assert row["peers"]["crypten"]["failed"] == "could not be installed: no such package"
        assert row["ratios"] == {}
        assert page.count(f"| {row['name']} |") == 3


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("command", "arguments", "names", "plots"),
    [
        (
            "models",
            "--workloads gpt2-16,minilm --networks loopback,lan",
            ["GPT-2 block", "MiniLM"],
            ["loopback", "lan"],
        ),
        (
            "generate",
            "--steps 3 --together 2 --networks lan",
            ["a prompt", "a token after", "a token of each"],
            ["lan"],
        ),
        (
            "together",
            "--together 3 --networks lan",
            ["MiniLM-L6, 8 tokens", "MiniLM-L6, 8 tokens, 3 requests"],
            ["lan"],
        ),
        ("growth", "--axes length,parties --networks loopback", ["length", "parties"], ["loopback-length"]),
    ],
    ids=["models", "generate", "together", "growth"],
)
def test_commands_over_networks(
    tmp_path: Path, command: str, arguments: str, names: list[str], plots: list[str]
) -> None:
    report, page = tmp_path / "report.json", tmp_path / "page.md"
    called = [
        sys.executable,
        str(ROOT / "scripts" / "bench.py"),
        command,
        "--tiny",
        "--repeat",
        "1",
        *arguments.split(),
    ]
    called += ["--json", str(report), "--markdown", str(page)]
    done = subprocess.run(called, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert set(arguments.split("--networks ")[1].split(",")) == set(found["networks"])
    assert all(network == "loopback" or measured["round_trip"] > 0 for network, measured in found["networks"].items())
    for network in found["networks"]:
        rows = [row["name"] for row in found["rows"] if row["network"] == network]
        assert all(any(row.startswith(name) for row in rows) for name in names)
    for row in found["rows"]:
        assert row["ours"]["right"] and 0 < row["ours"]["online"]["seconds"] < row["ours"]["total"]["seconds"]
    for plot in plots:
        assert f"(page-{plot}.svg)" in page.read_text() and (tmp_path / f"page-{plot}.svg").exists()


@pytest.mark.slow
@pytest.mark.net
@pytest.mark.timeout(2400)
def test_peers_run_beside_us(tmp_path: Path) -> None:
    report, _ = bench(tmp_path, "spu,crypten", 2, 2300)
    check_ours(report)
    for row in report["rows"]:
        for name, peer in row["peers"].items():
            assert "failed" not in peer, peer
            assert peer["right"] and peer["seconds"] > 0 and peer["rounds"] > 0 and peer["bytes_sent_per_party"] > 0
            for phase in ("online", "total"):
                expected = peer["seconds"] / row["ours"][phase]["seconds"]
                assert row["ratios"][f"{phase}_vs_{name}_total"] == pytest.approx(expected)
