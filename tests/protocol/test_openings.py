"""The four tests of openings on the protocols, and the faults that each of them must catch (see tests/openings.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from mpcinfer.errors import ProtocolError
from mpcinfer.protocol import correlation
from mpcinfer.protocol.compare import Comparison, less_than
from mpcinfer.protocol.context import Context, Opening
from mpcinfer.protocol.correlation import Field, Kind
from mpcinfer.protocol.linear import fixed_product, mask_weight
from mpcinfer.protocol.local import LocalWorld
from mpcinfer.protocol.lookup import index_bits, one_hot
from mpcinfer.protocol.multiply import multiply
from mpcinfer.protocol.octaves import normalise
from mpcinfer.protocol.select import relu
from mpcinfer.protocol.tournament import argmax_along
from mpcinfer.protocol.tracing import Cost, Plan, trace
from mpcinfer.protocol.truncate import Truncation, truncate
from mpcinfer.protocol.truncated_product import truncated_product
from mpcinfer.protocol.types import Shared, SharedBits, Weight
from mpcinfer.ring import prg
from mpcinfer.ring.domain import Z64, Ring
from mpcinfer.ring.kernels import MATMUL
from tests.openings import (
    Protocol,
    View,
    advantage,
    assert_differences,
    assert_each_mask_opens_once,
    assert_indistinguishable,
    assert_uniform,
    faulty_masks,
    observe,
    seed,
    shares_of,
)

ONE = 1 << 16
WEIGHT = torch.tensor([[3, -2], [1, 5], [-4, 7]]) * ONE
WORD = Ring(7, xor=True)
ROWS = 11
INDEX = Ring(index_bits(ROWS))


@dataclass(frozen=True)
class Case:
    """A protocol, the shape of one element of each input, and what its first openings hide, as a map of the inputs."""

    protocol: Protocol
    shapes: tuple[tuple[int, ...], ...]
    hidden: Callable[..., list[torch.Tensor]]
    bound: int = 2**61
    weight: bool = False

    def inputs(self, runs: int, fill: Callable[[tuple[int, ...]], torch.Tensor]) -> list[torch.Tensor]:
        return [fill((runs, *shape)) for shape in self.shapes]


async def _relu(ctx: Context, x: Shared) -> Any:
    return await relu(ctx, x)


async def _truncate(ctx: Context, x: Shared) -> Any:
    return await truncate(ctx, x, 16)


async def _truncated_product(ctx: Context, x: Shared, y: Shared) -> Any:
    return await truncated_product(ctx, x, 16, y)


async def _octave(ctx: Context, x: Shared) -> Any:
    h, _ = await normalise(ctx, Shared(x.share, 24), -2, 2, (), 8)
    return h


async def _fixed(ctx: Context, x: Shared) -> Any:
    return await fixed_product(ctx, x, ctx.weights["w"], MATMUL)


async def _argmax(ctx: Context, x: Shared) -> Any:
    return await argmax_along(ctx, x)


async def _less(ctx: Context, x: Shared) -> Any:
    return await less_than(ctx, x, (0,), 36)


async def _one_hot(ctx: Context, x: Shared) -> Any:
    return await one_hot(ctx, x, ROWS)


def _duel(x: torch.Tensor) -> list[torch.Tensor]:
    """Of the first four; the winner's place is carried to the duel with the fifth."""
    return [(x[..., 1:4] - x[..., :1]).T.unsqueeze(-1)]


CASES = {
    "relu": Case(_relu, ((),), lambda x: [x]),
    "truncate": Case(_truncate, ((),), lambda x: [x]),
    "multiply": Case(multiply, ((), ()), lambda x, y: [x, y]),
    "truncated_product": Case(_truncated_product, ((), ()), lambda x, y: [x, y]),
    "octave of a truncated number": Case(_octave, ((),), lambda x: [x]),
    "fixed_product": Case(_fixed, ((3,),), lambda x: [x], weight=True),
    "argmax": Case(_argmax, ((5,),), _duel),
    "less_than, 36 bits": Case(_less, ((),), lambda x: [x], bound=2**34),
    "one_hot": Case(_one_hot, ((),), lambda x: [x]),
}
EVERY = pytest.mark.parametrize("name", CASES)


