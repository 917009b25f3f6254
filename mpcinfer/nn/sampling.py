"""The next token of a text, chosen under encryption: greedy, or at a temperature, among the top k, with a penalty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mpcinfer.errors import InputError
from mpcinfer.nn.elementwise import width
from mpcinfer.protocol.context import Context, together
from mpcinfer.protocol.gumbel import gumbel
from mpcinfer.protocol.lookup import one_hot
from mpcinfer.protocol.multiply import multiply
from mpcinfer.protocol.select import indicators, piecewise_linear, step
from mpcinfer.protocol.tournament import argmax_along, maximum_along
from mpcinfer.protocol.truncate import truncate
from mpcinfer.protocol.types import Shared

UNIT_BITS = 12  # temperature and penalty are multiples of 2^-12
MAX_TEMPERATURE, MAX_PENALTY = 4.0, 8.0
# logits further below the largest are as good as none: e^-32
_DEPTH_BITS = 5
_DIGIT = 2  # bits a step of the search for the k-th largest: more bytes than with one, fewer rounds
_NARROW = 31  # fraction bits of logits with noise, with which 48 bits hold the differences of any two
_COUNT_WIDTH = 32  # of comparisons of numbers of tokens


@dataclass(frozen=True)
class Choice:
    """How a token is chosen: public. temperature (0: greedy) and penalty (1: none) in units of 2^-12; top_k 0: all."""

    temperature: int = 0
    top_k: int = 0
    penalty: int = 1 << UNIT_BITS

    @staticmethod
    def of(temperature: float, top_k: int, penalty: float) -> Choice:
        """From real numbers; InputError for one out of range."""
        if not 0 <= temperature <= MAX_TEMPERATURE:
            raise InputError(f"temperature must be from 0 (greedy) to {MAX_TEMPERATURE:g}")
        if not 1 / MAX_PENALTY <= penalty <= MAX_PENALTY:
            raise InputError(f"repetition_penalty must be from {1 / MAX_PENALTY:g} to {MAX_PENALTY:g}; 1 is none")
        if not 0 <= top_k < 1 << 24:
            raise InputError("top_k must be a number of tokens, or 0 for all")
        return Choice(round(temperature * 2**UNIT_BITS), top_k, round(penalty * 2**UNIT_BITS))

    def check(self) -> Choice:
        """This, unless it is out of range."""
        return Choice.of(self.temperature / 2**UNIT_BITS, self.top_k, self.penalty / 2**UNIT_BITS)

    @property
    def penalises(self) -> bool:
        """Whether it matters which tokens there were before."""
        return self.penalty != 1 << UNIT_BITS


@dataclass(frozen=True)
class Seen:
    """The tokens of a text: how often each was counted so far, [V] (None: none was), and those not counted yet, [m]."""

    counts: Shared | None
    fresh: Shared


async def next_token(
    ctx: Context, logits: Shared, before: Seen | None, choice: Choice, frac_bits: int = 16
) -> tuple[Shared, Shared | None]:
    """The index of the chosen one of the logits [V], an integer, []; and how often each token has been there so far.

    frac_bits: the program's. Logits that have more (see `graph.postpone`) are compared as they are, but truncated
    before they are changed, a round more.
    before: the tokens so far, needed for a penalty, which counts those that were not counted; else there are no counts.
    A penalty p divides positive logits of tokens that were there by p and multiplies negative ones (Keskar et al.
    2019). A temperature T: the argmax of logits + T g for independent Gumbel noise g (Gumbel-max), whose shares are
    dealt, so the dealer knows the noise, and no more. With top_k, what is not among the k largest is pushed below
    reach; of equal logits at the border none is kept unless all fit (but the largest always is).
    Logits must stay below 2^13. Rounds and bytes: `argmax_along`, for a penalty 11 rounds more, for top_k those of a
    maximum, 8 for each of 11 steps of a search, and 4.
    """
    x, counts = logits, None
    if choice.penalises or choice.temperature:
        x = await truncate(ctx.scope("logits"), x, x.frac_bits - min(x.frac_bits, frac_bits))
    if choice.penalises:
        assert before is not None
        x, counts = await _penalised(ctx.scope("penalty"), x, before, choice.penalty)
    if choice.temperature:
        if 0 < choice.top_k < x.shape[-1]:
            x = await _only_top(ctx.scope("top"), x, choice.top_k)
        noise = gumbel(ctx.scope("noise"), x.shape, x.frac_bits)
        x = x.rescaled(x.frac_bits + UNIT_BITS)
        x = x + Shared(noise.share * choice.temperature, x.frac_bits)
        # what was pushed below reach is up to 2^15 lower than what was not
        return (await argmax_along(ctx, x, 64 if x.frac_bits > _NARROW else width(x)))[1], counts
    return (await argmax_along(ctx, x, width(x)))[1], counts


async def next_tokens(
    ctx: Context, logits: Shared, before: Sequence[Seen | None], choice: Choice, frac_bits: int = 16
) -> tuple[Shared, list[Shared | None]]:
    """As `next_token`, of the logits [k, V] of several texts at once: [k], and of each text the counts.

    What looks at other tokens of a text, or at ranks, is done for one text beside the other.
    """
    if not choice.penalises and not choice.top_k:
        return (await next_token(ctx, logits, None, choice, frac_bits))[0], [None] * logits.shape[0]

    async def one(i: int) -> tuple[Shared, Shared | None]:
        return await next_token(ctx.scope(str(i)), logits.map(lambda t: t[i]), before[i], choice, frac_bits)

    found = await together(*(one(i) for i in range(logits.shape[0])))
    return Shared(torch.stack([token.share for token, _ in found])), [counts for _, counts in found]


async def _penalised(ctx: Context, x: Shared, before: Seen, penalty: int) -> tuple[Shared, Shared]:
    counts = (await one_hot(ctx, before.fresh, x.shape[-1])).map(lambda t: t.sum(0))
    if before.counts is not None:
        counts = counts + before.counts
    seen = await step(ctx, counts, (1,), (0, 1), _COUNT_WIDTH)
    one, inverse = 1 << UNIT_BITS, round(2 ** (2 * UNIT_BITS) / penalty)
    change = await piecewise_linear(ctx, x, (0,), (penalty - one, inverse - one), (0, 0), width(x))
    change = await truncate(ctx, Shared(change.share, x.frac_bits + UNIT_BITS), UNIT_BITS)
    return x + await multiply(ctx, change, seen), counts


async def _only_top(ctx: Context, x: Shared, k: int) -> Shared:
    """x, with 2^14 subtracted from all but the k largest."""
    top = await maximum_along(ctx, x, width(x))
    below = top.map(lambda t: t.unsqueeze(-1)) - x
    kept = await smallest(ctx, below, k, _DEPTH_BITS + x.frac_bits)
    far = 1 << (14 + x.frac_bits)
    return Shared(x.share + far * kept.share - (far if ctx.first else 0), x.frac_bits)


async def smallest(ctx: Context, x: Shared, k: int, bits: int) -> Shared:
    """[x < t], integers, for the largest t from 1 to 2^bits such that at most k elements of x >= 0 [V] are below it.

    If more than k elements are 0, these are taken.
    """
    x = Shared(x.share - (1 if ctx.first else 0), x.frac_bits)  # from here on t is counted from 1
    while bits > 0:
        digit = min(bits, _DIGIT)
        bits -= digit
        steps = tuple(j << bits for j in range(1, 1 << digit))
        counts = (await indicators(ctx, x, steps, width(x))).map(lambda t: t.sum(-1))
        # t may go up by as many steps as there are thresholds with few enough elements below them
        few = await step(ctx, counts, (k + 1,), (1, 0), _COUNT_WIDTH)
        x = Shared(x.share - (few.share.sum() << bits), x.frac_bits)
    return (await indicators(ctx, x, (0,), width(x))).map(lambda t: t[0])
