"""The next token: greedy, drawn at a temperature, among the top k, with a penalty, against plaintext and statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

import mpcinfer.nn.sampling as sampling
from mpcinfer.errors import InputError
from mpcinfer.nn.sampling import MAX_PENALTY, MAX_TEMPERATURE, UNIT_BITS, Choice, Seen, next_token, smallest
from mpcinfer.protocol.context import Context, together
from mpcinfer.protocol.local import LocalWorld, Transcript
from mpcinfer.protocol.tracing import Cost, trace
from mpcinfer.protocol.types import Shared
from tests.openings import seed

ONE = 1 << 16
GREEDY = Choice()


def fixed(*values: float) -> torch.Tensor:
    return torch.tensor([round(v * ONE) for v in values])


def choose(
    logits: torch.Tensor,
    choice: Choice,
    parties: int = 2,
    before: list[int] | None = None,
    draws: int = 1,
    *key: object,
    bits: int = 16,
) -> tuple[list[int], Transcript]:
    """As many tokens as `draws`, all from the same logits, with so many fraction bits, and at the same time."""
    world = LocalWorld(parties, seed("sampling", *key))

    async def protocol(ctx: Context, x: Shared, fresh: Shared) -> list[Shared]:
        seen = Seen(None, fresh)
        drawn = await together(*(next_token(ctx.scope(f"{i}"), x, seen, choice, bits) for i in range(draws)))
        return [token for token, _ in drawn]

    results = world.run(protocol, world.share(logits, bits), world.share(torch.tensor(before or [0])))
    assert all(token.shape == () and token.frac_bits == 0 for each in results for token in each)
    return [int(world.reveal(tokens)) for tokens in zip(*results, strict=True)], world.transcript


# --- settings ------------------------------------------------------------------------------------------------------


def test_choices() -> None:
    assert Choice.of(0.0, 0, 1.0) == GREEDY and not GREEDY.penalises
    made = Choice.of(0.7, 40, 1.3)
    assert made == Choice(round(0.7 * 4096), 40, round(1.3 * 4096)) == made.check() and made.penalises
    for choice in (Choice.of(MAX_TEMPERATURE, 0, MAX_PENALTY), Choice.of(0.0, 1, 1 / MAX_PENALTY)):
        assert choice.check() == choice


@pytest.mark.parametrize(
    ("temperature", "top_k", "penalty", "what"),
    [
        (-0.1, 0, 1.0, "temperature"),
        (MAX_TEMPERATURE + 0.01, 0, 1.0, "temperature"),
        (float("nan"), 0, 1.0, "temperature"),
        (float("inf"), 0, 1.0, "temperature"),
        (1.0, -1, 1.0, "top_k"),
        (1.0, 1 << 24, 1.0, "top_k"),
        (1.0, 0, 0.0, "penalty"),
        (1.0, 0, 1 / MAX_PENALTY - 0.01, "penalty"),
        (1.0, 0, MAX_PENALTY + 0.01, "penalty"),
        (1.0, 0, float("nan"), "penalty"),
        (1.0, 0, -1.0, "penalty"),
    ],
)
def test_choices_out_of_range(temperature: float, top_k: int, penalty: float, what: str) -> None:
    with pytest.raises(InputError, match=what):
        Choice.of(temperature, top_k, penalty)


@pytest.mark.parametrize("choice", [Choice(-1), Choice(1 << 15), Choice(0, -1), Choice(0, 1 << 24), Choice(0, 0, 0)])
def test_what_a_client_sends_is_checked(choice: Choice) -> None:
    with pytest.raises(InputError):
        choice.check()


# --- greedy --------------------------------------------------------------------------------------------------------


def test_greedy_takes_the_largest_and_of_equals_the_first(parties: int) -> None:
    assert choose(fixed(1, 5, -3, 4.9999), GREEDY, parties)[0] == [1]
    assert choose(fixed(2, 7, 7, 7, 0), GREEDY, parties)[0] == [1]
    assert choose(fixed(0, 0, 0), GREEDY, parties)[0] == [0]
    assert choose(fixed(-8000, -7999.5, -8000), GREEDY, parties)[0] == [1]
    assert choose(fixed(5), GREEDY, parties)[0] == [0]
    assert choose(fixed(8000, -8000, 8000.0001), GREEDY, parties)[0] == [2]


# --- temperature ---------------------------------------------------------------------------------------------------

DRAWS = 2000
HEAD = torch.linspace(-1.5, 1.5, 20)[torch.randperm(20, generator=torch.Generator().manual_seed(1))]


def frequencies(choice: Choice, *key: object, parties: int = 2) -> np.ndarray:
    """How often each token is drawn: what chooses one works on an axis of draws, too."""
    world = LocalWorld(parties, seed("draws", *key))
    heads = fixed(*HEAD.tolist()).expand(DRAWS, 20).contiguous()
    results = world.run(lambda ctx, x: next_token(ctx, x, None, choice), world.share(heads, 16))
    results = [token for token, _ in results]
    return np.bincount(world.reveal(results).numpy(), minlength=20)


def p_value(counts: np.ndarray, temperature: float = 1.0) -> float:
    expected = torch.softmax(HEAD.double() / temperature, 0).numpy() * counts.sum()
    return float(stats.chisquare(counts, expected).pvalue)


@pytest.mark.parametrize("world", range(5))
def test_draws_follow_the_softmax(world: int) -> None:
    assert p_value(frequencies(Choice.of(1.0, 0, 1.0), world)) > 1e-3


def test_draws_follow_the_softmax_at_another_temperature_and_with_three_parties() -> None:
    counts = frequencies(Choice.of(0.5, 0, 1.0), "half", parties=3)
    assert p_value(counts, 0.5) > 1e-3
    assert p_value(counts) < 1e-6


def test_noise_that_is_too_large_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sampling.gumbel
    # shares are multiplied by integers only: by 333 / 256
    monkeypatch.setattr(
        sampling, "gumbel", lambda ctx, shape, bits: Shared(real(ctx, shape, bits - 8).share * 333, bits)
    )
    assert p_value(frequencies(Choice.of(1.0, 0, 1.0), "fault")) < 1e-3


def test_a_few_draws_are_as_the_noise_says(parties: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The argmax of logits + T g, for the very g that was dealt."""
    noise: list[list[torch.Tensor]] = []
    real = sampling.gumbel

    def noted(ctx: Context, shape: tuple[int, ...], bits: int) -> Shared:
        made = real(ctx, shape, bits)
        noise.append([made.share])
        return made

    monkeypatch.setattr(sampling, "gumbel", noted)
    for i in range(3):
        noise.clear()
        ((token,), _) = choose(fixed(*HEAD.tolist()), Choice.of(1.7, 0, 1.0), parties, None, 1, i)
        g = torch.stack([share for (share,) in noise]).sum(0).double() / ONE
        assert len(noise) == parties and token == int((HEAD.double() + 1.7 * g).argmax())


