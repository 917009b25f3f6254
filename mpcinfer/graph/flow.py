"""Nodes of a graph run as soon as what they refer to is there; what runs at the same time shares its rounds."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from typing import Any

import torch

from mpcinfer.graph.program import Node
from mpcinfer.protocol.context import Begun, Opening


class Flow:
    """Awaited, it runs all nodes. `begin` makes a node's coroutine, `finish` takes what it yields.

    What has only `Begun` is there for others from then on, and its rest runs beside them.

    nodes: in an order in which each follows those it refers to; names that no node has are there from the start.
    The order of openings in a message, and so what is sent, depends on the graph only.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        begin: Callable[[Node], Coroutine[Any, Any, Any]],
        finish: Callable[[Node, Any], None],
    ) -> None:
        self._nodes = nodes
        self._begin, self._finish = begin, finish
        places = {node.name: i for i, node in enumerate(nodes)}
        self._missing: list[int] = []
        self._users: Mapping[int, list[int]] = defaultdict(list)
        for i, node in enumerate(nodes):
            sources = {places[name] for name in node.references if name in places}
            self._missing.append(len(sources))
            for source in sources:
                self._users[source].append(i)
        self._ready = [i for i, missing in enumerate(self._missing) if not missing]
        self._running: dict[int, tuple[Coroutine[Any, Any, Any], list[Opening]]] = {}
        self._begun: set[int] = set()  # those of which only the rest is running

    def __await__(self) -> Generator[list[Opening], list[torch.Tensor], None]:
        try:
            while True:
                while self._ready:
                    i = heapq.heappop(self._ready)
                    self._resume(i, self._begin(self._nodes[i]), None)
                if not self._running:
                    return
                batch = sorted(self._running.items())
                values = yield [opening for _, (_, part) in batch for opening in part]
                at = 0
                for i, (steps, part) in batch:
                    del self._running[i]
                    self._resume(i, steps, values[at : at + len(part)])
                    at += len(part)
        finally:  # one that raised ends the others
            for steps, _ in self._running.values():
                steps.close()

    def _resume(self, i: int, steps: Coroutine[Any, Any, Any], values: list[torch.Tensor] | None) -> None:
        try:
            self._running[i] = steps, steps.send(values)
        except StopIteration as done:
            if i in self._begun:
                return
            value = done.value
            if isinstance(value, Begun):
                self._begun.add(i)
                self._resume(i, value.rest, None)
                value = value.value
            self._finish(self._nodes[i], value)
            for user in self._users[i]:
                self._missing[user] -= 1
                if not self._missing[user]:
                    heapq.heappush(self._ready, user)
