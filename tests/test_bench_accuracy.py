"""scripts/bench accuracy: points, verdicts and pages; the command itself on one function, with peers that fail."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The module that runs everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield importlib.import_module("bench_accuracy")


@pytest.fixture(scope="module")
def table(bench: Any) -> Any:
    """The module with the functions."""
    return sys.modules["bench_functions"]


@pytest.fixture(scope="module")
def pages(bench: Any) -> Any:
    """The module that makes tables and pages."""
    return sys.modules["bench_report"]


def named(table: Any, name: str, tiny: bool = True) -> Any:
    return next(f for f in table.functions(tiny) if f.name == name)


# --- points -----------------------------------------------------------------------------------------------------------


def test_every_system_encodes_all_points_and_parameters_exactly(table: Any) -> None:
    for function in table.functions():
        for within in table.RANGES:
            for array in function.arrays(within).values():
                assert np.array_equal(array * 2.0**16, np.round(array * 2.0**16)), function.name
                assert np.array_equal(array, array.astype(np.float32)), function.name
            assert function.points[within].size >= 98_000
            assert np.isfinite(function.reference(within)).all(), function.name


def test_points_reach_the_ends_of_what_is_claimed(table: Any) -> None:
    far = named(table, "gelu (erf)", tiny=False).points["wide"]
    for point in (0, 64, 100, 20_000):
        assert (far == point).any() and (far == -point).any()
    assert np.abs(far).max() == 20_000 and (np.abs(far) <= 40).sum() >= 50_000
    octaves = named(table, "rsqrt", tiny=False).points["wide"]
    assert octaves.min() < 2.0**-8 * 1.001 and octaves.max() > 2.0**20 * 0.999
    exp = named(table, "exp", tiny=False).points["wide"]
    assert -60 <= exp.min() < -59.9 and 7.99 < exp.max() <= 8
    scores = named(table, "softmax", tiny=False).points["wide"]
    assert (np.ptp(scores, axis=1) == 0).sum() == len(scores) // 16


def test_points_are_the_same_every_time(table: Any) -> None:
    for once, again in zip(table.functions(True), table.functions(True), strict=True):
        for within in table.RANGES:
            for one, other in zip(once.arrays(within).values(), again.arrays(within).values(), strict=True):
                assert np.array_equal(one, other)


def test_reference_is_the_module_in_float64_and_leaves_it_alone(table: Any) -> None:
    function = named(table, "layernorm")
    x, weight, bias = function.arrays("wide").values()
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias
    assert np.allclose(function.reference("wide"), expected, rtol=0, atol=1e-12)
    assert all(p.dtype == torch.float32 for p in function.model.parameters())


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_judged_finds_the_worst_point(table: Any) -> None:
    function = named(table, "tanh")
    got = function.reference("ordinary")
    exact = function.judged("ordinary", got, 2.0**-16)
    assert exact["max_abs_error"] == exact["max_error_in_tolerances"] == 0 and exact["right"]
    got[1, 3] += 1e-3
    off = function.judged("ordinary", got, 2.0**-16)
    assert off["max_error_in_tolerances"] == pytest.approx(2) and not off["right"]
    assert off["worst"]["x"] == function.points["ordinary"][1, 3]
    assert function.judged("ordinary", got, 2.0**-16, slack=10)["right"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_wrong_and_still_json(table: Any, value: float) -> None:
    function = named(table, "exp")
    got = function.reference("wide")
    got[0, 0] = value
    judged = function.judged("wide", got, 2.0**-16, slack=1e9)
    assert judged["max_abs_error"] is None and judged["worst"]["got"] is None and not judged["right"]
    json.dumps(judged, allow_nan=False)


def test_a_result_of_another_size_is_no_result(table: Any) -> None:
    with pytest.raises(ValueError, match="3 results for 200 points"):
        named(table, "relu").judged("wide", np.zeros(3), 2.0**-16)


def test_tolerances(table: Any) -> None:
    x, y = np.array([-1.0, 0.0, 1.0]), np.exp([-1.0, 0.0, 1.0])
    exp = named(table, "exp").tolerance
    assert exp.allowed(x, y, 2.0**-16) == pytest.approx([5e-5, 5e-5, 1e-3 * np.e])
    assert exp.relative(x, y).tolist() == [False, False, True]
    scaled = named(table, "reciprocal").tolerance
    assert scaled.allowed(x, np.array([100.0, 0.001]), 2.0**-16) == pytest.approx([0.1, 2.0**-15])
    limits = {f.name: f.tolerance.text for f in table.functions(True)}
    assert limits["gelu (erf)"] == limits["softmax"] == "5e-4" and limits["rmsnorm"] == "2e-3"


def result(table: Any, error: float, relative: float | None = None, right: bool = True) -> dict[str, Any]:
    """A result with the same figures on both ranges."""
    figures = {
        "points": 4,
        "max_abs_error": error,
        "max_relative_error": relative,
        "max_error_in_tolerances": error / 5e-4,
        "worst": {"x": 0.5, "expected": 1.0, "got": 1.0 + error},
        "right": right,
    }
    return {**{within: figures for within in table.RANGES}, "right": right}


def test_ours_is_compared_with_those_that_are_right(table: Any) -> None:
    own = result(table, 1e-4, 1e-4)
    worse, better = result(table, 2e-4, 2e-4), result(table, 5e-5, 2e-4)
    wrong, failed = result(table, 1e-9, 1e-9, right=False), {"failed": "exit code 3"}
    assert table.behind(own, {"a": worse, "b": wrong, "c": failed, "d": {"lacks": True}}) == []
    assert table.behind(own, {"a": better}) == ["a ordinary max_abs_error", "a wide max_abs_error"]
    assert len(table.behind(own, {"a": own})) == 4, "below, not as large"
    exact = result(table, 0.0)
    assert table.behind(exact, {"a": exact}) == [], "nobody is below 0"
    assert len(table.behind(own, {"a": exact})) == 2
    assert len(table.behind({"refused": "no protocol"}, {"a": worse})) == 4


# --- pages ------------------------------------------------------------------------------------------------------------


def test_pages_show_every_verdict(table: Any, pages: Any) -> None:
    broken = result(table, 3.0, right=False)
    broken["wide"] = broken["wide"] | {"max_abs_error": None}
    found = {
        "mpcinfer": result(table, 1e-4, 2e-4),
        "spu": broken,
        "crypten": {"lacks": True},
        "prix-lut": {"failed": "x"},
    }
    rows = [
        ("f", found, ["spu wide max_abs_error"]),
        ("g", found | {"mpcinfer": {"refused": "no protocol for: g"}}, []),
    ]
    report = {
        "machine": {"cpu": "c", "cores": 2, "system": "s", "python": "3", "versions": {"spu": "1"}, "date": "d"},
        "settings": {"parties": [2], "peers": ["spu", "crypten", "prix-lut"], "peer_slack": 10.0},
        "functions": [
            {
                "name": name,
                "tolerance": "5e-4",
                "points": {"ordinary": "near", "wide": "far"},
                "parties": {"2": {"systems": systems, "behind": behind}},
            }
            for name, systems, behind in rows
        ],
    }
    lines = pages.markdown(report).splitlines()
    assert "| f | 5e-4 | near | far |" in lines
    assert "| f | ordinary | 4 | 1.0e-04 | 2.0e-04 | 0.20 | 0.5 | right | yes |" in lines
    assert "| f | wide | 4 | 1.0e-04 | 2.0e-04 | 0.20 | 0.5 | right | no: spu (abs) |" in lines
    assert "| g | ordinary |  |  |  |  |  | refused: no protocol for: g |  |" in lines
    assert "| g | wide |  |  |  |  |  | refused |  |" in lines
    assert "| f | ordinary | 1.0e-04, 2.0e-04 relative | WRONG 3.00 | has none | failed: x |" in lines
    assert "| f | wide | 1.0e-04, 2.0e-04 relative | WRONG not finite | has none | failed |" in lines
    assert not pages.right(report)
    report["functions"].pop()
    assert pages.right(report)


# --- the command ------------------------------------------------------------------------------------------------------


def test_results_are_used_again_if_they_are_of_the_same_points(bench: Any) -> None:
    row = {"name": "relu", "tolerance": "5e-4", "points": {"ordinary": "near", "wide": "far"}}
    systems = {"mpcinfer": {"right": True}, "spu": {"right": True}, "crypten": {"failed": "x"}}
    earlier = {"functions": [row | {"parties": {"2": {"systems": systems}}}]}
    assert bench.reused(earlier, row, 2, ["crypten"]) == {"crypten": {"failed": "x"}}
    assert bench.reused(earlier, row, 2, ["prix-lut"]) == {"prix-lut": {"absent": True}}
    assert bench.reused(earlier, row, 3, ["spu"]) == {"spu": {"absent": True}}
    for change in ({"points": {"ordinary": "near", "wide": "farther"}}, {"tolerance": "5e-5"}, {"name": "gelu"}):
        with pytest.raises(bench.Reused, match="no results of"):
            bench.reused(earlier, row | change, 2, ["spu"])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_command_judges_ours_and_says_why_a_peer_failed(tmp_path: Path) -> None:
    interpreter = tmp_path / "peers" / "prix" / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text('#!/bin/sh\ntest "$1" = -m && exit 0; echo "no such device" >&2; exit 3\n')
    interpreter.chmod(0o755)
    report, page = tmp_path / "accuracy.json", tmp_path / "accuracy.md"
    bench = [sys.executable, str(ROOT / "scripts" / "bench.py")]
    command = [*bench, "accuracy", "--tiny", "--parties", "2", "--functions", "relu", "--peers", "prix-lut"]
    environment = os.environ | {"MPCINFER_CACHE": str(tmp_path)}
    done = subprocess.run(
        [*command, "--json", str(report)], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(report.read_text())["functions"]
    found = row["parties"]["2"]
    ours, peer = found["systems"]["mpcinfer"], found["systems"]["prix-lut"]
    assert ours["right"] and ours["wide"]["max_error_in_tolerances"] <= 1 and found["behind"] == []
    assert "exit code 3" in peer["failed"] and "no such device" in peer["failed"]
    subprocess.run([*bench, "page", str(report), str(page)], check=True, timeout=60)
    assert page.read_text().count("| relu |") == 5
