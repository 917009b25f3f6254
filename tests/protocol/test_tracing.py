"""Plans: what a trace records, what it refuses, and that bytes from elsewhere are a plan or an InputError."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpcinfer.errors import InputError, ProtocolError
from mpcinfer.protocol.compare import Comparison
from mpcinfer.protocol.context import Context, together
from mpcinfer.protocol.linear import FixedProduct, WeightMask, fixed_product
from mpcinfer.protocol.multiply import Triple, multiply
from mpcinfer.protocol.select import relu
from mpcinfer.protocol.tracing import Plan, trace
from mpcinfer.protocol.truncate import Truncation, truncate
from mpcinfer.protocol.types import Shared, Weight
from mpcinfer.ring.kernels import MATMUL, MUL, Bilinear


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


X = Shared(meta(4, 3), 16)
PLAN = Plan(
    (
        ("fc1#0", FixedProduct(MATMUL, "w", (4, 3), (3, 2))),
        ("fc1#1", Truncation((4, 2), 16)),
        ("relu#0", Comparison((4, 2), products=True)),
        ("mul#0", Triple(MUL, (4, 2), (4, 2))),
        ("conv#0", Triple(Bilinear("conv", ((1,), (0,), (1,), 1)), (1, 2, 5), (3, 2, 3))),
        ("w#0", WeightMask("w", (3, 2))),
    ),
    "00ff",
)


async def network(ctx: Context, x: Shared) -> Any:
    y = await truncate(ctx.scope("fc1"), await fixed_product(ctx.scope("fc"), x, ctx.weights["w"], MATMUL), 16)
    a, b = await together(relu(ctx.scope("relu"), y), multiply(ctx.scope("mul"), y, y))
    return a, b, y


def traced(parties: int = 2) -> Any:
    weights = {"w": Weight("w", meta(3, 2), meta(3, 2), 16)}
    return trace(lambda ctx: network(ctx, X), parties=parties, weights=weights, deployment="ab")


def test_a_trace_is_a_plan_a_cost_and_shapes(parties: int) -> None:
    plan, cost, (a, b, y) = traced(parties)
    assert [name for name, _ in plan.entries] == ["fc#0", "fc1#0", "relu#0", "mul#0"]
    assert [type(k) for _, k in plan.entries] == [FixedProduct, Truncation, Comparison, Triple]
    assert plan.deployment == "ab"
    assert a.shape == b.shape == y.shape == (4, 2) and (a.frac_bits, b.frac_bits) == (16, 32)
    assert cost.rounds == 1 + 1 + 4
    assert cost.bytes_sent == (parties - 1) * (8 * 12 + 8 * 8 + 99 + 2 * 64)
    assert cost.openings == {
        "FixedProduct.a": 1, "Truncation.r": 1, "Comparison.r": 1, "Comparison.leaf": 1, "Comparison.top": 1,
        "Comparison.beta": 1, "Triple.a": 1, "Triple.b": 1,
    }  # fmt: skip


def test_the_number_of_parties_changes_bytes_only() -> None:
    two, five = traced(2), traced(5)
    assert two[0] == five[0] and two[1].rounds == five[1].rounds and 4 * two[1].bytes_sent == five[1].bytes_sent


@pytest.mark.parametrize("count", [1, 2])
def test_unused_masks_are_refused(count: int) -> None:
    async def wasteful(ctx: Context) -> None:
        triple = ctx.correlation(Triple(MUL, (2,), (2,)))
        for name in "ab"[: count - 1]:
            await ctx.open(Shared(meta(2)), triple.mask(name))

    with pytest.raises(ProtocolError, match=r"hide nothing: .*Triple\.b"):
        trace(wasteful, parties=2)


def test_unused_masks_in_scopes_are_refused() -> None:
    async def wasteful(ctx: Context) -> None:
        ctx.scope("a").scope("b").correlation(Truncation((2,), 4))

    with pytest.raises(ProtocolError, match=r"a/b#0:Truncation\.r"):
        trace(wasteful, parties=2)


def test_a_scope_is_entered_once() -> None:
    async def twice(ctx: Context) -> None:
        ctx.scope("a")
        ctx.scope("a")

    with pytest.raises(ProtocolError, match="used twice"):
        trace(twice, parties=2)


@pytest.mark.parametrize("name", ["a/b", "a#0"])
def test_a_scope_cannot_spell_the_name_of_another(name: str) -> None:
    async def colliding(ctx: Context) -> None:
        await truncate(ctx.scope(name), X, 4)

    with pytest.raises(ProtocolError, match="separate names"):
        trace(colliding, parties=2)


def test_plans_survive_the_wire() -> None:
    data = PLAN.to_bytes()
    assert Plan.from_bytes(data) == PLAN and Plan.from_bytes(data).to_bytes() == data
    assert Plan.from_bytes(json.dumps(json.loads(data), indent=3).encode()).digest() == PLAN.digest()
    assert PLAN.correction_bytes() == 64 + (64 + 16) + Plan(PLAN.entries[2:3]).correction_bytes() + 64 + 72


def test_every_parameter_counts_in_the_digest() -> None:
    plans = [
        PLAN,
        Plan(PLAN.entries, "00fe"),
        Plan(PLAN.entries[::-1], "00ff"),
        Plan(PLAN.entries[:-1], "00ff"),
        Plan((*PLAN.entries[:-1], ("w#1", WeightMask("w", (3, 2)))), "00ff"),
        Plan((*PLAN.entries[:-1], ("w#0", WeightMask("v", (3, 2)))), "00ff"),
        Plan((*PLAN.entries[:-1], ("w#0", WeightMask("w", (2, 3)))), "00ff"),
    ]
    assert len({p.digest() for p in plans}) == len(plans)


def test_a_plan_names_each_correlation_once() -> None:
    entry = ("a#0", Truncation((2,), 4))
    with pytest.raises(InputError, match="once"):
        Plan.from_bytes(Plan((entry, entry)).to_bytes())


def decodes_or_input_error(data: bytes) -> None:
    try:
        plan = Plan.from_bytes(data)
    except InputError:
        return
    assert Plan.from_bytes(plan.to_bytes()).to_bytes() == plan.to_bytes()


@given(st.binary(max_size=200))
def test_arbitrary_bytes(data: bytes) -> None:
    decodes_or_input_error(data)


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 2**70), st.floats(), st.text(max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)
TREE = json.loads(PLAN.to_bytes())


@given(values)
def test_arbitrary_json(value: Any) -> None:
    decodes_or_input_error(json.dumps(value).encode())


def paths(tree: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else []
    return [prefix, *(p for key, child in inner for p in paths(child, (*prefix, key)))]


@given(st.sampled_from([p for p in paths(TREE) if p]), values)
def test_a_plan_with_one_part_replaced(path: tuple[Any, ...], value: Any) -> None:
    tree = json.loads(PLAN.to_bytes())
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    decodes_or_input_error(json.dumps(tree).encode())


@given(st.data())
def test_a_plan_with_bytes_changed(data: st.DataObject) -> None:
    raw = bytearray(PLAN.to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    decodes_or_input_error(bytes(raw[: data.draw(st.integers(0, len(raw)))]))


@pytest.mark.parametrize("data", [b"[" * 200_000, b'{"a":' * 100_000, b"", b"\xff\xfe", b"1" * 5000, b"NaN"])
def test_hostile_bytes(data: bytes) -> None:
    with pytest.raises(InputError):
        Plan.from_bytes(data)
