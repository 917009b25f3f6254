"""What the openings of a step of a decoder show: nothing, whatever the text. The four tests of tests/openings.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from mpcinfer.graph.plan import Planner
from mpcinfer.graph.step import step
from mpcinfer.nn.sampling import Choice, Seen
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.types import Shared
from mpcinfer.ring.domain import Z64
from tests.decoders_local import VOCABULARY, captured_decoder, tiny_decoder, token_ids, with_room
from tests.models_local import deploy_local
from tests.openings import (
    View,
    assert_differences,
    assert_each_mask_opens_once,
    assert_indistinguishable,
    assert_uniform,
    faulty_masks,
    observe,
    seed,
)

MODEL = tiny_decoder(layers=1, heads=2, kv_heads=1, head_dim=8, hidden=8, width=8)
CAPTURED = captured_decoder(MODEL)
PROGRAM = CAPTURED.program
CHOICE = Choice.of(1.0, 0, 1.2)
LENGTH, ROOM, SYMBOLS = 8, 32, 1 << 12


def view(tokens: list[int], *key: object) -> View:
    """Party 0's view of two steps: tokens of a text, and the last of them."""
    world, holdings = deploy_local(CAPTURED, 2, seed(*key))

    async def steps(ctx: Context, all_ids: Shared) -> list[Shared]:
        first, last = (all_ids.map(lambda t, at=at: t[:, at]) for at in (slice(0, -1), slice(-1, None)))
        own = holdings[ctx.index]
        begun = await step(PROGRAM, ctx.scope("first"), own, first, with_room(PROGRAM, None, ROOM), None)
        caches = with_room(PROGRAM, begun.caches, ROOM)
        done = await step(
            PROGRAM, ctx.scope("last"), own, last, caches, CHOICE, Seen(None, all_ids.map(lambda t: t[0]))
        )
        return list(done.outputs)

    return observe(steps, torch.tensor([tokens]), key=seed(*key), world=world, weights=holdings)


def views(tokens: list[int], runs: int = 8) -> list[View]:
    """Of several runs: what is opened over 64 bits, rows and products. Of narrower rings a step opens too little."""
    seen = [view(tokens, "run", i) for i in range(runs)]
    return [View([o for o in each.opened if o.ring == Z64], each.own) for each in seen]


# (i)


@pytest.mark.parametrize("tokens", [1, 4])
def test_each_mask_hides_one_opening(parties: int, tokens: int) -> None:
    for choice in (None, Choice(), Choice.of(0.0, 0, 1.2)):
        plan, cost, _ = Planner(PROGRAM, parties=parties).step(tokens, ROOM, choice, LENGTH)
        assert_each_mask_opens_once(plan, cost, parties)
        masked = [(item.cache, item.shape) for _, item in plan.entries if item.growing]  # type: ignore[attr-defined]
        assert masked == [(c.name, (1, 1, tokens, 8)) for c in PROGRAM.caches]  # of each new row, once


# (ii)


def test_openings_differ_by_what_the_values_differ() -> None:
    a, b = token_ids(LENGTH, 1), token_ids(LENGTH, 2)
    first, second = ([torch.tensor([ids[:-1]]), torch.tensor([ids[:-1]])] for ids in (a, b))
    hidden = [
        first[0] - second[0],
        functional.one_hot(first[1], VOCABULARY) - functional.one_hot(second[1], VOCABULARY),
    ]
    assert_differences(view(a, "same"), view(b, "same"), hidden)


def test_equal_texts_under_other_seeds_share_nothing() -> None:
    first, second = (view(token_ids(LENGTH), "other", run) for run in range(2))
    for x, y in zip(first.opened, second.opened, strict=True):
        assert x.label == y.label and (x.value.numel() * x.ring.bits < 64 or not torch.equal(x.value, y.value))


# (iii)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [[0] * LENGTH, [VOCABULARY - 1] * LENGTH, token_ids(LENGTH)])
def test_openings_of_steps_are_uniform(tokens: list[int]) -> None:
    assert_uniform(views(tokens), symbols=SYMBOLS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        {"change": lambda mask, ring: mask & ((1 << 63) - 1) if ring == Z64 else mask},
        {"name": lambda name, field: (field,)},
    ],
    ids=["one bit short", "one mask for all"],
)
def test_faults_show(monkeypatch: pytest.MonkeyPatch, fault: dict[str, Any]) -> None:
    faulty_masks(monkeypatch, **fault)
    with pytest.raises(AssertionError, match="not uniform"):
        assert_uniform(views([0] * LENGTH), symbols=SYMBOLS)


# (iv)


def joined(tokens: list[int], runs: int) -> View:
    """Many runs as if they were one, an axis of runs first."""
    seen = [view(tokens, tokens[0], i) for i in range(runs)]
    whole = View()
    for ours, theirs in ((whole.opened, [v.opened for v in seen]), (whole.own, [v.own for v in seen])):
        for parts in zip(*theirs, strict=True):
            x = torch.stack([p.value for p in parts])
            ours.append(type(parts[0])(parts[0].label, parts[0].ring, x.reshape(runs, -1)))
    return whole


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_texts_cannot_be_told_apart() -> None:
    assert_indistinguishable(joined([0] * LENGTH, 120), joined([VOCABULARY - 1] * LENGTH, 120), 120)
