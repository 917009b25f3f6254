"""Running a protocol in all ways there are, and comparing what they say it costs and opens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from mpcinfer.protocol.local import LocalWorld, Transcript
from mpcinfer.protocol.tracing import Cost, Plan, trace
from mpcinfer.protocol.types import Shared, SharedBits, Weight
from mpcinfer.ring import sharing
from mpcinfer.ring.domain import Z64
from tests.openings import assert_each_mask_opens_once, seed

Input = torch.Tensor | tuple[torch.Tensor, int]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These tensors are small: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[2, 3, 5], ids="n={}".format)
def parties(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Callable[..., LocalWorld]:
    """world(n): n parties whose randomness is the test's own, the same in each run."""

    def make(n: int, *name: object) -> LocalWorld:
        return LocalWorld(n, seed(request.node.name, *name))

    return make


@dataclass
class Ran:
    """One run: its output in the clear, what it cost, and the plan it was dealt by."""

    value: Any
    frac_bits: Any
    transcript: Transcript
    plan: Plan
    cost: Cost
    parties: int

    def costs(self, rounds: int, sent: int, dealt: int) -> None:
        """Check rounds, bytes sent per party to each peer, bytes sent by the dealer."""
        peers = self.parties - 1
        assert (self.transcript.rounds, self.transcript.bytes_sent, self.transcript.dealer_bytes) == (
            rounds, sent * peers, dealt,
        )  # fmt: skip

    def opened(self) -> list[tuple[str, int]]:
        """Kind.field and ring bits of each opening, in order."""
        return [(label.partition(":")[2], bits) for label, bits, _ in self.transcript.openings]


def reveal(results: Sequence[Any]) -> Any:
    """The clear value of all parties' results, lists and tuples of them included."""
    if isinstance(results[0], Shared):
        return sharing.combine([r.share for r in results], Z64)
    if isinstance(results[0], SharedBits):
        return sharing.combine([r.share for r in results], results[0].ring)
    return [reveal(part) for part in zip(*results, strict=True)]


def scale_of(result: Any) -> Any:
    if isinstance(result, list | tuple):
        return [scale_of(part) for part in result]
    return result.frac_bits if isinstance(result, Shared) else None


def shape_of(result: Any) -> Any:
    return [shape_of(part) for part in result] if isinstance(result, list | tuple) else result.shape


def on_meta(x: Input) -> Shared:
    tensor, frac_bits = x if isinstance(x, tuple) else (x, 0)
    return Shared(torch.empty(tensor.shape, dtype=torch.int64, device="meta"), frac_bits)


@pytest.fixture
def run(parties: int, world: Callable[..., LocalWorld]) -> Callable[..., Ran]:
    """run(protocol, *inputs): trace it and run it at all parties; both must agree on every cost and opening."""
    return lambda protocol, *inputs: run_both_ways(world(parties), protocol, *inputs)


@pytest.fixture
def run_in() -> Callable[..., Ran]:
    """run_in(world, protocol, *inputs, weights=...): the same, in a world that is there already."""
    return run_both_ways


def run_both_ways(
    world: LocalWorld,
    protocol: Callable[..., Any],
    *inputs: Input,
    weights: Sequence[Mapping[str, Weight]] | None = None,
) -> Ran:
    """As the fixture `run`, in a given world (whose transcript starts anew)."""
    n = world.parties
    world.transcript = Transcript()
    shares = [world.share(*x) if isinstance(x, tuple) else world.share(x) for x in inputs]
    results = world.run(protocol, *shares, weights=weights)
    seen = world.transcript

    meta = {
        name: Weight(name, w.share.to("meta"), w.masked.to("meta"), w.frac_bits)
        for name, w in (weights[0] if weights else {}).items()
    }
    plan, cost, result = trace(lambda ctx: protocol(ctx, *map(on_meta, inputs)), parties=n, weights=meta)
    assert cost.rounds == seen.rounds
    assert cost.bytes_sent == seen.bytes_sent
    assert plan.correction_bytes() == seen.dealer_bytes
    assert cost.openings == Counter(label.partition(":")[2] for label, _, _ in seen.openings)
    assert shape_of(result) == shape_of(results[0]) and scale_of(result) == scale_of(results[0])
    assert_each_mask_opens_once(plan, cost, n)
    masks = {f"{name}:{type(k).__name__}.{f}": field for name, k in plan.entries for f, field in k.free().items()}
    assert {label: (bits, tuple(value.shape)) for label, bits, value in seen.openings} == {
        label: (field.ring.bits, field.shape) for label, field in masks.items()
    }
    assert Plan.from_bytes(plan.to_bytes()) == plan
    return Ran(reveal(results), scale_of(results[0]), seen, plan, cost, n)
