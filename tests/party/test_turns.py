"""Texts that are written in one run: each gets what it gets alone, and what befalls one is no matter to the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mpcinfer.graph.lifted as lifted
import mpcinfer.party.generation as generation
from mpcinfer.nn.sampling import Choice
from mpcinfer.party.session import Run, Sessions, Slot, Supply
from mpcinfer.party.turns import write as real_write
from mpcinfer.party.writing import Need
from mpcinfer.protocol.cache import RowStore
from tests.decoders_local import decoder, plain_logits, token_ids
from tests.inprocess import Caller, InProcess, wait_for
from tests.party.test_generation import CAPTURED, LIMITS, Streams, epoch, requests, right, slots, write
from tests.party.test_lane import Gate

pytestmark = pytest.mark.timeout(240)

TEXTS = [token_ids(6), [7, 3, 9, 2], token_ids(9, 3)]


@pytest.fixture(params=[2, pytest.param(3, marks=pytest.mark.slow)], ids="n={}".format)
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[InProcess]:
    with InProcess(tmp_path, request.param, replace(LIMITS, max_sessions=16)) as running:
        running.caller().deploy(CAPTURED.program, dict(CAPTURED.weights))
        yield running


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many texts each run at party 0 is, as they come."""
    seen: list[int] = []

    async def counted(by: Any, members: Sequence[Any]) -> Any:
        if by.index == 0:
            seen.append(len(members))
        return await real_write(by, members)

    monkeypatch.setattr(generation, "write", counted)
    return seen


def begun(cluster: InProcess, ask: Sequence[Callable[[], Streams]]) -> list[Streams]:
    """Requests that have waited for each other."""
    gate = Gate(cluster.parties[1].lane)
    first = write(cluster.caller(), token_ids(3), 1)
    assert gate.reached.wait(60)
    streams = [each() for each in ask]
    wait_for(lambda: all(len(p.inbox) == 1 + len(ask) for p in cluster.parties.values()))
    gate.open.set()
    assert first.rest()[-1] is None
    return streams


def rests(streams: Sequence[Streams]) -> list[list[Any]]:
    with ThreadPoolExecutor(len(streams)) as pool:
        return list(pool.map(lambda s: s.rest(), streams))


def same_rows(cluster: InProcess) -> bool:
    """Whether the dealer and all parties have counted the same rows of all texts."""
    wait_for(lambda: not any(p.lane._busy for p in cluster.parties.values()))
    held = [{s.slot.id: s.slot.count for s in p.lane._sessions._sessions.values()} for p in cluster.parties.values()]
    ahead = {
        s.slot.id: s.slot.supply.ahead.rows if s.slot.supply is not None and s.slot.supply.ahead is not None else 0
        for s in cluster.parties[0].lane._sessions._sessions.values()
    }
    assert not any(ahead.values())
    return all(each == slots(cluster) for each in held)


def test_texts_of_different_lengths_are_one_run(cluster: InProcess, together: list[int]) -> None:
    current = epoch(cluster)
    answers = rests(begun(cluster, [lambda t=t: write(cluster.caller(), t, 6) for t in TEXTS]))  # type: ignore[misc]
    for text, found in zip(TEXTS, answers, strict=True):
        assert found[-1] is None and len(found) == 7 and right(found[:-1], text)
    # the prompts are taken in one by one, since they differ; then there is one run for all
    assert together[1:] == [1, 1, 1, *[3] * 5]
    assert epoch(cluster) is current and same_rows(cluster)


def test_a_text_that_ends_or_goes_leaves_the_others_alone(cluster: InProcess, together: list[int]) -> None:
    current, most = epoch(cluster), [12, 3, 12]
    asks = [lambda t=t, n=n: write(cluster.caller(), t, n) for t, n in zip(TEXTS, most, strict=True)]  # type: ignore[misc]
    streams = begun(cluster, asks)
    streams[2].step()
    streams[2].step()
    streams[2].cancel()
    answers = rests(streams[:2])
    for i, found in enumerate(answers):
        assert found[-1] is None and len(found) == most[i] + 1 and right(found[:-1], TEXTS[i])
    assert 3 in together and 1 in together[4:]
    # what was fetched for them together and never used masks nothing: new rows are counted on from there
    fork = write(cluster.caller(), [5], 3, streams[0].session, 4)
    assert right(fork.rest()[:-1], [*TEXTS[0][:4], 5])
    assert epoch(cluster) is current


