"""Hosts that deviate, in a cluster with witnesses: each deviation is caught, and nothing leaves an honest host.

The adversary here is consistent: what it has altered it goes on computing with, so that only somebody who computes the
same on the same share can tell. With the comparison removed, each of these attacks succeeds and nobody notices.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mpcinfer.party.stepping as stepping
from mpcinfer.client.cluster import Connection
from mpcinfer.client.data import Client
from mpcinfer.client.owner import ModelOwner
from mpcinfer.errors import MpcInferError, TamperingError
from mpcinfer.graph.capture import capture
from mpcinfer.party.server import Party
from mpcinfer.party.vouching import Vouching
from mpcinfer.protocol.context import Opening
from tests.inprocess import Caller, InProcess, kinds, mlp, plain, random_weights, reveal

PROGRAM = mlp()
WEIGHTS = random_weights(PROGRAM)
X = torch.linspace(-2, 2, 12).reshape(3, 4)
HIGH = 1 << 40  # what an addition of it does to an output, nobody can overlook

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    """Two parties, each with a witness, and a model "m"."""
    with InProcess(tmp_path_factory.mktemp("witnesses"), 2, witnesses=(0, 1)) as running:
        assert kinds(running.caller().deploy(PROGRAM, WEIGHTS)) == ["DeployResponse"] * 4
        yield running


@pytest.fixture(scope="module")
def caller(cluster: InProcess) -> Caller:
    return cluster.caller()


@pytest.fixture
def blind(monkeypatch: Patch) -> None:
    """The planted fault: nobody compares."""
    monkeypatch.setattr(Vouching, "exchange", lambda *_: None)


def right(answers: list[Any]) -> bool:
    return bool((reveal(answers) - plain(WEIGHTS, X)).abs().max() < 1e-3)


def altered(opening: Opening, value: int) -> None:
    """This party adds (or, to bits, XORs) something to one number of its share of an opening."""
    share = opening.masked.clone()
    at = secrets.randbelow(share.numel())
    one = torch.tensor(value - (1 << 64) if value >> 63 else value)
    share.view(-1)[at] = opening.ring.add(share.view(-1)[at], one.to(share.dtype))
    opening.masked = share


class Deviation:
    """A host that does something else in one round of openings."""

    def __init__(self, monkeypatch: Patch, host: Party, do: Callable[[list[Opening]], None]) -> None:
        """do: told the openings of each round that opens anything."""
        original = stepping._exchange

        def exchange(epoch: Any, batch: list[Opening], *rest: Any) -> Any:
            if epoch is host.lane._epoch and batch:
                do(batch)
            return original(epoch, batch, *rest)

        monkeypatch.setattr(stepping, "_exchange", exchange)


def rounds_of_a_request(cluster: InProcess, caller: Caller) -> int:
    """In how many rounds of a request for X something is opened, once the masks of weights are."""
    assert right(caller.infer(X))
    answer = caller.infer(X)[0]
    return int(answer.online.rounds) - 1  # in the last one, what was opened is compared


def flip_one_bit(cluster: InProcess, caller: Caller, host: Party, rounds: int) -> list[Any]:
    """One trial: the host alters one bit, at a random step, on one request. The answers."""
    wait, at, seen = cluster.new_epoch(), secrets.randbelow(rounds), [0]

    def flip(batch: list[Opening]) -> None:
        if seen[0] == at and (opening := batch[secrets.randbelow(len(batch))]).masked.numel():
            altered(opening, 1 << secrets.randbelow(opening.ring.bits))
        seen[0] += 1

    with pytest.MonkeyPatch.context() as patch:
        Deviation(patch, host, flip)
        answers = caller.infer(X)
    assert seen[0] > at
    wait()
    return answers


def caught(answers: list[Any], *suspects: int) -> bool:
    """Whether nothing was released, and somebody was told whom to suspect."""
    said = [str(a) for a in answers if isinstance(a, TamperingError)]
    named = all(f"party {i}" in text.partition("Suspect")[2] for i in suspects for text in said)
    return all(isinstance(a, MpcInferError) for a in answers) and bool(said) and named


# --- honest ------------------------------------------------------------------------------------------------------


def test_with_witnesses_answers_are_right_and_each_is_vouched_for(cluster: InProcess, caller: Caller) -> None:
    answers = caller.infer(X)
    assert right(answers)
    assert [len(a.outputs) for a in answers] == [1, 1, 0, 0]
    assert [len(a.commitment) for a in answers] == [0, 0, 32, 32]


def test_owner_and_client_need_not_know_of_witnesses(cluster: InProcess) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)).eval()
    expected = model(X)
    keys = cluster.keys
    with Connection(keys.cluster, keys.identity("owner/alice")) as connection:
        ModelOwner(connection).upload(capture(model, (X,)), name="torch")
    with Connection(keys.cluster, keys.identity("client/bob")) as connection:
        client = Client(connection)
        assert (client.infer("torch", X) - expected).abs().max() < 1e-3
        assert [s.role for s in client.status()] == ["party/0", "party/1", "witness/0", "witness/1"]


@pytest.mark.parametrize("watched", [(1,), pytest.param((0, 2), marks=pytest.mark.slow)])
def test_some_parties_may_have_witnesses(tmp_path: Path, watched: tuple[int, ...]) -> None:
    with InProcess(tmp_path, max(watched) + 1, witnesses=watched) as running:
        caller = running.caller()
        caller.deploy(PROGRAM, WEIGHTS)
        assert right(caller.infer(X))


# --- parties that deviate ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("trials", [20, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_one_bit_of_one_opening(cluster: InProcess, caller: Caller, trials: int) -> None:
    rounds = rounds_of_a_request(cluster, caller)
    for trial in range(trials):
        culprit = trial % 2
        assert caught(flip_one_bit(cluster, caller, cluster.parties[culprit], rounds), culprit)
    assert right(caller.infer(X))


def test_without_the_comparison_one_bit_goes_unnoticed(cluster: InProcess, caller: Caller, blind: None) -> None:
    rounds = rounds_of_a_request(cluster, caller)
    with pytest.MonkeyPatch.context() as patch:
        seen = [0]

        def spoil(batch: list[Opening]) -> None:
            seen[0] += 1
            if seen[0] == rounds:
                altered(batch[0], 1 << batch[0].ring.bits - 1)

        Deviation(patch, cluster.parties[1], spoil)
        answers = caller.infer(X)
    assert kinds(answers) == ["InferResponse"] * 4 and not right(answers)
