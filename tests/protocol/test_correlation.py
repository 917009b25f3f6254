"""Dealing: shares of every kind add up, only the last party is sent anything, and plans carry kinds as plain data."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpcinfer.canonical import canonical
from mpcinfer.errors import InputError, ProtocolError
from mpcinfer.protocol import correlation
from mpcinfer.protocol.compare import Comparison
from mpcinfer.protocol.correlation import (
    Correlation,
    Field,
    Kind,
    Tensors,
    correction_bytes,
    deal,
    expand,
    free_values,
    from_json,
    kind,
    to_json,
)
from mpcinfer.protocol.linear import FixedProduct, WeightMask
from mpcinfer.protocol.multiply import SquarePair, Triple
from mpcinfer.protocol.rerandomise import ZeroSharing
from mpcinfer.protocol.truncate import Truncation
from mpcinfer.ring import prg, sharing
from mpcinfer.ring.domain import BIT, Z64, Ring
from mpcinfer.ring.kernels import MATMUL, MUL, Bilinear
from tests.openings import seed

CONV = Bilinear("conv", ((1, 2), (0, 1), (1, 1), 1))
KINDS: list[Kind] = [
    Truncation((5, 3), 16),
    Truncation((), 61),
    Triple(MUL, (4, 1), (3,)),
    Triple(MATMUL, (1, 4), (4, 3)),
    Triple(CONV, (2, 3, 4, 5), (2, 3, 2, 2)),
    SquarePair((7,)),
    SquarePair((0,)),
    Comparison((6,)),
    Comparison((2, 3), 48, 3),
    Comparison((5,), 36, 2),
    Comparison((5,), 32),
    Comparison((4,), 64, 2, products=True),
    Comparison((4,), 64, 1, products=True, others=2),
    WeightMask("fc.weight", (4, 3)),
    FixedProduct(MATMUL, "fc.weight", (2, 4), (4, 3)),
    ZeroSharing((3, 2)),
]
WEIGHT_MASK = torch.arange(-6, 6).reshape(4, 3)


def dealt(item: Kind, n: int) -> tuple[list[Tensors], bytes, list[bytes]]:
    keys = [seed("key", i) for i in range(n)]
    sent = b"".join(deal(item, "a#0", keys, lambda _: WEIGHT_MASK))
    parties = [expand(item, "a#0", key, last=False) for key in keys[:-1]]
    return [*parties, expand(item, "a#0", keys[-1], last=True, correction=sent)], sent, keys


@pytest.mark.parametrize("item", KINDS, ids=str)
class TestEveryKind:
    def test_shares_are_of_what_is_derived_from_the_masks(self, item: Kind, parties: int) -> None:
        shares, _, keys = dealt(item, parties)
        free, derived = item.free(), item.derived()
        total = {n: sharing.combine([s[n] for s in shares], f.ring) for n, f in (free | derived).items()}
        assert all(torch.equal(total[n], v) for n, v in free_values(item, "a#0", keys).items())
        values = item.derive({n: total[n] for n in free}, lambda _: WEIGHT_MASK)
        assert set(values) == set(derived)
        for n, f in derived.items():
            assert torch.equal(total[n], f.ring.reduce(values[n].to(f.ring.dtype)))
            assert tuple(total[n].shape) == f.shape

    def test_only_corrections_travel(self, item: Kind, parties: int) -> None:
        _, sent, _ = dealt(item, parties)
        assert len(sent) == correction_bytes(item) == sum(f.packed_bytes for f in item.derived().values())

    def test_a_correction_of_another_length_is_refused(self, item: Kind) -> None:
        _, sent, keys = dealt(item, 2)
        for wrong in (sent + b"\0", sent[:-1] if sent else b"1", None if sent else b"2"):
            with pytest.raises(ProtocolError, match="bytes where the plan asks for"):
                expand(item, "a#0", keys[-1], last=True, correction=wrong)

    def test_names_and_keys_make_other_shares(self, item: Kind) -> None:
        key = seed("key")
        base = expand(item, "a#0", key, last=False)
        for other in (expand(item, "a#1", key, last=False), expand(item, "a#0", seed("other"), last=False)):
            for n, value in base.items():
                if value.numel() * (item.free() | item.derived())[n].ring.bits > 64:
                    assert not torch.equal(value, other[n])
        for n, value in expand(item, "a#0", key, last=False).items():
            assert torch.equal(value, base[n])

    def test_json_and_back(self, item: Kind) -> None:
        data = json.loads(canonical(to_json(item)))
        assert data["kind"] == type(item).__name__
        back = from_json(data)
        assert back == item and hash(back) == hash(item) and to_json(back) == to_json(item)

    def test_other_parameters_are_refused(self, item: Kind) -> None:
        data = to_json(item)
        for wrong in ({**data, "extra": 1}, {"kind": data["kind"]}, {**data, "kind": "Nothing"}, {}):
            with pytest.raises(InputError):
                from_json(wrong)

    def test_masks_once_fields_any_time(self, item: Kind) -> None:
        shares, _, _ = dealt(item, 2)
        c = Correlation(item, shares[0], "a#0:K")
        assert [m.label for m in c.masks()] == [f"a#0:K.{n}" for n in item.free()]
        for n, f in item.free().items():
            assert c.mask(n).ring == f.ring and c[n] is c.mask(n).share
        for n in item.derived():
            assert c[n] is shares[0][n]
            with pytest.raises(KeyError):
                c.mask(n)
        assert "tensor" not in repr(c)


def test_correlations_with_masks_do_not_pickle() -> None:
    shares, _, _ = dealt(KINDS[0], 2)
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(Correlation(KINDS[0], shares[0], "a"))


def test_a_name_is_used_by_one_kind() -> None:
    with pytest.raises(ProtocolError, match="two kinds named Truncation"):
        kind(type("Truncation", (Kind,), {}))


class Wrong(Kind):
    """Derives another shape than it declares."""

    def free(self) -> dict[str, Field]:
        return {"r": Field((2,), Z64)}

    def derived(self) -> dict[str, Field]:
        return {"x": Field((2,), Z64)}

    def derive(self, free: Tensors, fixed: Callable[[str], torch.Tensor]) -> Tensors:
        return {"x": free["r"][:1]}


def test_derived_shapes_are_checked() -> None:
    with pytest.raises(ProtocolError, match=r"Wrong.x has shape \(1,\)"):
        list(deal(Wrong(), "a#0", [bytes(32), seed(1)], lambda _: WEIGHT_MASK))


def test_no_field_is_both_free_and_derived(monkeypatch: pytest.MonkeyPatch) -> None:
    for item in KINDS:
        assert item.free().keys().isdisjoint(item.derived())

    @dataclass(frozen=True)
    class Clash(Kind):
        def free(self) -> dict[str, Field]:
            return {"r": Field((2,), Z64)}

        derived = free

    monkeypatch.setitem(correlation._KINDS, "Clash", Clash)
    with pytest.raises(ProtocolError, match="Clash has a field that is both free and derived"):
        from_json({"kind": "Clash"})
    with pytest.raises(ProtocolError, match="both free and derived"):
        Correlation(Clash(), {"r": torch.zeros(2, dtype=torch.int64)}, "a#0")


@pytest.mark.parametrize(("ring", "size"), [(Z64, 24), (BIT, 1), (Ring(7, xor=True), 3), (Ring(36), 14)])
def test_a_field_knows_its_size(ring: Ring, size: int) -> None:
    assert Field((3, 1), ring).count == 3 and Field((3, 1), ring).packed_bytes == size
    assert Field((), ring).count == 1 and Field((3, 0), ring).packed_bytes == 0


def test_a_fixed_product_prepares_its_local_part() -> None:
    item = FixedProduct(MATMUL, "fc.weight", (2, 4), (4, 3))
    shares, _, _ = dealt(item, 3)
    w = torch.arange(12).reshape(4, 3) * 1000
    prepared = [item.prepare(s, lambda _: w + WEIGHT_MASK) for s in shares]
    a, c = (sharing.combine([p[n] for p in prepared], Z64) for n in "ac")
    assert torch.equal(c, -(a @ w))


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)


@given(st.sampled_from(sorted(correlation._KINDS)), st.dictionaries(st.text(max_size=8), json_values, max_size=4))
def test_unknown_parameters_never_make_a_kind(name: str, arguments: dict[str, object]) -> None:
    with pytest.raises(InputError):
        from_json({"kind": name, "no such parameter": 0, **arguments})


RINGS = [Z64, Ring(36), BIT, Ring(22, xor=True)]


@given(st.sampled_from(RINGS), st.integers(2, 5), st.binary(min_size=32, max_size=32))
def test_free_masks_are_the_sum_of_the_parties_streams(ring: Ring, n: int, key: bytes) -> None:
    class OneMask(Kind):
        def free(self) -> dict[str, Field]:
            return {"r": Field((4,), ring)}

    keys = [prg.derive(key, i) for i in range(n)]
    parts = [expand(OneMask(), "x#0", k, last=k is keys[-1])["r"] for k in keys]
    assert torch.equal(free_values(OneMask(), "x#0", keys)["r"], sharing.combine(parts, ring))
    assert not list(deal(OneMask(), "x#0", keys, lambda _: WEIGHT_MASK))