# --- top k ---------------------------------------------------------------------------------------------------------


def kept(x: torch.Tensor, k: int, parties: int = 2) -> torch.Tensor:
    """Which of the numbers stay in reach."""
    world = LocalWorld(parties, seed("top"))
    results = world.run(lambda ctx, s: sampling._only_top(ctx, s, k), world.share(x, 16))
    y = world.reveal(results)
    assert set((x - y).tolist()) <= {0, 1 << 30}  # as it was, or 2^14 lower
    return y == x


@pytest.mark.parametrize("k", range(1, 20))
def test_the_top_k(k: int) -> None:
    x = fixed(*HEAD.tolist())
    found = kept(x, k)
    assert int(found.sum()) == k and bool(found[x.topk(k).indices].all())


def test_the_top_of_three_parties() -> None:
    x = fixed(1, 3, 2, -1)
    assert kept(x, 2, 3).tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("values", "k", "expected"),
    [
        ([5, 5, 5, 5], 2, [True] * 4),  # the largest are always kept
        ([5, 4, 4, 4, 1], 2, [True, False, False, False, False]),  # of equals at the border none
        ([5, 4, 4, 1], 3, [True, True, True, False]),
        ([5, 5, 4, 4, 1], 3, [True, True, False, False, False]),
        ([0, -40, -31.9, -33], 3, [True, False, True, False]),  # e^-32 is as good as nothing
        ([0.0, -(2.0**-16), -(2.0**-15)], 2, [True, True, False]),
    ],
)
def test_ties_at_the_border(values: list[float], k: int, expected: list[bool]) -> None:
    assert kept(fixed(*values), k).tolist() == expected


@pytest.mark.parametrize("k", [1, 2, 5, 19, 20, 21])
def test_draws_never_leave_the_top_k(k: int) -> None:
    top = set(HEAD.topk(min(k, 20)).indices.tolist())
    tokens, _ = choose(fixed(*HEAD.tolist()), Choice.of(4.0, k, 1.0), 2, None, 6, k)
    assert set(tokens) <= top


@pytest.mark.parametrize("bits", [8, 16, 19, 20, 21, 22, 24])
def test_logits_of_any_scale(bits: int) -> None:
    """What is out of reach, by top_k or by itself, is so at scales whose differences 48 bits cannot hold, too."""
    logits = torch.tensor([round(v * 2.0**bits) for v in (5.0, 4.9, 8191.0, 8190.0, -8191.0, 0.0)])
    tokens, _ = choose(logits[:2], Choice.of(1.0, 1, 1.0), 2, None, 12, bits=bits)
    assert set(tokens) == {0}
    tokens, _ = choose(logits[2:], Choice.of(1.0, 2, 1.0), 2, None, 12, bits=bits)
    assert set(tokens) <= {0, 1}
    tokens, _ = choose(logits[2:], Choice.of(1.0, 0, 1.0), 2, None, 12, bits=bits)
    assert set(tokens) <= {0, 1}


