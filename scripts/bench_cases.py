"""One workload measured: ours and the peers' prepare and warm up, then all run in turn.

Definitions are in docs/benchmarks/README.md.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_functions import PEER_SLACK, Tolerance, absolute
from bench_ours import Ours
from bench_peers.host import PEERS, Parties, PeerFailed
from bench_report import Row
from torch import nn

from mpcinfer import Client
from mpcinfer.client.examples import captured_model
from mpcinfer.client.generation import StepCost
from mpcinfer.errors import MpcInferError
from mpcinfer.models.loaded import Loaded

PREPARE_TIMEOUT, RUN_TIMEOUT = 300.0, 180.0  # seconds, for one case of a peer or one request of ours
LARGE = 10  # times as long, for what is large

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Text:
    """A language model, and the ids of a prompt. Measured is what takes the prompt in, or a token after it."""

    loaded: Loaded
    prompt: list[int]
    decode: bool


@dataclass(frozen=True)
class Workload:
    """A computation on fixed arrays: x, the client's, and the model owner's by name; float64.

    Right is what is within the tolerance, or, of a model with `least_cosine`, as close to the reference as that; a peer
    may be `PEER_SLACK` times as far off. `large`: does not fit into memory together with all others.
    """

    name: str
    operation: str  # as the peers' runners know it
    arrays: Arrays
    model: nn.Module | None  # float32, as a user would deploy it
    reference: np.ndarray[Any, Any]
    reveal: str = "logits"
    tolerance: Tolerance = absolute(0.005)
    least_cosine: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # of a graph
    text: Text | None = None  # ours instead of `model`
    large: bool = False

    def judged(self, got: np.ndarray[Any, Any], frac_bits: int, slack: float = 1.0) -> Row:
        """How far a result is off, and whether it is right. JSON knows no infinity: None.

        The error of an argmax is by how much the value chosen is below the maximum.
        """
        if got.size != self.reference.size:
            return {"max_abs_error": None, "right": False}
        if self.operation == "argmax":
            x, index = self.arrays["x"].reshape(-1), float(got.reshape(()))
            error = float(x.max() - x[int(index)]) if 0 <= index < x.size and index % 1 == 0 else float("inf")
            return {"max_abs_error": error if error < float("inf") else None, "right": error == 0}
        y, got = self.reference.reshape(-1), np.asarray(got, np.float64).reshape(-1)
        errors = np.where(np.isfinite(got), np.abs(got - y), np.inf)
        largest = float(errors.max())
        judged: Row = {"max_abs_error": largest if largest < float("inf") else None}
        if self.operation in ("gpt2", "bert", "llama"):
            product = np.linalg.norm(got) * np.linalg.norm(y)
            judged["cosine"] = float(got @ y / product) if product and np.isfinite(product) else None
            judged["same_top"] = bool(got.argmax() == y.argmax())
        if self.least_cosine is not None:
            distance = 1 - judged["cosine"] if judged["cosine"] is not None else float("inf")
            return judged | {"right": bool(distance <= slack * (1 - self.least_cosine))}
        allowed = self.tolerance.allowed(self.arrays["x"].reshape(-1), y, 2.0**-frac_bits)
        return judged | {"right": bool((errors <= slack * allowed).all())}

    def required(self) -> str:
        """What is right, in words."""
        if self.operation == "argmax":
            return "a maximum"
        return f"{self.tolerance.text}" if self.least_cosine is None else f"cosine {self.least_cosine}"


# --- ours -------------------------------------------------------------------------------------------------------------


class OurCase:
    """A workload, deployed."""

    def __init__(self, ours: Ours, workload: Workload) -> None:
        self.ours, self.workload = ours, workload
        self.timeout = RUN_TIMEOUT * (LARGE if workload.large else 1)
        self.samples: list[Row] = []
        self.output = np.empty(0)
        reset_peaks(ours)
        began = time.perf_counter()
        self._deploy()
        self.deploy_seconds = time.perf_counter() - began
        self.frac_bits = ours.owner.models()[-1].outputs[0].frac_bits
        self.first_seconds = self._request()["client"]

    def run(self) -> None:
        """One measured request."""
        self.samples.append(self._request())

    def _deploy(self) -> None:
        assert self.workload.model is not None
        example = torch.from_numpy(self.workload.arrays["x"]).float()
        self.ours.owner.deploy(self.workload.model.eval(), example, name="bench", reveal=self.workload.reveal)

    def _request(self) -> Row:
        began = time.perf_counter()
        self.output = self.ours.client.infer("bench", self.workload.arrays["x"], timeout=self.timeout)
        seconds = time.perf_counter() - began
        cost = self.ours.client.last_cost
        assert cost is not None
        return {"client": seconds, **cost}

    def finish(self) -> Row:
        """The figures; the model is removed."""
        found = figures(self.ours, self.samples)
        self.ours.owner.remove("bench")
        return {
            **found,
            "deploy_seconds": self.deploy_seconds,
            "first_request_seconds": self.first_seconds,
            **self.workload.judged(self.output, self.frac_bits),
        }


class OurText(OurCase):
    """A step of a language model: the prompt of a new text, or the next token of one, a request of its own.

    Parties write on while a client does not look, so that one long answer would disturb whoever has the next turn.
    """

    def _deploy(self) -> None:
        assert self.workload.text is not None
        captured = captured_model(self.workload.text.loaded, reveal="logits")
        self.ours.owner.upload(captured, name="bench")
        self._client: Client | None = None
        self._written: list[int] = []  # of the text, after the prompt

    def _request(self) -> Row:
        text = self.workload.text
        assert text is not None
        length = len(text.prompt) + len(self._written)
        if not text.decode or not self._written or length >= text.loaded.context:
            if self._client is not None:
                self._client.close()
            self._client, self._written = self.ours.connect(), []  # who knows of no text that begins alike
            taken = self._step(text.prompt)
            if not text.decode:
                self._written = []
                return taken
        return self._step(text.prompt + self._written)

    def _step(self, ids: list[int]) -> Row:
        """One more token."""
        assert self._client is not None
        began = time.perf_counter()
        answer = self._client.generate("bench", ids, max_new_tokens=1, timeout=self.timeout)
        (piece,) = answer
        seconds = time.perf_counter() - began
        text = self.workload.text
        assert text is not None
        if len(self._written) == text.decode:  # the step that the reference is of
            self.output = answer.logits[-1].numpy()
        forgotten = bool(self._written) and answer.cached_tokens != len(ids) - 1
        self._written.append(piece.token)
        if forgotten:  # the parties have, after a long time, and took in the whole text
            return self._step(ids + [piece.token])
        return {"client": seconds, **summed([piece.cost, answer.prompt_cost])}

    def finish(self) -> Row:
        """The figures; the model is removed."""
        if self._client is not None:
            self._client.close()
        return super().finish()


def summed(steps: list[StepCost]) -> Row:
    """Steps as one request."""
    return {
        "online": {
            "seconds": sum(step.seconds_online for step in steps),
            "rounds": sum(step.rounds for step in steps),
            "bytes_sent_per_party": sum(step.bytes_sent_per_party for step in steps),
        },
        "offline": {
            "seconds": sum(step.seconds_offline for step in steps),
            "bytes_sent_by_dealer": sum(step.bytes_sent_by_dealer for step in steps),
        },
    }


def figures(ours: Ours, samples: list[Row]) -> Row:
    """Medians over requests; the most memory since `reset_peaks`."""

    def median(phase: str, key: str) -> float:
        return statistics.median(s[phase][key] for s in samples)

    online = [s["online"]["seconds"] for s in samples]
    total = [s["online"]["seconds"] + s["offline"]["seconds"] for s in samples]
    peak = {role: _peak(ours.cluster.pid(role)) for role in ours.roles}
    return {
        "online": {key: median("online", key) for key in ("seconds", "rounds", "bytes_sent_per_party")},
        "offline": {key: median("offline", key) for key in ("seconds", "bytes_sent_by_dealer")},
        "total": {
            "seconds": statistics.median(total),
            "client_seconds": statistics.median(s["client"] for s in samples),
        },
        "peak_rss_bytes": {
            "party": max(size for role, size in peak.items() if role != "dealer"),
            "dealer": peak["dealer"],
        },
        "samples": {"online": online, "total": total},
    }


def reset_peaks(ours: Ours) -> None:
    """Begin to measure the memory of the parties and the dealer from now on."""
    for role in ours.roles:
        Path(f"/proc/{ours.cluster.pid(role)}/clear_refs").write_text("5")


def _peak(pid: int) -> int:
    """The largest resident size of a process since `reset_peaks`, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