def view(name: str, inputs: list[torch.Tensor], parties: int = 2, *key: object) -> View:
    """Party 0's view of a run of a case."""
    case = CASES[name]
    world = LocalWorld(parties, seed(name, *key))
    weights = None
    if case.weight:
        masked = world.run(lambda ctx, w: mask_weight(ctx, "w", w), shares_of(WEIGHT, parties, seed("weight")))
        weights = [{"w": w} for w in masked]
    return observe(case.protocol, *inputs, key=seed(name, *key), world=world, weights=weights)


def constant(*values: int) -> Callable[[tuple[int, ...]], torch.Tensor]:
    """The same element in all runs: `values`, repeated to its shape."""

    def fill(shape: tuple[int, ...]) -> torch.Tensor:
        size = 1
        for s in shape[1:]:
            size *= s
        one = torch.tensor([values[i % len(values)] for i in range(size)])
        return one.reshape(shape[1:]).expand(shape).clone()

    return fill


def random(bound: int) -> Callable[[tuple[int, ...]], torch.Tensor]:
    g = torch.Generator().manual_seed(bound % 1000)
    return lambda shape: torch.randint(-bound, bound, shape, generator=g)


# Faults that only tests of openings can see: protocols of correct results and of openings that leak.


@dataclass(frozen=True)
class OneMask(Kind):
    """A single mask."""

    shape: tuple[int, ...]
    ring: Ring

    def free(self) -> dict[str, Field]:
        return {"r": Field(self.shape, self.ring)}


async def open_once(ctx: Context, x: Shared) -> None:
    await ctx.open(x, ctx.correlation(OneMask(x.shape, Z64)).mask("r"))


async def open_twice_over(ctx: Context, x: Shared) -> None:
    """Two masks; a fault makes them one."""
    await ctx.open(x, ctx.correlation(OneMask(x.shape, Z64)).mask("r"))
    await ctx.open(x.times(-5), ctx.correlation(OneMask(x.shape, Z64)).mask("r"))


async def open_word(ctx: Context, x: Shared) -> None:
    bits = SharedBits((x.share & 127).to(torch.uint8), WORD)
    await ctx.open(bits, ctx.correlation(OneMask(x.shape, WORD)).mask("r"))


def shortened(bits: int) -> Callable[[torch.Tensor, Ring], torch.Tensor]:
    """64-bit streams of fewer bits."""
    return lambda x, ring: x & ((1 << bits) - 1) if ring == Z64 else x


def index_mask(x: torch.Tensor, ring: Ring) -> torch.Tensor:
    return (x & (2**62 - 1)) % 1000 if ring == Z64 else x


def below_rows(x: torch.Tensor, ring: Ring) -> torch.Tensor:
    return x % ROWS if ring == INDEX else x


def short_word(x: torch.Tensor, ring: Ring) -> torch.Tensor:
    return x & 63 if ring == WORD else x


def constant_mask(x: torch.Tensor, ring: Ring) -> torch.Tensor:
    return x.reshape(-1)[:1].expand(x.shape).clone() if x.numel() else x


def only_own_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """All parties but party 0 mask with nothing: openings look uniform, but not to party 0."""
    keys = {prg.derive(seed("own"), "party", 0, 0)}
    expand, total = correlation.expand, correlation.free_values

    def faulty(item: Kind, name: str, key: bytes, **rest: Any) -> Any:
        shares = expand(item, name, key, **rest)
        return shares if key in keys else shares | {n: torch.zeros_like(shares[n]) for n in item.free()}

    monkeypatch.setattr("mpcinfer.protocol.local.expand", faulty)
    monkeypatch.setattr(correlation, "free_values", lambda item, name, ks: total(item, name, ks[:1]))


