"""A step of a session: some more tokens of a text go through a Program with caches, and the next one is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpcinfer.errors import UnsupportedError
from mpcinfer.graph.interpret import EvaluateNode, Holdings, evaluate, evaluated, released, released_of_several
from mpcinfer.graph.lifted import Lifted
from mpcinfer.graph.program import Program
from mpcinfer.nn.sampling import Choice, Seen, next_token, next_tokens
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.types import Cached, Shared

ROOM = 32  # capacities of caches are multiples of this, so that a plan serves as many steps
CHUNK = 32  # tokens of a prompt in one step, at most


@dataclass(frozen=True)
class Stepped:
    """The caches after a step. If a token was chosen: it, and what may leave of it (and of the logits, if they may).

    `logits` is their shape; `counts` are of tokens, if a penalty has counted them (see `nn.sampling.Seen`).
    """

    caches: list[Cached]
    token: Shared | None = None
    outputs: tuple[Shared, ...] = ()
    logits: tuple[int, ...] = ()
    counts: Shared | None = None


def capacity(rows: int) -> int:
    """The room that a cache of so many rows is given."""
    return -(-rows // ROOM) * ROOM


async def step(
    program: Program,
    ctx: Context,
    holdings: Holdings,
    tokens: Shared,
    caches: Mapping[str, Cached],
    choice: Choice | None,
    before: Seen | None = None,
    evaluate_node: EvaluateNode | None = None,
) -> Stepped:
    """Evaluate tokens [1, l] after those whose keys and values the caches hold.

    choice: how the next token is chosen; None if there is none to choose, since more of the prompt follows. before: the
    tokens so far, the new ones too, for a penalty. The chosen token stays shared: [1, 1], to be fed back.
    """

    grown, logits = await _evaluated(program, ctx, {**holdings, **caches}, tokens, choice, evaluate_node)
    if choice is None:
        return Stepped(grown)
    _check(logits, Shared)
    row = logits.map(lambda t: t[0])
    token, counts = await next_token(ctx.scope("mpc.sampling"), row, before, choice, program.frac_bits)
    token = token.map(lambda t: t.reshape(1, 1))
    outputs = [released(ctx.scope("output0"), token)]
    if program.reveal == "logits":
        outputs.append(released(ctx.scope("output1"), logits))
    return Stepped(grown, token, tuple(outputs), logits.shape, counts)


async def steps(
    program: Program,
    ctx: Context,
    holdings: Holdings,
    tokens: Lifted,
    caches: Mapping[str, Lifted],
    choice: Choice | None,
    before: Sequence[Seen | None],
    evaluate_node: EvaluateNode | None = None,
) -> list[Stepped]:
    """As `step`, of several texts in one run, which may have different lengths: of each what its step yields.

    The caches have the new rows only.
    """
    count, new = tokens.count, tokens.shape[1]
    grown, logits = await _evaluated(program, ctx, {**holdings, **caches}, tokens, choice, evaluate_node)
    added = [[_last_rows(cache.value, i, new) for cache in grown] for i in range(count)]
    if choice is None:
        return [Stepped(own) for own in added]
    _check(logits, Lifted)
    rows = logits.value.map(lambda t: t[:, 0])
    chosen, counts = await next_tokens(ctx.scope("mpc.sampling"), rows, before, choice, program.frac_bits)
    token = Lifted(chosen.map(lambda t: t.reshape(count, 1, 1)))
    outputs = [released_of_several(ctx.scope("output0"), token, count)]
    if program.reveal == "logits":
        outputs.append(released_of_several(ctx.scope("output1"), logits, count))
    return [
        Stepped(added[i], token.of(i), tuple(x.of(i) for x in outputs), logits.shape, counts[i]) for i in range(count)
    ]


def _last_rows(cache: Cached, text: int, count: int) -> Cached:
    """The last rows of one of several texts' caches."""
    share, masked = (t[text][..., -count:, :] for t in (cache.share, cache.masked))
    return Cached(cache.name, share, masked, cache.capacity, cache.frac_bits)


async def _evaluated(
    program: Program,
    ctx: Context,
    values: Mapping[str, Any],
    tokens: Any,
    choice: Choice | None,
    evaluate_node: EvaluateNode | None,
) -> tuple[list[Any], Any]:
    """The grown caches, and the logits if a token is to be chosen."""

    def node_rule(node: Any, at: Mapping[str, Any]) -> Any:
        return evaluate(node, ctx, at, program.frac_bits)

    wanted = [cache.result for cache in program.caches] + [r.name for r in program.results if choice is not None]
    values = {**values, program.inputs[0].name: tokens}
    found = await evaluated(program, wanted, values, evaluate_node or node_rule)
    return found[: len(program.caches)], found[-1]


def _check(logits: Any, kind: type[Any]) -> None:
    if not isinstance(logits, kind) or len(logits.shape) != 2 or logits.shape[0] != 1:
        raise UnsupportedError("a model with caches yields the logits of the next token only, [1, vocabulary]")