# --- peers ------------------------------------------------------------------------------------------------------------


@dataclass
class PeerCase:
    """A workload at a peer, done in one of the ways the peer offers."""

    parties: Parties
    workload: Workload
    directory: Path
    variant: str
    samples: list[float] = field(default_factory=list)
    prepared: list[Row] = field(default_factory=list)
    failed: str = ""
    started: int = 0  # with which start of the parties' processes it was prepared

    def prepare(self) -> None:
        """Share the inputs, compile, warm up."""
        needed, free = self.parties.peer.large_bytes if self.workload.large else 0, _free_bytes()
        if needed > free:  # else the kernel would end whom it likes, this process perhaps
            self.failed = f"needs {needed / 1e9:.0f} GB of memory or more, of which {free / 1e9:.0f} GB were free"
            return
        arguments = {"operation": self.workload.operation, "arrays": str(self.directory / "arrays.npz")}
        self._call("prepare", PREPARE_TIMEOUT, variant=self.variant, settings=self.workload.settings, **arguments)

    def run(self) -> None:
        """One measured run: the slowest party's time."""
        answers = self._call("run", RUN_TIMEOUT)
        if answers:
            self.samples.append(max(answer["seconds"] for answer in answers))

    def finish(self) -> Row:
        """The figures, or why there are none."""
        output = self.directory / "output.npy"
        output.unlink(missing_ok=True)
        answers = self._call("finish", RUN_TIMEOUT, output=str(output))
        if self.workload.large:
            self.parties.stop()  # what it has allocated is needed
        if self.failed:
            return {"failed": self.failed, "variant": self.variant}
        return {
            "seconds": statistics.median(self.samples),
            "variant": self.variant,
            "bytes_sent_per_party": max(answer["bytes_sent"] for answer in self.prepared),
            "rounds": max(answer["rounds"] for answer in self.prepared),
            "first_run_seconds": max(answer["first_run_seconds"] for answer in self.prepared),
            "peak_rss_bytes": {"party": max(answer["peak_rss_bytes"] for answer in answers)},
            "samples": self.samples,
            "misread": max(answer.get("misread", 0) for answer in answers),
            **self.workload.judged(np.load(output), self.parties.peer.frac_bits, PEER_SLACK),
        }

    def _call(self, do: str, timeout: float, **arguments: Any) -> list[Row]:
        if not self.failed and do != "prepare" and self.started != self.parties.starts:
            self.prepare()  # another case has failed and taken the processes along
        if self.failed:
            return []
        timeout *= LARGE if self.workload.large else 1
        try:
            answers = self.parties.call(do, timeout, case=f"{self.workload.name} {self.variant}", **arguments)
        except PeerFailed as error:
            self.failed = str(error)
            return []
        if do == "prepare":
            self.prepared, self.started = answers, self.parties.starts
        return answers