def test_any_of_equals_may_be_drawn() -> None:
    tokens, _ = choose(fixed(*[3.0] * 6), Choice.of(1.0, 2, 1.0), 2, None, 20)
    assert len(set(tokens)) > 2


def test_smallest_needs_no_ties() -> None:
    world = LocalWorld(2, seed("smallest"))
    results = world.run(lambda ctx, s: smallest(ctx, s, 3, 10), world.share(torch.tensor([0, 7, 1023, 1024, 5, 9])))
    assert world.reveal(results).tolist() == [1, 1, 0, 0, 1, 0]


# --- penalty -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [1.2, 2.0, 8.0, 0.5, 1 / MAX_PENALTY])
def test_a_penalty_is_that_of_the_formula(parties: int, penalty: float) -> None:
    x = fixed(*(HEAD * 4).tolist(), 0)
    before = [3, 5, 3, 19, 20, 3]
    world = LocalWorld(parties, seed("penalty"))
    units = Choice.of(0.0, 0, penalty).penalty
    results = world.run(
        lambda ctx, s, b: sampling._penalised(ctx, s, Seen(None, b), units),
        world.share(x, 16),
        world.share(torch.tensor(before)),
    )
    assert world.reveal([counts for _, counts in results]).tolist() == [before.count(i) for i in range(21)]
    results = [penalised for penalised, _ in results]
    y, exact = world.reveal(results).double() / ONE, x.double() / ONE
    seen = torch.zeros(21, dtype=torch.bool)
    seen[before] = True
    expected = torch.where(seen, torch.where(exact > 0, exact / penalty, exact * penalty), exact)
    assert torch.equal(y[~seen], exact[~seen])
    assert float((y - expected).abs().max()) < float(exact.abs().max()) * 2.0**-UNIT_BITS + 2.0**-15


def test_what_was_counted_need_not_be_counted_again(parties: int) -> None:
    x, choice = fixed(3, 5, 4, -1), Choice.of(0.0, 0, 2.0)
    world = LocalWorld(parties, seed("counts"))

    async def protocol(ctx: Context, x: Shared, first: Shared, second: Shared) -> list[Shared]:
        _, counts = await next_token(ctx.scope("first"), x, Seen(None, first), choice)
        token, counts = await next_token(ctx.scope("second"), x, Seen(counts, second), choice)
        assert counts is not None
        return [token, counts]

    first, second = (world.share(torch.tensor([i])) for i in (1, 2))
    results = world.run(protocol, world.share(x, 16), first, second)
    token, counts = (world.reveal(shares) for shares in zip(*results, strict=True))
    assert int(token) == 0 and counts.tolist() == [0, 1, 1, 0]


def test_a_penalty_changes_what_is_chosen(parties: int) -> None:
    x = fixed(3, 5, 4, -1)
    assert [choose(x, Choice.of(0.0, 0, 2.0), parties, before)[0][0] for before in ([0], [1], [1, 2], [3, 3])] == [
        1, 2, 0, 1,
    ]  # fmt: skip


# --- cost ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "more_rounds"),
    [
        (GREEDY, 0),
        (Choice.of(1.0, 0, 1.0), 0),
        (Choice.of(0.0, 0, 1.5), 11),
        (Choice.of(1.0, 5, 1.0), 12 + 8 * 11 + 4),  # the maximum, the search, what is below
        (Choice.of(0.0, 5, 1.0), 0),  # greedy is in the top of any size
    ],
)
def test_costs(parties: int, choice: Choice, more_rounds: int) -> None:
    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, device="meta")

    def traced(choice: Choice) -> Cost:
        plan, cost, token = trace(
            lambda ctx: next_token(ctx, Shared(meta(20), 16), Seen(None, Shared(meta(7))), choice), parties=parties
        )
        token = token[0]
        assert token.shape == ()
        assert not any(mask.startswith("Gumbel") for mask in cost.openings)
        return cost

    cost, least = traced(choice), traced(GREEDY)
    assert cost.rounds == least.rounds + more_rounds
    _, seen = choose(fixed(*HEAD.tolist()), choice, parties, list(range(7)))
    assert (seen.rounds, seen.bytes_sent) == (cost.rounds, cost.bytes_sent)


def test_messages_depend_on_nothing_but_shapes_and_the_choice() -> None:
    choice = Choice.of(0.8, 3, 1.3)
    transcripts = [
        [(label, bits, value.shape) for label, bits, value in choose(x, choice, 2, before)[1].openings]
        for x, before in ((fixed(1, 2, 3, 4, 5), [0, 0]), (fixed(7, 7, 7, -7, 7), [4, 1]))
    ]
    assert transcripts[0] == transcripts[1]
