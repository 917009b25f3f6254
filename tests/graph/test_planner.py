"""What equal nodes ask for is traced once, and nothing that is not equal is taken for it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from mpcinfer.graph import plan as module
from mpcinfer.graph.capture import Captured, capture
from mpcinfer.graph.interpret import evaluated, interpret
from mpcinfer.graph.plan import Planner, constants
from mpcinfer.graph.program import Program
from mpcinfer.graph.step import step
from mpcinfer.models.encoder import Attention
from mpcinfer.nn.sampling import Choice, Seen
from mpcinfer.protocol.piecewise import Pieces
from mpcinfer.protocol.tracing import Cost, Plan, outermost_scope, trace
from mpcinfer.protocol.types import Cached, Shared, Weight
from tests.decoders_local import GREEDY, decoder
from tests.graph.conftest import Case
from tests.models_local import assert_agrees, grid, on_grid
from tests.nn.operators import GROUPS


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def holdings(program: Program) -> dict[str, Any]:
    held: dict[str, Any] = dict(constants(program))
    for p in program.parameters:
        share = meta(*p.shape)
        held[p.name] = Weight(p.name, share, share, p.frac_bits) if p.weight else Shared(share, p.frac_bits)
    return held


def same(ours: tuple[Plan, Cost, Any], direct: tuple[Plan, Cost, Any]) -> None:
    # nodes that run side by side draw in turn when the whole is traced
    assert dict(ours[0].entries) == dict(direct[0].entries)
    assert len({name for name, _ in ours[0].entries}) == len(ours[0].entries)
    assert (ours[1].rounds, ours[1].bytes_sent) == (direct[1].rounds, direct[1].bytes_sent)
    assert ours[1].openings == direct[1].openings and ours[1].messages == direct[1].messages
    assert ours[2] == direct[2]


class Mlp(nn.Module):
    """Equal layers, some of which have the same shapes but are called in other ways."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return torch.cat([x.sum(-1, keepdim=True), x.amax(-1, keepdim=True), x], -1)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(9, 8), nn.LayerNorm(8)
        self.attentions = nn.ModuleList(Attention(8, 2) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        for attention in self.attentions:
            q, k, v = (p.unflatten(-1, (2, -1)).transpose(-2, -3) for p in attention.qkv(x).chunk(3, -1))
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            x = self.norm(x + attention.out(mixed.transpose(-2, -3).flatten(-2)))
        return x


@pytest.fixture(params=["mlp", "cnn", "encoder"])
def network(request: pytest.FixtureRequest, residual: Case) -> tuple[Program, list[tuple[int, ...]]]:
    if request.param == "cnn":
        return residual.captured.program, [(3, 2, 6, 6)]
    if request.param == "mlp":
        return capture(Mlp().eval(), [torch.zeros(1, 6)]).program, [(3, 6)]
    return capture(Encoder().eval(), [torch.zeros(2, 5, dtype=torch.int64)]).program, [(3, 5)]


def test_a_plan_is_that_of_the_program_traced_as_a_whole(
    network: tuple[Program, list[tuple[int, ...]]], parties: int
) -> None:
    program, shapes = network
    inputs = [Shared(meta(*shape), v.frac_bits) for shape, v in zip(shapes, program.inputs, strict=True)]
    plan, cost, outputs = trace(
        lambda ctx: interpret(program, ctx, holdings(program), inputs), parties=parties, deployment="d"
    )
    planner = Planner(program, parties=parties, deployment="d")
    for _ in range(2):  # the second time from memory alone
        ours = planner.inference(shapes)
        same(ours, (plan, cost, [x.shape for x in outputs]))
        assert ours[0].deployment == plan.deployment


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_the_plan_of_every_operator(group: str) -> None:
    """Called in all ways that the tests of operators know, side by side."""
    xs = GROUPS[group].inputs()
    program = capture(GROUPS[group].model(), xs).program
    inputs = [Shared(meta(*x.shape), v.frac_bits) for x, v in zip(xs, program.inputs, strict=True)]
    plan, cost, outputs = trace(lambda ctx: interpret(program, ctx, holdings(program), inputs), parties=2)
    ours = Planner(program, parties=2).inference([tuple(x.shape) for x in xs])
    same(ours, (plan, cost, [x.shape for x in outputs]))


@pytest.mark.parametrize("style", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("tokens", "room", "choice", "before"),
    [
        (1, 32, GREEDY, 0),
        (1, 64, GREEDY, 0),
        (5, 32, None, 0),
        (3, 32, Choice.of(0.7, 5, 1.2), 20),
    ],
)
def test_a_step_s_plan_too(style: str, tokens: int, room: int, choice: Choice | None, before: int) -> None:
    program = decoder(style)[1].program
    caches = {}
    for c in program.caches:
        rows = meta(*c.shape[:-2], room - tokens, c.shape[-1])
        caches[c.name] = Cached(c.name, rows, rows, room, c.frac_bits)
    ids, seen = Shared(meta(1, tokens)), Seen(None, Shared(meta(before)))
    plan, cost, done = trace(
        lambda ctx: step(program, ctx, holdings(program), ids, caches, choice, seen), parties=2, deployment="d"
    )
    planner = Planner(program, parties=2, deployment="d")
    for _ in range(2):
        same(planner.step(tokens, room, choice, before), (plan, cost, done.logits))
    names = {item.cache for _, item in plan.entries if hasattr(item, "cache")}
    assert names == {c.name for c in program.caches}


def test_in_the_last_layer_only_the_last_position_goes_on() -> None:
    """Its keys and values are of all, what its activation takes is of one; of a part of a prompt, nothing."""
    planner = Planner(decoder("llama")[1].program, parties=2, deployment="d")

    def rows(choice: Choice | None) -> list[int]:
        plan, _, _ = planner.step(6, 32, choice)
        return [item.shape[1] for _, item in plan.entries if isinstance(item, Pieces)]

    layers = len(decoder("llama")[1].program.caches) // 2
    assert rows(GREEDY) == [6] * (layers - 1) + [1]
    assert rows(None) == [6] * (layers - 1)


def test_equal_layers_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = 0
    real = module.trace

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal traced
        traced += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "trace", counting)
    counts = []
    for layers in (2, 12):
        planner = Planner(capture(Mlp(layers).eval(), [torch.zeros(1, 6)]).program, parties=2)
        traced = 0
        plan, _, _ = planner.inference([(3, 6)])
        counts.append(traced)
        weights = [item.weight for _, item in plan.entries if hasattr(item, "weight")]
        assert len(weights) == len(set(weights)) == layers
    assert counts[0] == counts[1]


