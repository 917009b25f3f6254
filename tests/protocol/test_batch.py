"""Batches: members are correlations as if dealt one by one, at the same price, from streams of their own."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import pytest
import torch

from mpcinfer.errors import ProtocolError
from mpcinfer.protocol import batch
from mpcinfer.protocol.batch import Batch, batches, expanded_bytes
from mpcinfer.protocol.compare import Comparison
from mpcinfer.protocol.contest import Contest
from mpcinfer.protocol.correlation import Kind, Tensors, correction_bytes
from mpcinfer.protocol.exponential import Exponential
from mpcinfer.protocol.gumbel import Gumbel
from mpcinfer.protocol.lift import Lift
from mpcinfer.protocol.linear import FixedProduct, WeightMask
from mpcinfer.protocol.lookup import OneHot
from mpcinfer.protocol.multiply import SquarePair, Triple
from mpcinfer.protocol.octaves import TruncatedComparison
from mpcinfer.protocol.piecewise import Pieces
from mpcinfer.protocol.polynomial import TruncatedPowers
from mpcinfer.protocol.rerandomise import ZeroSharing
from mpcinfer.protocol.scaled import TruncatedScaling
from mpcinfer.protocol.tracing import Plan
from mpcinfer.protocol.truncate import Truncation
from mpcinfer.protocol.truncated_product import ProductOfTruncated, TruncatedProduct
from mpcinfer.ring import prg, sharing
from mpcinfer.ring.domain import Z64, Ring
from mpcinfer.ring.kernels import MATMUL, MATMUL_T, MUL, Bilinear
from tests.openings import seed

BATCHED: list[Kind] = [
    Truncation((5, 3), 16),
    Truncation((), 61),
    Triple(MUL, (4, 1), (3,)),
    Triple(MUL, (3,), (2, 4, 3)),
    Triple(MATMUL, (1, 4), (4, 3)),
    Triple(MATMUL, (2, 1, 4), (4, 3)),
    TruncatedProduct((3, 1), (4,), 17),
    ProductOfTruncated((3, 1), (4,), 17, 30),
    TruncatedComparison((2, 2), 5, 9),
    TruncatedComparison((3,), 5, 0),
    TruncatedComparison((2, 2), 4, 8),
    SquarePair((7,)),
    SquarePair((0,)),
    TruncatedPowers((3,), 17, 3),
    TruncatedScaling((2, 3), (3,), 17),
    Comparison((6,)),
    Comparison((2, 3), 48, 3),
    Comparison((5,), 36, 2),
    Comparison((5,), 17, 3, numbers=True, d=5),
    Comparison((4,), 64, 2, products=True),
    Comparison((4,), 64, 1, products=True, others=2),
    Comparison((4,), 48, 1, products=True, others=1, other_bits=8),
    Contest((3,), 4, 48),
    Contest((1, 2), 3, 64, others=1),
    Contest((2,), 4, 48, others=1, other_bits=8),
    Lift((5,), 8),
    Pieces((3,), 48, 5, 47, 16),
    Pieces((3,), 48, 8, 47, 16, True),
    Exponential((3,), 16, 42, False, 48),
    Exponential((2, 2), 16, 39, True, 48),
    Exponential((3,), 16, 42, False, 45, 19),
    OneHot((2,), 3),
    ZeroSharing((3, 2)),
]
ALONE: list[Kind] = [
    Triple(MATMUL, (4,), (4, 3)),
    Triple(Bilinear("conv", ((1,), (0,), (1,), 1)), (1, 1, 4), (1, 1, 2)),
    WeightMask("w", (4, 3)),
    FixedProduct(MUL, "w", (2, 4), (2, 4)),
    FixedProduct(MATMUL, "w", (2, 4), (2, 4, 3)),
    Truncation((1 << 16,), 16),
]
MEMBERS = 5


def no_weights(name: str) -> torch.Tensor:
    raise AssertionError(name)


def of(item: Kind, count: int = MEMBERS) -> Batch:
    (found,) = batches([(f"n{i}#0", item) for i in range(count)])
    return found


def dealt(whole: Batch, n: int) -> tuple[list[list[Tensors]], bytes]:
    keys = [seed("key", i) for i in range(n)]
    sent = b"".join(whole.deal(keys, no_weights))
    parties = [whole.expand(key, last=False) for key in keys[:-1]]
    return [*parties, whole.expand(keys[-1], last=True, correction=sent)], sent


@pytest.mark.parametrize("item", BATCHED, ids=str)
class TestMembers:
    def test_shares_are_of_what_is_derived_from_the_masks(self, item: Kind, parties: int) -> None:
        shares, sent = dealt(of(item), parties)
        free, derived = item.free(), item.derived()
        for i in range(MEMBERS):
            total = {n: sharing.combine([party[i][n] for party in shares], f.ring) for n, f in (free | derived).items()}
            values = item.derive({n: total[n].contiguous() for n in free}, no_weights)
            for n, f in derived.items():
                assert torch.equal(total[n], f.ring.reduce(values[n].to(f.ring.dtype))), n
                assert tuple(total[n].shape) == f.shape
        assert len(sent) == MEMBERS * correction_bytes(item) == of(item).correction_bytes

    def test_members_have_nothing_in_common(self, item: Kind) -> None:
        shares, _ = dealt(of(item), 2)
        for party in shares:
            for a, b in combinations(party, 2):
                for n, f in item.free().items():
                    if f.count * f.ring.bits > 64:
                        assert not torch.equal(a[n], b[n])

    def test_a_correction_of_another_length_is_refused(self, item: Kind) -> None:
        _, sent = dealt(of(item), 2)
        for wrong in (sent + b"\0", sent[:-1] if sent else b"1", None if sent else b"2"):
            with pytest.raises(ProtocolError, match="bytes where the plan asks for"):
                of(item).expand(seed("key", 1), last=True, correction=wrong)


@pytest.mark.parametrize(
    "item",
    [
        FixedProduct(MATMUL, "w", (2, 4), (4, 3)),
        FixedProduct(MATMUL, "w", (4,), (4, 3)),
        FixedProduct(MATMUL_T, "w", (1, 1, 4), (3, 4)),
    ],
    ids=str,
)
def test_products_with_one_weight_are_one_product(item: FixedProduct, parties: int) -> None:
    """Each member is prepared as if it was alone: -op(a, W) in shares, W = F - B."""
    mask, weight = (prg.expand(seed(n), item.w, Z64) for n in "bw")
    keys = [seed("key", i) for i in range(parties)]
    sent = b"".join(of(item).deal(keys, lambda _: mask))
    expanded = [
        of(item).expand(key, last=i == parties - 1, correction=sent, opened=lambda _: weight + mask)
        for i, key in enumerate(keys)
    ]
    masks = []
    for i in range(MEMBERS):
        a, c = (sharing.combine([party[i][n] for party in expanded], Z64) for n in "ac")
        assert torch.equal(c, -item.op(a, weight)) and tuple(a.shape) == item.x
        masks.append(a)
    assert not any(torch.equal(a, b) for a, b in combinations(masks, 2))


def test_a_swapped_axis_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above would catch: members that lie along another axis than the one they are looked for on."""
    item = Comparison((2, 3), 48, MEMBERS, products=True)
    axes = {n: 0 for n in batch._axes(item)}
    monkeypatch.setattr(batch, "_axes", lambda _: axes)
    with pytest.raises((AssertionError, RuntimeError)):
        TestMembers().test_shares_are_of_what_is_derived_from_the_masks(item, 2)


