"""What a request will cost as the parties will count it: the trace's prices in the frames of the wire."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpcinfer.graph.explain import Explanation, explain, explain_step
from mpcinfer.graph.program import Program
from mpcinfer.wire.frames import COMPARED, dealt_bytes, round_bytes

_WIRE: dict[str, Any] = {"round_bytes": round_bytes, "dealt_bytes": dealt_bytes, "compared": COMPARED}


def price(program: Program, shapes: Sequence[tuple[int, ...]], *, parties: int = 2) -> Explanation:
    """The price of one request with inputs of these shapes, layer by layer; its total is what `last_cost` will say.

    But `last_cost` also counts the few bytes of the parties' vote on the offline phase, and time as it is, not as the
    cost model of `graph.explain` expects it. ShapeError for shapes that the program does not take.
    """
    return explain(program, shapes, parties=parties, **_WIRE)


def price_of_step(program: Program, tokens: int, rows: int, *, parties: int = 2) -> Explanation:
    """The price of a step of a language model: `tokens` new ones after `rows` others, and the choice of the next."""
    return explain_step(program, tokens, rows, parties=parties, **_WIRE)