def _free_bytes() -> int:
    """What could be allocated now without taking it from anybody."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def best(rows: list[Row]) -> Row:
    """The fastest of a peer's variants, one that is right if there is one; the other variants' times go with it."""
    chosen = min(rows, key=lambda row: ("failed" in row, not row.get("right"), row.get("seconds", 0.0)))
    others = {row["variant"]: row.get("seconds", row.get("failed")) for row in rows if row is not chosen}
    return {**chosen, "other_variants": others}


# --- both -------------------------------------------------------------------------------------------------------------


class Own:
    """Our side, which may fail as well; then the reason is kept and nothing is tried again."""

    def __init__(self, ours: Ours, workload: Workload) -> None:
        self._failed = ""
        self._case: OurCase | None = None
        self._do(lambda: self._set((OurText if workload.text else OurCase)(ours, workload)))

    def _set(self, case: OurCase) -> None:
        self._case = case

    def _do(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except MpcInferError as error:
            self._failed = self._failed or f"{type(error).__name__}: {error}"
            self._case = None

    def run(self) -> None:
        if self._case is not None:
            self._do(self._case.run)

    def finish(self) -> Row:
        found = self._do(self._case.finish) if self._case is not None else None
        return found if found is not None else {"failed": self._failed}


def measure(
    workload: Workload,
    ours: Ours,
    peers: dict[str, Parties],
    directory: Path,
    repeat: int,
    tell: Callable[[str], None],
) -> Row:
    """One workload: everybody prepares and warms up, then all run in turn, `repeat` times.

    If it is large, each peer has a turn of its own with us.
    """
    arrays = directory / "arrays.npz"
    if peers:
        np.savez(arrays, **workload.arrays)  # type: ignore[arg-type]
    cases = {
        name: [PeerCase(parties, workload, directory, variant) for variant in PEERS[name].ways(workload.operation)]
        for name, parties in peers.items()
    }
    every = [case for several in cases.values() for case in several]
    rows: dict[int, Row] = {}
    with ExitStack() as stack:
        stack.callback(arrays.unlink, missing_ok=True)
        tell(f"{workload.name}: mpcinfer prepares")
        own = Own(ours, workload)
        for group in [[case] for case in every] if workload.large and every else [every]:
            for case in group:
                tell(f"{workload.name}: {case.parties.peer.name} {case.variant} prepares")
                case.prepare()
            for turn in range(repeat):
                tell(f"{workload.name}: run {turn + 1} of {repeat}")
                own.run()
                for case in group:
                    case.run()
            rows.update({id(case): case.finish() for case in group})
        row: Row = {"name": workload.name, "right": workload.required(), "ours": own.finish()}
    row["peers"] = {name: best([rows[id(case)] for case in several]) for name, several in cases.items()}
    row["ratios"] = {
        f"{phase}_vs_{name}_total": peer["seconds"] / row["ours"][phase]["seconds"]
        for name, peer in row["peers"].items()
        for phase in ("online", "total")
        if "failed" not in peer and "failed" not in row["ours"]
    }
    return row