@pytest.mark.parametrize("item", ALONE, ids=str)
def test_what_does_not_fit_together_is_dealt_alone(item: Kind) -> None:
    assert [b.names for b in batches([("a#0", item), ("b#0", item)])] == [("a#0",), ("b#0",)]


SLICED: list[Kind] = [
    dataclasses.replace(item, shape=shape)  # type: ignore[type-var]
    for item, shape in zip(
        [item for item in BATCHED if type(item).batched is Kind.batched and hasattr(item, "shape")],
        [(37, 3), (2, 1, 20), (50,), (1, 17, 2)] * len(BATCHED),
        strict=False,
    )
]


def sliced(item: Kind, n: int, batches_: list[Batch]) -> tuple[list[Tensors], list[bytes]]:
    """The parties' shares of the whole, and what was dealt of each slice."""
    keys, sent, shares = [seed("key", i) for i in range(n)], [], []
    for each in batches_:
        sent.append(b"".join(each.deal(keys, no_weights)))
    for i, key in enumerate(keys):
        found: dict[str, tuple[Kind, Tensors]] = {}
        for each, correction in zip(batches_, sent, strict=True):
            last = i == n - 1
            each.give(each.expand(key, last=last, correction=correction if last else None), found)
        assert [(name, kind) for name, (kind, _) in found.items()] == [("n#0", item)]
        shares.append(found["n#0"][1])
    return shares, sent


