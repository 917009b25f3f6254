"""One of three parties sends another value to one party than to the other: nothing is released, each time."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mpcinfer.party.stepping as stepping
from mpcinfer.wire.mesh import OPENING
from tests.decoders_local import captured_decoder, tiny_decoder
from tests.inprocess import InProcess, kinds, mlp, plain, random_weights, reveal
from tests.party.test_generation import write

PROGRAM = mlp()
WEIGHTS = random_weights(PROGRAM)
X = torch.linspace(-2, 2, 12).reshape(3, 4)
ROUNDS = 9  # of a request, the comparison itself included
TRIALS = 12

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    """Three parties that hold the model "m"; each test leaves them connected."""
    with InProcess(tmp_path_factory.mktemp("cluster"), 3) as running:
        assert [a.version for a in running.caller().deploy(PROGRAM, WEIGHTS)] == [1] * 3
        yield running


class Liar:
    """Party `who` alters one bit of what it opens in round `skip`, counted from now, to party `to` alone."""

    def __init__(self, cluster: InProcess, who: int, to: int, skip: int) -> None:
        epoch = cluster.parties[who].former.current
        assert epoch is not None
        link, self.left = epoch.mesh.links[to], skip
        real = link.send

        def send(kind: int, payload: bytes) -> None:
            if kind == OPENING:
                self.left -= 1
                if self.left == -1:
                    altered = bytearray(payload)
                    altered[0] ^= 1 << secrets.randbelow(7)  # the last bits of a message mean nothing
                    payload = bytes(altered)
            real(kind, payload)

        link.send = send  # type: ignore[method-assign]

    @property
    def lied(self) -> bool:
        return self.left < 0


def lie(cluster: InProcess, skip: int, action: Any) -> list[str]:
    """What the parties answer while one of them lies, once they are all connected again."""
    who = secrets.randbelow(3)
    to = (who + 1 + secrets.randbelow(2)) % 3
    wait = cluster.new_epoch()
    liar = Liar(cluster, who, to, skip)
    answers = action()
    assert liar.lied
    wait()
    return kinds(answers)


def caught(found: list[str]) -> bool:
    """Whether nobody has an answer, and somebody says why; who hears of it first may hang up on the others."""
    return "TamperingError" in found and set(found) <= {"TamperingError", "AbortedError"}


def test_of_a_request_in_any_round(cluster: InProcess) -> None:
    caller = cluster.caller()
    assert (reveal(caller.infer(X)) - plain(WEIGHTS, X)).abs().max() < 1e-3
    for trial in range(TRIALS):
        assert caught(lie(cluster, trial % ROUNDS, lambda: caller.infer(X)))
    assert (reveal(caller.infer(X)) - plain(WEIGHTS, X)).abs().max() < 1e-3


def test_of_the_masked_weights_of_a_deployment(cluster: InProcess) -> None:
    caller, before = cluster.caller(), cluster.files()
    assert caught(lie(cluster, 0, lambda: caller.deploy(PROGRAM, WEIGHTS, "other")))
    assert cluster.files() == before
    assert all(m.name == "m" for p in cluster.parties.values() for m in p.catalogue.models())


def test_of_a_token(tmp_path: Path) -> None:
    captured = captured_decoder(tiny_decoder(layers=1))
    with InProcess(tmp_path, 3) as cluster:
        caller = cluster.caller()
        caller.deploy(captured.program, dict(captured.weights))
        text = write(caller, [1, 2], 3)
        assert text.step()[0].outputs  # now the masks are open
        text.rest()
        running = write(caller, [1, 2], 3)
        answers: list[Any] = running.step()
        assert answers[0].outputs
        found = lie(cluster, 5, lambda: _last(running))
        assert caught(found)


def _last(text: Any) -> list[Any]:
    """The answers of the step that fails; those before it were true."""
    while True:
        answers: list[Any] = text.step()
        if any(isinstance(a, Exception) for a in answers):
            # a token that one party has released already is no token without the others' shares
            assert not all(getattr(a, "outputs", ()) for a in answers)
            rest = [a if isinstance(a, Exception) else text.step()[i] for i, a in enumerate(answers)]
            return rest


def test_it_is_the_comparison_that_catches_it(cluster: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the parties answer, and some answer is wrong: not each bit matters to each."""
    caller = cluster.caller()
    assert (reveal(caller.infer(X)) - plain(WEIGHTS, X)).abs().max() < 1e-3
    monkeypatch.setattr(stepping, "hmac", SimpleNamespace(compare_digest=lambda *_: True))
    errors = []
    for _ in range(8):
        Liar(cluster, 2, 0, 0)
        errors.append((reveal(caller.infer(X)) - plain(WEIGHTS, X)).abs().max())
    assert max(errors) > 1e-2
    monkeypatch.undo()
    assert (reveal(caller.infer(X)) - plain(WEIGHTS, X)).abs().max() < 1e-3
