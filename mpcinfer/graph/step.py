"""A step of a session: some more tokens of a text go through a Program with caches, and the next one is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpcinfer.errors import UnsupportedError
from mpcinfer.graph.interpret import EvaluateNode, Holdings, evaluate, evaluated, released
from mpcinfer.graph.program import Program
from mpcinfer.nn.sampling import Choice, Seen, next_token
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

    def node_rule(node: Any, values: Mapping[str, Any]) -> Any:
        return evaluate(node, ctx, values, program.frac_bits)

    values = {**holdings, **caches, program.inputs[0].name: tokens}
    wanted = [cache.result for cache in program.caches] + [r.name for r in program.results if choice is not None]
    found = await evaluated(program, wanted, values, evaluate_node or node_rule)
    grown = found[: len(program.caches)]
    if choice is None:
        return Stepped(grown)
    logits = found[-1]
    if not isinstance(logits, Shared) or len(logits.shape) != 2 or logits.shape[0] != 1:
        raise UnsupportedError("a model with caches yields the logits of the next token only, [1, vocabulary]")
    row = logits.map(lambda t: t[0])
    token, counts = await next_token(ctx.scope("mpc.sampling"), row, before, choice, program.frac_bits)
    token = token.map(lambda t: t.reshape(1, 1))
    outputs = [released(ctx.scope("output0"), token)]
    if program.reveal == "logits":
        outputs.append(released(ctx.scope("output1"), logits))
    return Stepped(grown, token, tuple(outputs), logits.shape, counts)