def test_rows_that_only_some_texts_leave_out_are_noticed(
    cluster: InProcess, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: what was fetched for several texts is left out by the first only."""

    def forgetful(supply: Supply) -> None:
        rows = sum(run.rows for run in supply.ready) + (supply.ahead.rows if supply.ahead is not None else 0)
        supply.ready.clear()
        supply.ahead = None
        supply.slots[0].skip(rows)

    monkeypatch.setattr(Supply, "drop", forgetful)
    asks = [lambda t=t, n=n: write(cluster.caller(), t, n) for t, n in zip(TEXTS, (25, 25, 25), strict=True)]  # type: ignore[misc]
    streams = begun(cluster, asks)
    for _ in range(3):
        streams[2].step()
    streams[2].cancel()
    assert 3 in together and any(found[-1] is not None for found in rests(streams[:2]))


def test_a_run_that_gives_a_text_what_is_another_s_is_noticed(
    cluster: InProcess, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: an operator that reaches along the axis of texts."""
    real = lifted._PREPARE["mpc.linear"]

    def mixed(args: Any, kwargs: Any) -> Any:
        (x, *rest), kwargs = real(args, kwargs)  # type: ignore[misc]
        return [x.map(lambda t: t.roll(1, 0)), *rest], kwargs

    monkeypatch.setitem(lifted._PREPARE, "mpc.linear", mixed)
    answers = rests(begun(cluster, [lambda t=t: write(cluster.caller(), t, 8) for t in TEXTS]))  # type: ignore[misc]
    assert 3 in together
    assert not all(right(found[:-1], text) for text, found in zip(TEXTS, answers, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("style", ["gpt2", "llama"])
@pytest.mark.parametrize("choice", [Choice(), Choice.of(0.0, 0, 2.0)], ids=["greedy", "penalty"])
def test_every_style_and_choice(tmp_path: Path, style: str, choice: Choice, together: list[int]) -> None:
    model, captured = decoder(style)
    with InProcess(tmp_path, 2, replace(LIMITS, max_sessions=16)) as cluster:
        cluster.caller().deploy(captured.program, dict(captured.weights))

        def ask(text: Sequence[int]) -> Streams:
            caller: Caller = cluster.caller()
            each = requests(caller.n, text, 5)
            for message in each:
                message.temperature, message.top_k = choice.temperature, choice.top_k
                message.repetition_penalty = choice.penalty
            return Streams(caller, each)

        answers = rests(begun(cluster, [lambda t=t: ask(t) for t in TEXTS]))  # type: ignore[misc]
    assert 3 in together
    for text, found in zip(TEXTS, answers, strict=True):
        assert found[-1] is None and len(found) == 6
        seen = list(text)
        for token in found[:-1]:
            logits = plain_logits(model, seen)
            for each in set(seen) if choice.penalises else ():
                logits[each] = logits[each] / 2 if logits[each] > 0 else logits[each] * 2
            assert float(logits.max() - logits[token]) < 5e-3
            seen.append(token)


@pytest.mark.slow
def test_where_the_dealer_is_audited_each_text_has_tapes_of_its_own(tmp_path: Path, together: list[int]) -> None:
    with InProcess(tmp_path, 2, replace(LIMITS, max_sessions=16, dealer_audit_rate=0.2)) as cluster:
        cluster.caller().deploy(CAPTURED.program, dict(CAPTURED.weights))
        answers = rests(begun(cluster, [lambda t=t: write(cluster.caller(), t, 3) for t in TEXTS]))  # type: ignore[misc]
    assert all(right(found[:-1], text) for text, found in zip(TEXTS, answers, strict=True))
    assert set(together) == {1}


def slot(name: str) -> Slot:
    return Slot(name.encode() * 16, {"k": RowStore()}, {"k": RowStore()})


def test_a_supply_is_that_of_exactly_these_texts() -> None:
    a, b, c = map(slot, "abc")
    both = Supply.of([a, b])
    assert Supply.of([a, b]) is both and a.supply is b.supply is both
    one = Supply.of([a, c])
    assert one is not both and a.supply is c.supply is one and Supply.of([b]) is b.supply is not both
    assert {s.count for s in (a, b, c)} == {0}


def test_a_supply_that_one_of_its_texts_has_left_is_not_taken_up_again() -> None:
    a, b = map(slot, "ab")
    both = Supply.of([a, b])
    alone = Supply.of([b])
    alone.ready.append(Run(None, b"", 3, 0.0))  # type: ignore[arg-type]
    assert a.supply is both
    again = Supply.of([a, b])
    assert again is not both and a.supply is b.supply is again
    # the rows that the dealer has given masks are left out
    assert not alone.ready and (a.count, b.count) == (0, 3)


def test_texts_share_a_run_if_none_needs_twice_the_room_of_another() -> None:
    short, long, longer = (Need.of(rows, 0, 1, Choice()).alike() for rows in (32, 33, 129))
    assert short != long and long != longer
    assert Need.of(96, 0, 1, Choice()).alike() == long and Need.of(224, 0, 1, Choice()).alike() == longer
    assert Need.of(33, 0, 1, Choice()).alike() != Need.of(33, 0, 2, Choice()).alike() != Need.of(33, 0, 2, None).alike()
    penalty = Choice.of(0.0, 0, 2.0)
    assert Need.of(33, 32, 1, penalty).alike() != Need.of(33, 30, 1, penalty).alike()


def test_sessions_say_for_how_many_steps_there_is_randomness() -> None:
    assert Sessions(2, 10, 10.0).ahead() == 0