class TestStatically:
    """(i) the trace."""

    @EVERY
    def test_each_mask_hides_one_opening(self, name: str, parties: int) -> None:
        case = CASES[name]
        weights = {"w": Weight("w", WEIGHT.to("meta"), WEIGHT.to("meta"), 0)}
        inputs = [Shared(x.to("meta")) for x in case.inputs(4, constant(0))]
        plan, cost, _ = trace(lambda ctx: case.protocol(ctx, *inputs), parties=parties, weights=weights)
        assert_each_mask_opens_once(plan, cost, parties)

    @staticmethod
    def check(protocol: Callable[[Context, Shared], Any]) -> None:
        x = Shared(torch.empty(4, dtype=torch.int64, device="meta"))
        plan, cost, _ = trace(lambda ctx: protocol(ctx, x), parties=2)
        assert_each_mask_opens_once(plan, cost, 2)

    def test_the_harness_of_faults_is_sound(self) -> None:
        for protocol in (open_once, open_twice_over, open_word):
            self.check(protocol)

    @pytest.mark.parametrize("again", ["open", "open_masked"])
    def test_catches_a_mask_opened_twice(self, again: str) -> None:
        async def fault(ctx: Context, x: Shared) -> None:
            mask = ctx.correlation(OneMask(x.shape, Z64)).mask("r")
            await ctx.open(x, mask)
            await (ctx.open(x, mask) if again == "open" else ctx.open_masked(x.share, mask))

        with pytest.raises(ProtocolError, match="used already"):
            self.check(fault)

    @pytest.mark.parametrize("bits", [63, 32, 10])
    def test_catches_a_mask_narrower_than_its_opening(self, bits: int) -> None:
        async def by_the_rules(ctx: Context, x: Shared) -> None:
            ctx.correlation(OneMask(x.shape, Ring(bits))).mask("r").spend(x.shape, Z64)

        with pytest.raises(ProtocolError, match=f"uniform on Z_2\\^{bits} but the opening is over Z_2\\^64"):
            self.check(by_the_rules)

        async def around_them(ctx: Context, x: Shared) -> None:
            mask = ctx.correlation(OneMask(x.shape, Ring(bits))).mask("r")
            await Opening(x.share + mask.share, Z64, mask.label)

        with pytest.raises(ProtocolError, match="it would leak"):
            self.check(around_them)

        async def behind_their_back(ctx: Context, x: Shared) -> None:
            mask = ctx.correlation(OneMask(x.shape, Ring(bits))).mask("r")
            mask.spend(x.shape, Ring(bits))
            await Opening(x.share + mask.share, Z64, mask.label)

        with pytest.raises(ProtocolError, match="it would leak"):
            self.check(behind_their_back)

    def test_catches_words_opened_under_a_shorter_mask(self) -> None:
        async def fault(ctx: Context, x: Shared) -> None:
            bits = SharedBits((x.share & 127).to(torch.uint8), WORD)
            await ctx.open(bits, ctx.correlation(OneMask(x.shape, Ring(6, xor=True))).mask("r"))

        with pytest.raises(ProtocolError, match="would leak"):
            self.check(fault)

    def test_catches_a_mask_of_another_kind_of_group(self) -> None:
        async def fault(ctx: Context, x: Shared) -> None:
            await ctx.open(x, ctx.correlation(OneMask(x.shape, Ring(64, xor=True))).mask("r"))

        with pytest.raises(ProtocolError, match="would leak"):
            self.check(fault)

    def test_catches_a_mask_of_another_shape(self) -> None:
        async def fault(ctx: Context, x: Shared) -> None:
            await ctx.open(x, ctx.correlation(OneMask((1,), Z64)).mask("r"))  # would broadcast

        with pytest.raises(ProtocolError, match="shape"):
            self.check(fault)

    def test_catches_a_mask_never_used(self) -> None:
        async def fault(ctx: Context, x: Shared) -> None:
            ctx.correlation(OneMask(x.shape, Z64))

        with pytest.raises(ProtocolError, match="hide nothing"):
            self.check(fault)

    def test_catches_a_mask_spent_on_nothing(self) -> None:
        async def fault(ctx: Context, x: Shared) -> None:
            ctx.correlation(OneMask(x.shape, Z64)).mask("r").spend(x.shape, Z64)

        with pytest.raises(ProtocolError, match="hide nothing"):
            self.check(fault)

    @pytest.mark.parametrize("label", ["#0:OneMask.r", "#7:OneMask.r", ""])
    def test_catches_an_opening_without_a_mask(self, label: str) -> None:
        async def fault(ctx: Context, x: Shared) -> None:
            await open_once(ctx, x)
            await Opening(x.share, Z64, label)

        with pytest.raises(ProtocolError, match="no mask of its own"):
            self.check(fault)

    def test_catches_a_cost_that_is_not_the_plans(self) -> None:
        plan = Plan((("#0", OneMask((4,), Z64)),))
        with pytest.raises(AssertionError, match="do not correspond"):
            assert_each_mask_opens_once(plan, Cost(1, 32), 2)