@pytest.mark.parametrize("item", SLICED, ids=str)
class TestSlices:
    def slices(self, item: Kind, monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
        monkeypatch.setattr(batch, "SLICE_BYTES", expanded_bytes(item) // 2 - 1)
        found = batches([("n#0", item)])
        assert len(found) >= 2 and len({each.names for each in found}) == len(found)
        assert all(each.drawn == ("n#0",) for each in found)
        return found

    def test_together_they_are_the_correlation(self, item: Kind, parties: int, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.slices(item, monkeypatch)
        shares, sent = sliced(item, parties, found)
        free, derived = item.free(), item.derived()
        total = {n: sharing.combine([s[n] for s in shares], f.ring) for n, f in (free | derived).items()}
        values = item.derive({n: total[n] for n in free}, no_weights)
        for n, f in derived.items():
            assert tuple(total[n].shape) == f.shape
            assert torch.equal(total[n], f.ring.reduce(values[n].to(f.ring.dtype))), n
        assert sum(map(len, sent)) == correction_bytes(item) == sum(each.correction_bytes for each in found)

    def test_no_row_has_the_masks_of_another(self, item: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each slice has streams of its own; with the first one's for all, this finds it."""
        found = self.slices(item, monkeypatch)

        def repeated(batches_: list[Batch]) -> int:
            (first, second), count = found[:2], 0
            assert first.slice is not None and second.slice is not None
            shares, _ = sliced(item, 2, batches_)
            for n, f in item.free().items():
                flat = first.slice.row.batched(first.slice.of)
                assert flat is not None
                whole = shares[0][n].view(flat.free()[n].shape)
                axis, rows = batch._axes(first.slice.row)[n], second.slice.count
                a, b = whole.narrow(axis, 0, rows), whole.narrow(axis, second.slice.first, rows)
                count += a.numel() * f.ring.bits > 20 and torch.equal(a, b)
            return count

        assert not repeated(found)
        assert not item.free() or repeated([dataclasses.replace(each, names=("n#0/0",)) for each in found])


def test_what_is_small_or_has_an_operand_is_not_sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not batch.slices("n#0", Truncation((1 << 10,), 16))
    monkeypatch.setattr(batch, "SLICE_BYTES", 1)
    for item in (Triple(MUL, (40,), (40,)), FixedProduct(MATMUL, "w", (40, 4), (4, 3)), WeightMask("w", (40, 3))):
        assert not batch.slices("n#0", item)


def test_slices_have_a_size_and_leave_no_bits_over() -> None:
    item = Pieces((1, 128, 3072), 48, 8, 47, 16)
    found = batch.slices("n#0", item)
    assert len(found) == -(-expanded_bytes(item) // batch.SLICE_BYTES)
    assert all(expanded_bytes(each.item) <= 1.1 * batch.SLICE_BYTES and each.count % 8 == 0 for each in found)
    assert sum(each.count for each in found) == found[0].of
    plan = Plan((("n#0", item), ("m#0", Truncation((2,), 16))))
    assert set(plan.places) == {"n#0", "m#0"} and plan.correction_bytes() == sum(
        correction_bytes(each) for _, each in plan.entries
    )


def test_noise_is_dealt_in_batches_too() -> None:
    """Its derived field is no function that `derive` gives twice for other shapes, but its size is bounded."""
    shares, _ = dealt(of(Gumbel((50,), 16)), 2)
    for i in range(MEMBERS):
        g = sharing.combine([party[i]["g"] for party in shares], Z64).double() / 2**16
        assert -4 < float(g.min()) and float(g.max()) < 40


def test_batches_are_in_the_order_of_their_first_members() -> None:
    a, b = Truncation((2,), 16), Truncation((2,), 17)
    entries: list[tuple[str, Kind]] = [("1", a), ("2", b), ("3", a), ("4", SquarePair((2,))), ("5", b)]
    assert [x.names for x in batches(entries)] == [("1", "3"), ("2", "5"), ("4",)]


def test_portions_are_in_order_and_have_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = Truncation((2,), 16), SquarePair((10,))
    items = [small, small, large, small, small, small, small]
    monkeypatch.setattr(batch, "PORTION_BYTES", 3 * expanded_bytes(small))
    assert expanded_bytes(large) > batch.PORTION_BYTES
    plan = Plan(tuple((str(i), item) for i, item in enumerate(items)))
    assert [[b.names for b in part] for part in plan.portions] == [[("0", "1")], [("2",)], [("3", "4", "5")], [("6",)]]
    assert plan.places == {"0": 0, "1": 0, "2": 1, "3": 2, "4": 2, "5": 2, "6": 3}
    assert [b.names for b in plan.batches] == [("0", "1"), ("2",), ("3", "4", "5"), ("6",)]
    assert plan.expanded_bytes == 6 * expanded_bytes(small) + expanded_bytes(large)
    (runs,) = plan.repeated(2).portions  # equal correlations of runs that are dealt at once are dealt together
    assert ("0/0", "0/1", "0/3", "0/4", "0/5", "0/6", "1/0") == runs[0].names[:7]


def test_batches_have_a_size() -> None:
    item = Truncation((1 << 14,), 16)
    found = batches([(str(i), item) for i in range(9)])
    assert [len(b.names) for b in found] == [2, 2, 2, 2, 1]


@pytest.mark.parametrize("bits", [1, 3, 8, 15, 22, 48, 64])
@pytest.mark.parametrize("length", [0, 1, 5, 8])
def test_rows_are_packed_one_by_one(bits: int, length: int) -> None:
    ring = Ring(bits, xor=bits < 32)
    rows = ring.reduce(torch.randint(-(2**62), 2**62, (4, length), generator=torch.Generator().manual_seed(1)))
    rows = rows.to(ring.dtype) if not ring.xor else ring.reduce(rows.to(ring.dtype))
    data = ring.pack_rows(rows)
    assert bytes(data) == b"".join(bytes(ring.pack(row)) for row in rows)
    assert torch.equal(ring.unpack_rows(data, (4, length)), rows)
    with pytest.raises(ValueError, match="bytes where"):
        ring.unpack_rows(bytes(data) + b"\0", (4, length))
