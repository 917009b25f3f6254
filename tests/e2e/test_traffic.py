"""Bytes: what parties report is what the operating system counts, and it does not depend on the data."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from tests.e2e.traffic import FEATURES, ROWS

ROOT = Path(__file__).parents[2]
NAMESPACE = ["unshare", "--user", "--map-root-user", "--net"]

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids=["2-parties", "3-parties"])
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
        pytest.skip("this system does not let users make network namespaces")
    directory = tmp_path_factory.mktemp("traffic") / "cluster"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ran = subprocess.run(
        [*NAMESPACE, sys.executable, "-m", "tests.e2e.traffic", str(request.param), str(directory)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=220,
    )
    assert ran.returncode == 0, ran.stderr
    result: dict[str, Any] = json.loads(ran.stdout)
    return result


def sent(run: dict[str, Any], party: int) -> int:
    """What a party says it sent to the others."""
    reported = run["reported"][party]
    return int(reported["online"] + reported["offline"])


def test_reported_bytes_are_the_system_s_within_5_percent(measured: dict[str, Any]) -> None:
    for run in measured["wide"]:
        parties = len(run["reported"])
        opened = 8 * FEATURES * ROWS * (parties - 1)
        for party in range(parties):
            assert opened <= sent(run, party) <= 1.01 * opened + 64 * 1024
            if run["between_parties"]:
                assert run["between_parties"][f"party/{party}"] == pytest.approx(sent(run, party), rel=0.05)
        dealt = sum(reported["dealer"] for reported in run["reported"])
        account = sum(sent(run, party) for party in range(parties)) + dealt + run["client"]
        assert run["loopback"] == pytest.approx(account, rel=0.05)


def test_bytes_and_rounds_depend_on_shapes_only(measured: dict[str, Any]) -> None:
    zero, maximal = measured["zero"], measured["maximal"]
    reports = [run["reported"] for run in (*zero, *maximal)]
    assert all(report == reports[0] for report in reports)
    assert reports[0][0]["rounds"] > 0 and reports[0][0]["online"] > 20_000
    # By the system's account the same but for TLS records, acknowledgements, and timers that go off now and then.
    for party in zero[0]["between_parties"]:
        a, b = (mean(run["between_parties"][party] for run in runs) for runs in (zero, maximal))
        assert a == pytest.approx(b, rel=0.03)
    a, b = (mean(run["loopback"] for run in runs) for runs in (zero, maximal))
    assert a == pytest.approx(b, rel=0.05)
