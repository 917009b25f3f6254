"""The rounds of a run in the order in which they are run, and whose openings each carries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

from mpcinfer.graph.program import Node
from mpcinfer.protocol.tracing import Cost


@dataclass(frozen=True)
class Step:
    """Rounds that follow each other with openings of the same nodes: what a model has to wait for, one by one.

    `first` counts from 1. `layers` and `operators` are those of the nodes, each once; `online_bytes` is what a party
    sends to all others, frame headers included where the caller knows them.
    """

    first: int
    rounds: int
    layers: tuple[str, ...]
    operators: tuple[str, ...]
    online_bytes: int


def steps(cost: Cost, nodes: Mapping[str, Node], parties: int, round_bytes: Callable[[int], int]) -> tuple[Step, ...]:
    """All rounds of a trace. nodes: those of the program, by name; whatever else opens something is "outputs"."""
    found = []
    first = 1
    for scopes, group in groupby(cost.messages, key=lambda message: tuple(sorted(message))):
        messages = list(group)
        opening = [nodes[scope] for scope in scopes if scope in nodes]
        layers = [node.path or node.name for node in opening] + ["outputs"] * (len(opening) < len(scopes))
        sent = sum(round_bytes(message.total()) for message in messages) * (parties - 1)
        found.append(Step(first, len(messages), _once(layers), _once(node.op for node in opening), sent))
        first += len(messages)
    return tuple(found)


def _once(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