class TestDifferences:
    """(ii) same seeds, two inputs."""

    @EVERY
    def test_openings_differ_by_what_they_hide(self, name: str, parties: int) -> None:
        case = CASES[name]
        edge = case.bound
        fills = [random(edge), constant(0), constant(edge, -edge, 0), constant(-1, 3)]
        inputs = [case.inputs(40, fill) for fill in fills]
        views = [view(name, x, parties) for x in inputs]
        for i in range(1, len(fills)):
            pairs = zip(case.hidden(*inputs[0]), case.hidden(*inputs[i]), strict=True)
            assert_differences(views[0], views[i], [a - b for a, b in pairs])

    def test_words_under_xor(self, parties: int) -> None:
        async def protocol(ctx: Context, x: Shared) -> None:
            words = (x.share & 127).to(torch.uint8) if ctx.first else torch.zeros(x.shape, dtype=torch.uint8)
            await ctx.open(SharedBits(words, WORD), ctx.correlation(OneMask(x.shape, WORD)).mask("r"))

        x, y = (torch.randint(0, 128, (50,), generator=torch.Generator().manual_seed(i)) for i in (1, 2))
        one, two = (observe(protocol, v, parties=parties) for v in (x, y))
        shares = [v.own[0].value & 127 for v in (one, two)]  # what party 0 holds is all that is opened here
        assert_differences(one, two, [shares[0] ^ shares[1]])

    def test_catches_an_opening_of_something_else(self) -> None:
        async def fault(ctx: Context, x: Shared) -> None:
            mask = ctx.correlation(OneMask(x.shape, Z64)).mask("r")
            await ctx.open_masked(2 * (x.share + mask.share), mask)

        x, y = torch.tensor([5, -5]), torch.tensor([7, 0])
        with pytest.raises(AssertionError, match="not value"):
            assert_differences(observe(fault, x), observe(fault, y), [x - y])
        assert_differences(observe(open_once, x), observe(open_once, y), [x - y])

    def test_catches_masks_that_depend_on_the_input(self) -> None:
        async def fault(ctx: Context, x: Shared) -> None:
            mask = ctx.correlation(OneMask(x.shape, Z64)).mask("r")
            await ctx.open_masked(x.share + mask.share + x.share.sum(), mask)

        x, y = torch.tensor([5, -5]), torch.tensor([7, 0])
        with pytest.raises(AssertionError, match="not value"):
            assert_differences(observe(fault, x), observe(fault, y), [x - y])

    def test_catches_masks_that_no_seed_determines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[int] = []

        def change(x: torch.Tensor, ring: Ring) -> torch.Tensor:
            calls.append(1)
            return x + len(calls)

        faulty_masks(monkeypatch, change)
        x, y = torch.tensor([5, -5]), torch.tensor([7, 0])
        with pytest.raises(AssertionError, match="not value"):
            assert_differences(observe(open_once, x), observe(open_once, y), [x - y])


RUNS = 1 << 14
POOLED = 5  # runs, of which neighbours make one symbol less each


def pooled(protocol: Protocol, x: torch.Tensor, parties: int = 2) -> list[View]:
    return [observe(protocol, x, parties=parties, key=seed("own", i)) for i in range(POOLED)]


