"""scripts/bench models, peers, generate and growth without a cluster: workloads, verdicts, turns, pages and plots."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpcinfer.models.decoder import Decoder

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    """Imports a module of scripts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield importlib.import_module


@pytest.fixture(scope="module")
def models(scripts: Any) -> Any:
    """The workloads."""
    return scripts("bench_models")


@pytest.fixture(scope="module")
def cases(scripts: Any) -> Any:
    """What measures one of them."""
    return scripts("bench_cases")


@pytest.fixture(scope="module")
def pages(scripts: Any) -> Any:
    """Tables and pages."""
    return scripts("bench_report")


# --- workloads --------------------------------------------------------------------------------------------------------


def test_our_modules_and_the_graphs_of_peers_are_the_same_models(models: Any) -> None:
    for name, make in models.WORKLOADS["peers"].items():
        workload = make(True)
        if workload.text is not None or workload.reveal == "argmax":
            continue
        with torch.no_grad():
            got = workload.model(torch.from_numpy(workload.arrays["x"]).float())
        assert workload.judged(got.numpy(), 16)["right"], name
        assert np.abs(got.numpy().reshape(-1) - workload.reference.reshape(-1)).max() < 2e-4, name


@pytest.mark.parametrize("decode", [True, False])
def test_the_graph_of_a_language_model_is_what_we_deploy(models: Any, decode: bool) -> None:
    workload = models.text(decode, tiny=True)
    model, prompt = workload.text.loaded.module, torch.tensor([workload.text.prompt])
    assert isinstance(model, Decoder)
    with torch.no_grad():
        logits, *caches = model(prompt, *model.empty_caches())
        if decode:
            logits, *_ = model(logits.argmax(-1, keepdim=True), *caches)
    assert np.abs(logits.numpy() - workload.reference).max() < 1e-4
    assert workload.judged(logits.numpy(), 16)["same_top"]


def test_commands_have_workloads_by_default(models: Any) -> None:
    for command, names in models.DEFAULT.items():
        assert set(names) <= set(models.WORKLOADS[command])
    assert "bert" not in models.DEFAULT["peers"]


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_an_argmax_is_judged_by_what_it_chose(models: Any) -> None:
    workload = models.WORKLOADS["peers"]["argmax"](True)
    x = workload.arrays["x"][0]
    assert workload.judged(np.array([x.argmax()]), 16) == {"max_abs_error": 0.0, "right": True}
    second = np.argsort(x)[-2]
    assert workload.judged(np.array([second]), 16) == {"max_abs_error": x.max() - x[second], "right": False}
    for nowhere in (-1, x.size, 1.5, np.nan):
        assert not workload.judged(np.array([nowhere]), 16)["right"]


def test_a_model_is_judged_by_its_cosine_and_peers_have_slack(models: Any, cases: Any) -> None:
    workload = models.minilm(True)
    exact = workload.judged(workload.reference, 16)
    assert exact["right"] and exact["cosine"] == pytest.approx(1) and exact["max_abs_error"] == 0
    y = workload.reference.reshape(-1)
    aside = np.eye(y.size)[0] - y * y[0] / (y @ y)
    tilted = y + aside * np.linalg.norm(y) / np.linalg.norm(aside) * 0.03  # cosine 0.99955
    assert not workload.judged(tilted, 16)["right"]
    assert workload.judged(tilted, 16, cases.PEER_SLACK)["right"]
    assert not workload.judged(-y, 16, cases.PEER_SLACK)["right"]


def test_what_is_not_finite_or_not_there_is_wrong(models: Any) -> None:
    for make in (models.minilm, models.WORKLOADS["peers"]["gpt2-16"], models.WORKLOADS["peers"]["max"]):
        workload = make(True)
        broken = workload.reference.copy()
        broken.reshape(-1)[0] = np.nan
        judged = workload.judged(broken, 16, 1e9)
        assert judged["max_abs_error"] is None and not judged["right"]
        json.dumps(judged, allow_nan=False)
        assert not workload.judged(np.zeros(0), 16)["right"]


# --- turns ------------------------------------------------------------------------------------------------------------