def test_layers_of_one_shape_keep_their_own_weights(parties: int) -> None:
    model = on_grid(Mlp())
    assert_agrees(model, capture(model, [grid(2, 6)]), [grid(2, 6)], parties, 40)


class Slices(nn.Module):
    """Operators whose arguments are the same digits, cut in other places."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x[:, 1:112] * 2, x[:, 11:12] * 2, x.roll([1, 23], [0, 1]), x.roll([12, 3], [0, 1]), x[:, 1:11], x[:, 11:]


def test_arguments_are_told_apart(parties: int) -> None:
    x = grid(2, 120)
    model = Slices().eval()
    assert_agrees(model, capture(model, [x]), [x], parties, 1)


class Products(nn.Module):
    """Squares and products of numbers of one shape, some of which hand on what they are given."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = x.relu(), y.relu()
        kept = nn.functional.dropout(a, 0.1, False)
        return x * y, x * x, a * b, a * a, a * kept, kept * kept, (a + 0.0) * a, x.contiguous() * x


def test_what_is_one_value_and_what_are_two(parties: int) -> None:
    """A number times itself opens less; two equal nodes yield two values, even if they are traced once."""
    x, y = grid(2, 6), grid(2, 6, seed=1)
    captured = capture(Products().eval(), [x, y])
    shapes = [(2, 6)] * 2
    inputs = [Shared(meta(*shape), 16) for shape in shapes]
    direct = trace(lambda ctx: interpret(captured.program, ctx, {}, inputs), parties=parties)
    same(Planner(captured.program, parties=parties).inference(shapes), (*direct[:2], [x.shape for x in direct[2]]))
    assert_agrees(Products(), captured, [x, y], parties, 40)


