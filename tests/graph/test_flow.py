"""Nodes share rounds, what has only begun too, and nothing that has begun is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mpcinfer.errors import ProtocolError
from mpcinfer.graph.flow import Flow
from mpcinfer.graph.program import Node, Ref
from mpcinfer.protocol.context import Begun, Context, drive, whole
from mpcinfer.protocol.local import LocalWorld
from mpcinfer.protocol.truncate import Truncation
from mpcinfer.protocol.types import Shared
from tests.openings import seed

NODES = [Node("begun", "", (), {}), Node("user", "", (Ref("begun"),), {}), Node("last", "", (Ref("user"),), {})]


async def opened(ctx: Context, x: Shared) -> torch.Tensor:
    return (await ctx.open(x, ctx.correlation(Truncation(x.shape, 1)).mask("r"))).value


async def run(ctx: Context, x: Shared, nodes: list[Node], fail: str = "") -> tuple[dict[str, Any], list[str]]:
    """What the nodes yield, and what has ended, in order: the first hands on a list that its rest fills."""
    values: dict[str, Any] = {}
    ended: list[str] = []

    async def rule(name: str) -> Any:
        box: list[torch.Tensor] = []

        async def rest() -> None:
            try:
                box.append(await opened(ctx.scope("begun"), x))
            finally:
                ended.append("rest")

        if name == "begun":
            return Begun(box, rest())
        own = await opened(ctx.scope(name), x)
        if name == fail:
            raise ProtocolError("failed")
        return own, len(values["begun"])

    await Flow(nodes, lambda node: rule(node.name), lambda node, value: values.update({node.name: value}))
    return values, ended


def test_the_rest_runs_beside_what_uses_it(parties: int) -> None:
    world = LocalWorld(parties, seed("flow"))
    results = world.run(lambda ctx, x: run(ctx, x, NODES), world.share(torch.arange(3)))
    for values, ended in results:
        assert len(values["begun"]) == 1 and ended == ["rest"]
        assert values["user"][1] == values["last"][1] == 1  # it was there when their own openings were
    assert world.transcript.rounds == 2


def test_a_rest_that_nobody_uses_is_run(parties: int) -> None:
    world = LocalWorld(parties, seed("flow"))
    for values, _ in world.run(lambda ctx, x: run(ctx, x, NODES[:1]), world.share(torch.arange(3))):
        assert len(values["begun"]) == 1
    assert world.transcript.rounds == 1


def test_a_rest_ends_with_the_others() -> None:
    ends: list[str] = []
    nodes = [Node("begun", "", (), {}), Node("bad", "", (), {})]

    async def rest() -> None:
        try:
            await whole(None)
            await opened(world_context, Shared(torch.arange(3)))
            await opened(world_context, Shared(torch.arange(3)))
        finally:
            ends.append("rest")

    async def rule(name: str) -> Any:
        if name == "begun":
            return Begun(1, rest())
        raise ProtocolError("failed")

    class Source:
        def draw(self, name: str, item: Any) -> Any:
            return {n: torch.zeros(f.shape, dtype=torch.int64) for n, f in {**item.free(), **item.derived()}.items()}

    world_context = Context(0, 2, Source())

    async def flow() -> None:
        await Flow(nodes, lambda node: rule(node.name), lambda node, value: None)

    with pytest.raises(ProtocolError, match="failed"):
        drive(flow(), lambda batch: [o.masked for o in batch])
    assert ends == ["rest"]