class FakeParties:
    """A peer that answers every call, or fails at one."""

    def __init__(self, peer: Any, log: list[str], fails: str = "") -> None:
        self.peer, self.log, self.fails, self.starts = peer, log, fails, 1

    def call(self, do: str, timeout: float, **arguments: Any) -> list[dict[str, Any]]:
        from bench_peers.host import PeerFailed

        variant = arguments["case"].rpartition(" ")[2]
        self.log.append(f"{do} {variant}")
        if f"{do} {variant}" == self.fails:
            self.fails = ""
            self.starts += 1
            raise PeerFailed("exit code 3")
        if do == "finish":
            np.save(arguments["output"], np.zeros((4, 16)))
        return [{"seconds": 2.0, "bytes_sent": 1, "rounds": 1, "first_run_seconds": 1.0, "peak_rss_bytes": 1}]

    def stop(self) -> None:
        """Nothing runs."""
        self.log.append("stop")


@pytest.fixture
def turns(cases: Any, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Measures a workload with a fake SPU: the row, and who did what."""

    class Own:
        def __init__(self, log: list[str], workload: Any) -> None:
            self.log = log

        def run(self) -> None:
            self.log.append("ours")

        def finish(self) -> dict[str, Any]:
            return {"online": {"seconds": 0.5}, "total": {"seconds": 1.0}, "right": True}

    monkeypatch.setattr(cases, "Own", Own)

    def measured(fails: str = "", **changes: Any) -> tuple[Any, list[str]]:
        from dataclasses import replace

        log: list[str] = []
        workload = replace(models.WORKLOADS["peers"]["matmul16"](True), **changes)
        spu = FakeParties(cases.PEERS["spu"], log, fails)
        row = cases.measure(workload, log, {"spu": spu}, tmp_path, 2, lambda text: None)
        return row, log

    return measured


def test_all_run_in_turn(turns: Any) -> None:
    row, log = turns()
    once = ["ours", "run default", "run cached"]
    assert log == ["prepare default", "prepare cached", *once, *once, "finish default", "finish cached"]
    assert row["ratios"] == {"online_vs_spu_total": 4.0, "total_vs_spu_total": 2.0}
    assert row["peers"]["spu"]["right"] is False and len(row["peers"]["spu"]["samples"]) == 2


def test_what_is_large_runs_with_one_variant_at_a_time(turns: Any) -> None:
    _, log = turns(large=True)
    for variant in ("default", "cached"):
        turn = ["ours", f"run {variant}"]
        assert log[:7] == [f"prepare {variant}", *turn, *turn, f"finish {variant}", "stop"]
        del log[:7]
    assert not log


def test_what_does_not_fit_into_memory_is_not_begun(turns: Any, cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    monkeypatch.setitem(cases.PEERS, "spu", replace(cases.PEERS["spu"], large_bytes=16 << 30))
    monkeypatch.setattr(cases, "_free_bytes", lambda: 8 << 30)
    row, log = turns(large=True)
    assert "needs 17 GB" in row["peers"]["spu"]["failed"] and not any("prepare" in line for line in log)
    assert "prepare default" in turns()[1]
    monkeypatch.undo()
    assert cases._free_bytes() > 1 << 28


def test_a_variant_that_fails_takes_no_other_along(turns: Any) -> None:
    row, log = turns("run default")
    assert log.count("prepare cached") == 2 and log.count("prepare default") == 1
    assert row["peers"]["spu"]["variant"] == "cached"
    assert row["peers"]["spu"]["other_variants"] == {"default": "exit code 3"}


class FakeTexts:
    """Parties that write, and the clients who ask them; `known`: how much of a text they still have."""

    def __init__(self, known: bool = True) -> None:
        self.known, self.clients, self.asked = known, 0, list[int]()

    def connect(self) -> FakeTexts:
        self.clients += 1
        return self

    def close(self) -> None:
        """Nothing is open."""

    def generate(self, name: str, ids: list[int], max_new_tokens: int, timeout: float) -> Any:
        from mpcinfer.client.generation import Piece, StepCost

        assert max_new_tokens == 1
        self.asked.append(len(ids))
        again = len(self.asked) > 1 and len(ids) > min(self.asked)

        class Answer:
            logits = [torch.tensor([float(len(ids))])]
            cached_tokens = len(ids) - 1 if again and self.known else 0
            prompt_cost = StepCost(1.0, 1.0, 1, 1, 1)

            def __iter__(self) -> Iterator[Piece]:
                yield Piece("", 7, StepCost(0.5, 0.25, 10, 100, 1000), ())

        self.known = True
        return Answer()


def text_case(cases: Any, models: Any, texts: FakeTexts, decode: bool) -> Any:
    case = object.__new__(cases.OurText)
    case.ours, case.workload, case.timeout = texts, models.text(decode, tiny=True), 1.0
    case._client, case._written, case.samples = None, [], []
    return case


def test_every_prompt_is_new(cases: Any, models: Any) -> None:
    texts = FakeTexts()
    case = text_case(cases, models, texts, False)
    for _ in range(3):
        case.run()
    assert texts.asked == [8, 8, 8] and texts.clients == 3
    assert case.samples[0]["online"] == {"seconds": 1.5, "rounds": 11, "bytes_sent_per_party": 101}
    assert case.output == [8]


def test_tokens_follow_each_other_and_the_first_is_judged(cases: Any, models: Any) -> None:
    texts = FakeTexts()
    case = text_case(cases, models, texts, True)
    for _ in range(3):
        case.run()
    assert texts.asked == [8, 9, 10, 11] and texts.clients == 1 and len(case.samples) == 3
    assert case.output == [9]
    texts.known = False
    case.run()
    assert texts.asked[4:] == [12, 13], "a whole text is no token"
    for _ in range(19):
        case.run()
    assert texts.asked[-2:] == [8, 9] and max(texts.asked) == 31, "a text that is full is followed by a new one"


# --- pages and plots --------------------------------------------------------------------------------------------------


def own(seconds: float = 0.5, right: bool = True) -> dict[str, Any]:
    return {
        "online": {"seconds": seconds, "rounds": 4, "bytes_sent_per_party": 1e6},
        "offline": {"seconds": seconds, "bytes_sent_by_dealer": 2e6},
        "total": {"seconds": 2 * seconds, "client_seconds": 3 * seconds},
        "deploy_seconds": 1.0,
        "peak_rss_bytes": {"party": 5e8, "dealer": 4e8},
        "max_abs_error": 1e-4,
        "right": right,
    }


def report(command: str, rows: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    on = {"cpu": "c", "cores": 2, "system": "s", "python": "3", "versions": {"mpcinfer": "1"}, "date": "d"}
    networks = {"loopback": None, "wan": {"round_trip": 0.0402, "fast_round_trip": 0.04, "bandwidth": 199e6}}
    common = {"parties": 2, "repeat": 5, "peers": [], **settings}
    on |= {"load_before": 0.1, "load_after": 2.0}
    return {"command": command, "machine": on, "settings": common, "networks": networks, "rows": rows}


def test_pages_have_a_section_for_each_network_and_mark_what_is_wrong(pages: Any, scripts: Any, tmp_path: Path) -> None:
    theirs = {"seconds": 3.0, "variant": "cached", "rounds": 9, "bytes_sent_per_party": 3e6, "max_abs_error": 24.0}
    peers = {
        "spu": theirs | {"right": False, "cosine": -0.45, "misread": 3},
        "crypten": {"failed": "x", "variant": "v"},
    }
    ratios = {"online_vs_spu_total": 6.0, "total_vs_spu_total": 3.0}
    rows = [
        {"network": network, "name": "W", "ours": own(), "peers": peers, "ratios": ratios}
        for network in ("loopback", "wan")
    ]
    made = report("peers", rows, peers=["spu", "crypten"])
    page = tmp_path / "peers.md"
    plots = scripts("bench_plots").plot(made, page)
    text = pages.markdown(made, plots)
    assert plots == ["peers-loopback.svg", "peers-wan.svg"]
    assert all(f"![{name[:-4]}]({name})" in text and (tmp_path / name).read_text().count("<svg") for name in plots)
    assert "## Other systems, 2 parties, wan" in text and "a round trip took 40.20 ms, and 199 Mbit/s" in text
    wrong = "WRONG (2.4e+01, cosine -0.4500000); its own decoder misreads 3"
    assert text.count(f"| W | spu | cached | 3,000.0 ms | 9 | 3.00 MB | {wrong} | 6.0x | 3.0x |") == 2
    assert text.count("| W | crypten | v | failed: x |") == 2
    assert pages.right(made)
    first = (tmp_path / plots[0]).read_bytes()
    scripts("bench_plots").plot(made, page)
    assert (tmp_path / plots[0]).read_bytes() == first, "the same picture is the same file"
    rows[0]["ours"]["right"] = False
    assert not pages.right(made)


def test_tokens_have_a_rate(pages: Any) -> None:
    said = {"verdict": "5 of 5 tokens equal", "tokens_per_second": 0.5}
    rows = [{"network": "wan", "name": "a token", "ours": own() | said, "peers": {}, "ratios": {}}]
    rows += [{"network": "wan", "name": "a prompt", "ours": {"failed": "why"}, "peers": {}, "ratios": {}}]
    ((_, (header, lines)),) = pages.tables(report("generate", rows))
    assert header[-1] == "tokens/s" and lines[0][-1] == "0.50" and lines[0][7] == "5 of 5 tokens equal"
    assert lines[1][:2] == ["a prompt", "failed: why"] and len(lines[1]) == len(header)


# --- growth -----------------------------------------------------------------------------------------------------------


def test_work_in_plaintext(scripts: Any) -> None:
    growth = scripts("bench_growth")
    work = growth.plain_work(growth.block(tiny=True), torch.zeros(3, 8, 16))
    assert work["attention.qkv"] == 3 * 8 * 16 * 48 and work["up"] == work["down"] == 3 * 8 * 16 * 32
    assert work["attention"] == 2 * 3 * 8 * 8 * 16
    assert work["activation"] == 3 * 8 * 32 and work["norm"] == 3 * 8 * 16


def grown(scripts: Any, axis: str, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Rows of the tiny block, priced and not run."""
    growth = scripts("bench_growth")
    model = growth.block(tiny=True)
    program = growth.captured(model, 512).program
    rows = []
    for size in sizes:
        x = torch.zeros(size if axis == "batch" else 1, size if axis == "length" else 16, 16)
        steps = growth.steps(program, model, x, size if axis == "parties" else 2)
        rows.append(
            {"network": "wan", "axis": axis, "size": size, "name": f"{axis} {size}", "ours": own(), "steps": steps}
        )
        rows[-1] |= {"plain_seconds": 0.1, "peers": {}, "ratios": {}}
    return rows


@pytest.mark.slow
def test_no_step_grows_faster_than_in_plaintext(scripts: Any, pages: Any, tmp_path: Path) -> None:
    """By price, which is what a run counts. Few numbers are compared in fewer rounds than many, for other bytes: sizes
    here are of one kind.
    """
    axes = {"length": (256, 384, 512), "batch": (16, 64), "parties": (2, 5)}
    rows = [row for axis, sizes in axes.items() for row in grown(scripts, axis, sizes)]
    made = report("growth", rows)
    assert pages.right(made)
    assert len(rows[0]["steps"]) == 8 and all(step["online"] > 0 for step in rows[0]["steps"].values())
    assert {step[:4] for step in map(tuple, pages.growth(rows[-2:]))} == {
        (name, 1.0, 1.0, 1.0) for name in rows[0]["steps"]
    }
    plots = scripts("bench_plots").plot(made, tmp_path / "growth.md")
    assert plots == [f"growth-wan-{axis}.svg" for axis in ("length", "batch", "parties")]
    assert "| attention | " in pages.markdown(made, plots)
    rows[2]["steps"]["up"]["dealer"] *= 3
    assert not pages.right(made)
    assert [line[0] for line in pages.growth_table(rows[:3])[1] if line[-1] == "YES"] == ["up"]