class Quotients(nn.Module):
    """By as many numbers, and by fewer that were expanded."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x / y, x / y[:, :1].expand(2, 6)


def test_numbers_that_were_expanded_are_told_from_others(parties: int) -> None:
    x, y = grid(2, 6), grid(2, 6, seed=1).abs() + 1
    assert_agrees(Quotients(), capture(Quotients().eval(), [x, y]), [x, y], parties, 40)


def key(program: Program, at: int) -> bytes:
    """What tells the trace of a node from others."""
    keys: list[bytes] = []
    names = [r.name for r in program.results]

    async def rule(node: Any, values: Any) -> Any:
        keys.append(module._key(node, values, []))
        return Shared(meta(2, 120), 16)

    inputs = {v.name: Shared(meta(2, 120), v.frac_bits) for v in program.inputs}
    trace(lambda ctx: evaluated(program, names, inputs, rule), parties=2)
    return keys[at]


def test_keys_of_other_arguments_differ() -> None:
    def program(first: list[Any], second: dict[str, Any]) -> Program:
        nodes = [["a", "aten.roll.default", [{"$": "x"}, *first], second, ""]]
        declared = {"name": "x", "shape": [2, 120], "frac_bits": 16}
        raw = {"format": 3, "frac_bits": 16, "parameters": [], "constants": [], "results": ["a"], "reveal": "logits"}
        raw |= {"inputs": [{**declared, "limit": 0.0, "proven": False}], "outputs": [{**declared, "name": "a"}]}
        return Program.from_bytes(json.dumps({**raw, "nodes": nodes, "sizes": [], "caches": []}).encode())

    calls: list[tuple[list[Any], dict[str, Any]]] = [
        ([1, 23], {}), ([12, 3], {}), ([[1, 23]], {}), ([[1], 23], {}), ([[1, 2], 3], {}), ([1, 2, 3], {}), ([123], {}),
        ([1.0, 23], {}), (["1", 23], {}), ([True, 23], {}), ([None, 23], {}), ([1], {"a": 23}), ([], {"a": 1, "b": 23}),
        ([], {"a": 12, "b": 3}), ([], {"b": 1, "a": 23}),
    ]  # fmt: skip
    found = [key(program(*call), 0) for call in calls]
    assert len(set(found)) == len(calls)
    assert key(program([1, 23], {}), 0) == found[0]


def test_public_numbers_are_part_of_a_key(parties: int) -> None:
    """Masks of one shape let other pairs through: each costs what it costs."""

    class Masks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i in range(2):
                mask = torch.ones(4, 4, dtype=torch.bool).tril(i - 1)
                self.register_buffer(f"mask{i}", mask, persistent=False)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            attend = nn.functional.scaled_dot_product_attention
            return attend(x, x, x, self.mask0), attend(x, x, x, self.mask1)

    x = grid(1, 1, 4, 4)
    captured: Captured = capture(Masks().eval(), [x])
    plan, _, _ = Planner(captured.program, parties=parties).inference([(1, 1, 4, 4)])
    sizes = Counter[str]()
    for name, item in plan.entries:
        sizes[outermost_scope(name)] += sum(f.count for f in item.free().values())
    first, second = (size for size in sizes.values() if size)
    assert first != second
    assert_agrees(Masks(), captured, [x], parties, 33)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