class TestUniformity:
    """(iii) chi-square on all bits."""

    @EVERY
    @pytest.mark.parametrize("which", ["zero", "maximal", "random"])
    def test_openings_are_uniform(self, name: str, which: str) -> None:
        case = CASES[name]
        fill = {"zero": constant(0), "maximal": constant(case.bound), "random": random(case.bound)}[which]
        assert_uniform([view(name, case.inputs(RUNS, fill), 2, which, i) for i in range(POOLED)])

    @pytest.mark.parametrize("name", ["relu", "argmax"])
    @pytest.mark.parametrize("n", [3, 5])
    def test_for_more_parties(self, name: str, n: int) -> None:
        fill = constant(-CASES[name].bound, 3)
        assert_uniform([view(name, CASES[name].inputs(RUNS, fill), n, i) for i in range(POOLED)])

    def test_a_weights_mask(self) -> None:
        async def protocol(ctx: Context, w: Shared) -> None:
            await mask_weight(ctx, "w", w)

        assert_uniform(pooled(protocol, WEIGHT.repeat(2000, 2)))

    def test_small_openings_are_pooled(self) -> None:
        async def many(ctx: Context, x: Shared) -> None:
            for i in range(10):
                await open_once(ctx.scope(str(i)), x)

        assert_uniform([observe(many, torch.zeros(1500, dtype=torch.int64), key=seed(i)) for i in range(5)])
        with pytest.raises(AssertionError, match="pool more runs"):
            assert_uniform([observe(many, torch.zeros(1500, dtype=torch.int64))])

    def test_the_harness_of_faults_is_sound(self, parties: int) -> None:
        x = torch.zeros(RUNS, dtype=torch.int64)
        for protocol in (open_once, open_twice_over):
            assert_uniform(pooled(protocol, x, parties))

    @pytest.mark.parametrize(
        "change", [shortened(63), shortened(62), shortened(32), index_mask, constant_mask],
        ids=["63 bits", "62 bits", "32 bits", "index below V", "one mask for all elements"],
    )  # fmt: skip
    def test_catches_bad_masks(self, change: Any, parties: int, monkeypatch: pytest.MonkeyPatch) -> None:
        faulty_masks(monkeypatch, change)
        with pytest.raises(AssertionError, match="not uniform"):
            assert_uniform(pooled(open_once, torch.zeros(RUNS, dtype=torch.int64), parties))

    def test_catches_a_short_mask_inside_a_protocol(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x = random(2**61)((RUNS,))
        for change in (shortened(63), short_word):
            with monkeypatch.context() as patch:
                faulty_masks(patch, change)
                with pytest.raises(AssertionError, match="not uniform"):
                    assert_uniform(pooled(_relu, x))

    def test_catches_an_index_under_a_mask_below_the_number_of_rows(
        self, parties: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        faulty_masks(monkeypatch, below_rows)
        with pytest.raises(AssertionError, match="not uniform"):
            assert_uniform(pooled(_one_hot, torch.zeros(RUNS, dtype=torch.int64), parties))

    def test_catches_words_under_a_short_mask(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def protocol(ctx: Context, x: Shared) -> None:
            words = torch.zeros(x.shape, dtype=torch.uint8)
            await ctx.open(SharedBits(words, WORD), ctx.correlation(OneMask(x.shape, WORD)).mask("r"))

        x = torch.zeros(RUNS, dtype=torch.int64)
        assert_uniform(pooled(protocol, x))
        faulty_masks(monkeypatch, short_word)
        with pytest.raises(AssertionError, match="not uniform"):
            assert_uniform(pooled(protocol, x))

    def test_catches_a_mask_used_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        faulty_masks(monkeypatch, name=lambda name, field: (field,))  # no ordinal: all correlations are one
        with pytest.raises(AssertionError, match="difference of"):
            assert_uniform(pooled(open_twice_over, random(2**61)((RUNS,)) >> 30))

    def test_catches_parties_that_mask_with_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        only_own_masks(monkeypatch)
        x = torch.full((RUNS * POOLED,), -3)
        with pytest.raises(AssertionError, match="without own mask share"):
            assert_uniform([observe(open_once, x, key=seed("own"))])


TRANSCRIPTS = 10_000
# two inputs per case, negative values among them; close ones, far ones
INPUTS = {
    "small": (constant(-7 * ONE // 2, 2 * ONE), constant(9 * ONE // 4, -ONE)),
    "extreme": (constant(-(2**61), 2**60), constant(2**61 - 1, -1)),
}


class TestDistinguisher:
    """(iv) nothing in party 0's view tells two inputs apart."""

    @EVERY
    @pytest.mark.parametrize("which", INPUTS)
    def test_no_advantage(self, name: str, which: str) -> None:
        case = CASES[name]
        a, b = (
            view(name, [x.clamp(-case.bound, case.bound) for x in case.inputs(TRANSCRIPTS, fill)], 2, which, side)
            for side, fill in enumerate(INPUTS[which])
        )
        assert_indistinguishable(a, b, TRANSCRIPTS)

    @staticmethod
    def views(protocol: Protocol, a: int, b: int) -> tuple[View, View]:
        one, two = (torch.full((TRANSCRIPTS,), v) for v in (a, b))
        return observe(protocol, one, key=seed("a")), observe(protocol, two, key=seed("b"))

    def test_the_harness_of_faults_is_sound(self) -> None:
        for protocol in (open_once, open_twice_over):
            assert_indistinguishable(*self.views(protocol, -5, 2**61), TRANSCRIPTS)

    @pytest.mark.parametrize(
        ("change", "a", "b"),
        [
            (shortened(63), -(2**61), 2**61), (shortened(32), -3 << 32, 2 << 32), (shortened(32), -7, 2**31),
            (index_mask, 3, 900), (index_mask, -300, 500),
        ],
        ids=["63 bits", "32 bits", "32 bits, small", "index below V", "index below V, negative"],
    )  # fmt: skip
    @pytest.mark.parametrize("protocol", [open_once, _truncate, _relu])
    def test_catches_bad_masks(
        self, protocol: Protocol, change: Any, a: int, b: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        faulty_masks(monkeypatch, change)
        with pytest.raises(AssertionError, match="distinguishable"):
            assert_indistinguishable(*self.views(protocol, a, b), TRANSCRIPTS)

    def test_catches_a_mask_used_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        faulty_masks(monkeypatch, name=lambda name, field: (field,))
        auc, _ = advantage(*self.views(open_twice_over, -5, 4), TRANSCRIPTS)
        assert auc > 0.999

    def test_catches_one_mask_for_both_operands(self, monkeypatch: pytest.MonkeyPatch) -> None:
        faulty_masks(monkeypatch, name=lambda name, field: (name,))
        x, y = (torch.full((TRANSCRIPTS,), v) for v in (-5, 4))
        a, b = observe(multiply, x, y, key=seed("a")), observe(multiply, y, y, key=seed("b"))
        with pytest.raises(AssertionError, match="distinguishable"):
            assert_indistinguishable(a, b, TRANSCRIPTS)

    def test_catches_an_index_under_a_mask_below_the_number_of_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert_indistinguishable(*self.views(_one_hot, 0, 10), TRANSCRIPTS)
        faulty_masks(monkeypatch, below_rows)
        with pytest.raises(AssertionError, match="distinguishable"):
            assert_indistinguishable(*self.views(_one_hot, 0, 10), TRANSCRIPTS)

    def test_catches_short_words(self, monkeypatch: pytest.MonkeyPatch) -> None:
        faulty_masks(monkeypatch, lambda x, ring: x & 0 if ring == WORD else x)
        with pytest.raises(AssertionError, match="distinguishable"):
            assert_indistinguishable(*self.views(_relu, -5, 4), TRANSCRIPTS)

    def test_catches_parties_that_mask_with_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        only_own_masks(monkeypatch)
        x, y = (torch.full((TRANSCRIPTS,), v) for v in (-5, 4))
        views = [observe(open_once, v, key=seed("own")) for v in (x, y)]
        with pytest.raises(AssertionError, match="distinguishable"):
            assert_indistinguishable(*views, TRANSCRIPTS)


def test_every_opening_of_a_comparison_is_in_the_view() -> None:
    opened = view("relu", [torch.zeros(5, dtype=torch.int64)]).opened
    assert [o.ring for o in opened] == [f.ring for f in Comparison((5,), products=True).free().values()]
    own = {s.label.rpartition(".")[2] for s in view("truncate", [torch.zeros(5, dtype=torch.int64)]).own}
    assert own >= {"r", *Truncation((5,), 16).derived(), "input 0", "output 0"}
