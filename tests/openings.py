"""Four tests of what a run opens, for single protocols and whole models alike.

A `View` is what party 0 saw: every opened tensor and its own shares. From views of one or more runs:

1. `assert_each_mask_opens_once`: the trace's openings are exactly the free fields of its plan, ring by ring;
2. `assert_differences`: with the same seeds and two inputs, openings differ by exactly the values' difference;
3. `assert_uniform`: chi-square over all bits of every opening, of its difference from party 0's mask share, of
   neighbouring elements and of pairs of openings;
4. `assert_indistinguishable`: logistic regression over party 0's view of input a and of input b, on held-out runs.

Each raises AssertionError. A test of these tests plants faults below the type checks with `faulty_masks`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from threadpoolctl import threadpool_limits

from mpcinfer.protocol import correlation
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.correlation import Kind, Tensors
from mpcinfer.protocol.local import LocalWorld
from mpcinfer.protocol.tracing import Cost, Plan
from mpcinfer.protocol.types import Shared, SharedBits, Weight
from mpcinfer.ring import prg
from mpcinfer.ring.domain import Z64, Ring

Protocol = Callable[..., Coroutine[Any, Any, Any]]
ALPHA = 1e-6
SYMBOLS = 1 << 16
SYMBOL_BITS = 8
MAX_PAIRS = 24
MAX_COLUMNS = 300
RUNS = 5  # of `assert_hides`: each has a symbol less of neighbours


@dataclass(frozen=True)
class Seen:
    """One tensor of a view: an opened value or a share, and its ring."""

    label: str
    ring: Ring
    value: torch.Tensor


@dataclass
class View:
    """What one run showed party 0, in order."""

    opened: list[Seen] = field(default_factory=list)
    own: list[Seen] = field(default_factory=list)

    def peeled(self) -> list[Seen]:
        """Every opening without party 0's share of its mask: what the other parties' shares must still hide."""
        shares = {s.label: s.value for s in self.own}
        return [Seen(o.label, o.ring, o.ring.sub(o.value, shares[o.label])) for o in self.opened if o.label in shares]


def seed(*name: object) -> bytes:
    """32 bytes that stand for a name."""
    return hashlib.sha256(repr(name).encode()).digest()


def shares_of(x: torch.Tensor, parties: int, key: bytes, frac_bits: int = 0) -> list[Shared]:
    """Shares of x that are the same in every run of the tests."""
    first = [prg.expand(prg.derive(key, "input", i), tuple(x.shape), Z64) for i in range(parties - 1)]
    return [Shared(s, frac_bits) for s in (*first, x - sum(first))]


class _Spy:
    """A correlation source that notes what it hands out."""

    def __init__(self, source: Any, view: View) -> None:
        self.source = source
        self.view = view

    def draw(self, name: str, item: Kind) -> Tensors:
        shares: Tensors = self.source.draw(name, item)
        for n, f in (item.free() | item.derived()).items():
            self.view.own.append(Seen(f"{name}:{type(item).__name__}.{n}", f.ring, shares[n]))
        return shares


def _shares_in(x: Any) -> list[Seen]:
    if isinstance(x, Shared | SharedBits):
        return [Seen("", Z64 if isinstance(x, Shared) else x.ring, x.share)]
    return [s for part in x for s in _shares_in(part)] if isinstance(x, list | tuple) else []


def observe(
    protocol: Protocol,
    *inputs: torch.Tensor,
    parties: int = 2,
    key: bytes = bytes(32),
    world: LocalWorld | None = None,
    weights: Sequence[Mapping[str, Weight]] | None = None,
) -> View:
    """Party 0's view of one run of `protocol(ctx, *shares)`; `key` determines all randomness (but an own world's)."""
    world = world or LocalWorld(parties, key)
    view = View()
    shares = [shares_of(x, world.parties, prg.derive(key, "inputs", i)) for i, x in enumerate(inputs)]
    view.own += [Seen(f"input {i}", Z64, s[0].share) for i, s in enumerate(shares)]

    async def spied(ctx: Context, *own: Shared) -> Any:
        if ctx.index == 0:
            ctx._source = _Spy(ctx._source, view)
        return await protocol(ctx, *own)

    before = len(world.transcript.openings)
    results = world.run(spied, *shares, weights=weights)
    rings = {s.label: s.ring for s in view.own}
    for label, bits, value in world.transcript.openings[before:]:
        ring = rings.get(label, Ring(bits))
        assert ring.bits == bits, f"{label} was opened over {bits} bits under a mask of {ring.bits}"
        view.opened.append(Seen(label, ring, value))
    view.own += [Seen(f"output {i}", s.ring, s.value) for i, s in enumerate(_shares_in(results[0]))]
    return view


# (i)


def assert_each_mask_opens_once(plan: Plan, cost: Cost, parties: int) -> None:
    """What a trace opened is what its plan masks, field by field, and not a bit more."""
    fields = [(f"{type(k).__name__}.{n}", f) for _, k in plan.entries for n, f in k.free().items()]
    assert cost.openings == Counter(name for name, _ in fields), "openings and masks do not correspond"
    sent = sum(f.packed_bytes for _, f in fields) * (parties - 1)
    assert cost.bytes_sent == sent, "an opening is not exactly as wide as its mask"


# (ii)


def assert_differences(first: View, second: View, expected: Sequence[torch.Tensor]) -> None:
    """The first openings of two runs with the same seeds differ, in their rings, by exactly `expected`."""
    for a, b, difference in zip(first.opened, second.opened, expected, strict=False):
        assert a.label == b.label and a.ring == b.ring
        wanted = a.ring.reduce(difference.to(a.ring.dtype))
        assert torch.equal(a.ring.sub(a.value, b.value), wanted), f"{a.label} is not value + mask"
    assert len(expected) <= len(first.opened) == len(second.opened)


# (iii)


def _streams(view: View) -> list[tuple[str, Seen]]:
    streams = [("value", o) for o in view.opened] + [("without own mask share", o) for o in view.peeled()]
    for o in view.opened:
        flat = o.value.reshape(-1)
        if flat.numel() > 1:
            streams.append(("neighbours", Seen(o.label, o.ring, o.ring.sub(flat[1:], flat[:-1]))))
    pairs = [(a, b) for a, b in combinations(view.opened, 2) if a.ring == b.ring and a.value.numel() == b.value.numel()]
    for a, b in pairs[:MAX_PAIRS]:
        value = a.ring.sub(a.value.reshape(-1), b.value.reshape(-1))
        streams.append(("difference", Seen(f"{a.label} and {b.label}", a.ring, value)))
    return streams


def assert_uniform(views: Sequence[View], alpha: float = ALPHA, symbols: int = SYMBOLS) -> None:
    """No k-bit symbol of any opening deviates from uniform, pooled over runs with different seeds.

    symbols: how many of SYMBOL_BITS are enough to judge by; of fewer bits, in proportion to their values.
    """

    def enough(ring: Ring) -> int:
        return symbols >> (SYMBOL_BITS - min(SYMBOL_BITS, ring.bits))

    pooled: dict[tuple[str, str, Ring], list[torch.Tensor]] = {}
    for view in views:
        for what, seen in _streams(view):
            pooled.setdefault((what, seen.label, seen.ring), []).append(seen.value.reshape(-1))
    small = {key: values for key, values in pooled.items() if sum(v.numel() for v in values) < enough(key[2])}
    for what, label, ring in small:  # too few to judge alone: with all others of that ring
        pooled.setdefault((what, "other openings", ring), []).extend(pooled.pop((what, label, ring)))
    for what, label, ring in [key for key, values in pooled.items() if sum(v.numel() for v in values) < enough(key[2])]:
        # still too few: with the one of that ring that has the fewest of those that are judged alone
        alone = [values for key, values in pooled.items() if (key[0], key[2]) == (what, ring) and key[1] != label]
        pooled[what, label, ring] += min(alone, key=lambda values: sum(v.numel() for v in values), default=[])
    found: list[tuple[float, str]] = []
    for (what, label, ring), values in pooled.items():
        x = torch.cat(values).to(torch.int64).numpy()
        assert x.size >= enough(ring), f"{x.size} symbols of {label} over {ring} are too few: pool more runs"
        width = min(SYMBOL_BITS, ring.bits)
        for low in sorted({*range(0, ring.bits - width + 1, width), ring.bits - width}):
            counts = np.bincount((x >> low) & ((1 << width) - 1), minlength=1 << width)
            found.append((float(stats.chisquare(counts).pvalue), f"{what} of {label}, bits {low} to {low + width - 1}"))
    assert found, "nothing was opened"
    worst, where = min(found)
    assert worst >= alpha / len(found), f"not uniform: {where} (p = {worst:.1e}, {len(found)} tests)"


# (iv)


def _columns(seen: Seen, runs: int) -> list[torch.Tensor]:
    """One tensor of as many elements as there are runs, for each element of a single run; [] if it is common to all.

    What has no axis of runs but as many elements for each was flattened, runs first.
    """
    size = seen.value.numel()
    if runs not in seen.value.shape:
        return list(seen.value.reshape(runs, -1).T) if size and size % runs == 0 else []
    flat = seen.value.movedim(seen.value.shape.index(runs), 0).reshape(runs, -1)
    return list(flat.T)


def _chosen(items: list[Any], most: int) -> list[Any]:
    """All of them, or as many as `most`: the same ones for every view of a protocol."""
    if len(items) <= most:
        return items
    return [items[i] for i in np.random.default_rng(0).permutation(len(items))[:most]]


def _features(view: View, runs: int) -> np.ndarray:
    """Bits of everything in the view, and of sums and differences of what was opened in one run: [runs, features].

    Of a view of many numbers, as a whole network's is, MAX_COLUMNS opened ones and as many others.
    """

    def columns(part: Sequence[Seen]) -> list[tuple[Ring, torch.Tensor]]:
        return _chosen([(s.ring, c) for s in part for c in _columns(s, runs)], MAX_COLUMNS)

    opened = columns(view.opened)
    everything = opened + columns([*view.own, *view.peeled()])
    pairs = [(r, a, b) for (r, a), (q, b) in combinations(opened, 2) if r == q]
    for ring, a, b in _chosen(pairs, MAX_PAIRS):
        everything.append((ring, ring.sub(a, b)))
        if not ring.xor:
            everything.append((ring, ring.add(a, b)))
    bits = [((c[:, None] >> torch.arange(r.bits, dtype=c.dtype)) & 1).to(torch.uint8) for r, c in everything]
    return torch.cat(bits, dim=1).numpy()


def advantage(a: View, b: View, runs: int) -> tuple[float, float]:
    """AUC of a distinguisher between `runs` batched runs on input a and on b, on the held-out half; one sigma of it."""
    x = np.concatenate([_features(a, runs), _features(b, runs)]).astype(np.float32) - np.float32(0.5)
    y = np.repeat([0, 1], runs)
    train = np.tile(np.arange(runs) % 2 == 0, 2)
    with threadpool_limits(1):  # many threads on a busy machine wait for each other most of the time
        model = LogisticRegression(C=1e-3, max_iter=1000).fit(x[train], y[train])
        auc = float(roc_auc_score(y[~train], model.decision_function(x[~train])))
    held_out = runs // 2
    return auc, ((2 * held_out + 1) / (12 * held_out * held_out)) ** 0.5


def assert_indistinguishable(a: View, b: View, runs: int) -> None:
    """Party 0 cannot tell input a from input b better than by chance."""
    auc, sigma = advantage(a, b, runs)
    assert abs(auc - 0.5) <= 3 * sigma, f"distinguishable: AUC {auc:.4f}, {abs(auc - 0.5) / sigma:.1f} sigma from 0.5"


# planted faults


def faulty_masks(
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[torch.Tensor, Ring], torch.Tensor] | None = None,
    name: Callable[..., tuple[str | int | bytes, ...]] | None = None,
) -> None:
    """Below all checks: parties and dealer expand `change(mask, ring)`, from the stream `name(*name)`."""

    def expand(key: bytes, shape: tuple[int, ...], ring: Ring) -> torch.Tensor:
        x = prg.expand(key, shape, ring)
        return change(x, ring) if change else x

    def derive(key: bytes, *parts: str | int | bytes) -> bytes:
        return prg.derive(key, *(name(*parts) if name else parts))

    def add(key: bytes, x: torch.Tensor, ring: Ring) -> torch.Tensor:
        return ring.add(ring.reduce(x), expand(key, tuple(x.shape), ring))

    def sub(key: bytes, x: torch.Tensor, ring: Ring) -> torch.Tensor:
        return ring.sub(ring.reduce(x), expand(key, tuple(x.shape), ring))

    monkeypatch.setattr(correlation, "prg", SimpleNamespace(expand=expand, derive=derive, add=add, sub=sub))


def assert_hides(
    monkeypatch: pytest.MonkeyPatch,
    protocol: Protocol,
    x: torch.Tensor,
    y: torch.Tensor,
    difference: torch.Tensor | None = None,
    width: int = 64,
) -> None:
    """Tests 2 and 3 of a protocol that first opens its only input (or else what differs by `difference`); each mask is
    drawn under its own name, or test 3 would say so, as it would if those of `width` bits were one bit short.

    x and y: as many elements as make SYMBOLS in RUNS runs. The protocol has two openings of one shape or more.
    """
    expected = [x - y if difference is None else difference]
    assert_differences(observe(protocol, x), observe(protocol, y), expected)

    def uniform() -> None:
        assert_uniform([observe(protocol, x, key=seed(i)) for i in range(RUNS)])

    uniform()
    draws: list[int] = []

    def unseeded(x: torch.Tensor, ring: Ring) -> torch.Tensor:
        draws.append(1)
        return ring.reduce(x + len(draws)) if not ring.xor else x

    with monkeypatch.context() as patch:
        faulty_masks(patch, unseeded)
        with pytest.raises(AssertionError, match="not value"):
            assert_differences(observe(protocol, x), observe(protocol, y), expected)
    faults: list[dict[str, Any]] = [
        {"change": lambda x, ring: x & (2 ** (width - 1) - 1) if ring == Ring(width) else x},
        {"name": lambda name, field: (field,)},
    ]
    for fault in faults:
        with monkeypatch.context() as patch:
            faulty_masks(patch, **fault)
            with pytest.raises(AssertionError, match="not uniform"):
                uniform()
