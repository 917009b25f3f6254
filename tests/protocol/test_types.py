"""The sealed types: no way out by accident, and masks that hide one opening."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from mpcinfer.errors import ProtocolError
from mpcinfer.protocol.types import Cached, Mask, Masked, Shared, SharedBits, Weight, sealed_types
from mpcinfer.ring.domain import BIT, Z64, Ring

SECRET = 987654321
NUMBERS = torch.tensor([SECRET, -SECRET])
ALL: list[Any] = [
    Shared(NUMBERS, 16),
    SharedBits(torch.tensor([1, 0], dtype=torch.uint8), BIT),
    Mask(NUMBERS, Z64, "relu#0:Comparison.r"),
    Masked(NUMBERS),
    Weight("fc1.weight", NUMBERS, NUMBERS, 16),
    Cached("keys0", NUMBERS[:, None], NUMBERS[:, None], 32, 16),
]


def test_all_types_are_tested() -> None:
    assert {type(x) for x in ALL} == set(sealed_types())


@pytest.mark.parametrize("x", ALL, ids=lambda x: type(x).__name__)
class TestSealed:
    def test_no_array(self, x: Any) -> None:
        for name in ("array", "array_interface", "dlpack", "iter", "getitem", "len", "buffer"):
            name = f"__{name}__"
            assert not hasattr(x, name)
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            np.asarray(x, dtype=np.int64)
        assert np.asarray(x).dtype == object  # numpy wraps the thing itself, unopened
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            torch.as_tensor(x)
        with pytest.raises(TypeError):
            int(x)

    def test_no_content_in_texts(self, x: Any) -> None:
        for text in (repr(x), str(x), f"{x}", f"{[x]}"):
            assert str(SECRET) not in text and "tensor" not in text

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_no_pickle(self, x: Any, protocol: int) -> None:
        with pytest.raises(TypeError, match="pickled"):
            pickle.dumps(x, protocol)

    def test_no_copies(self, x: Any) -> None:
        for duplicate in (copy.copy, copy.deepcopy):
            with pytest.raises(TypeError):
                duplicate(x)

    def test_no_truth_value(self, x: Any) -> None:
        with pytest.raises(TypeError, match="truth value"):
            bool(x)
        with pytest.raises(TypeError):
            _ = not x

    def test_no_stray_attributes(self, x: Any) -> None:
        assert not hasattr(x, "__dict__")
        with pytest.raises(AttributeError):
            x.plaintext = 1

    def test_no_order(self, x: Any) -> None:
        with pytest.raises(TypeError):
            _ = x < x


def mask(ring: Ring = Z64, shape: tuple[int, ...] = (2, 3)) -> Mask:
    return Mask(torch.zeros(shape, dtype=ring.dtype), ring, "m")


def test_a_mask_is_spent_once() -> None:
    m = mask()
    m.spend((2, 3), Z64)
    assert m.used
    with pytest.raises(ProtocolError, match="used already"):
        m.spend((2, 3), Z64)


@pytest.mark.parametrize(
    ("ring", "over"),
    [
        (Ring(63), Z64), (Ring(32), Z64), (Ring(10), Z64), (Z64, Ring(63)), (Z64, Ring(64, xor=True)),
        (Ring(7, xor=True), Ring(8, xor=True)), (BIT, Ring(1)),
    ],
)  # fmt: skip
def test_a_mask_is_for_its_own_ring(ring: Ring, over: Ring) -> None:
    m = mask(ring)
    with pytest.raises(ProtocolError, match="it would leak"):
        m.spend((2, 3), over)
    assert not m.used


@pytest.mark.parametrize("shape", [(3, 2), (6,), (2, 3, 1), (2, 4), ()])
def test_a_mask_is_for_its_own_shape(shape: tuple[int, ...]) -> None:
    m = mask()
    with pytest.raises(ProtocolError, match="shape"):
        m.spend(shape, Z64)
    assert not m.used


def test_dtypes_are_checked() -> None:
    with pytest.raises(ProtocolError, match="int64"):
        Shared(torch.zeros(2))
    with pytest.raises(ProtocolError, match="XOR"):
        SharedBits(torch.zeros(2, dtype=torch.int64), Z64)
    with pytest.raises(ProtocolError, match="XOR"):
        SharedBits(torch.zeros(2, dtype=torch.int64), BIT)


class TestArithmetic:
    def test_scales_align_on_the_finer(self) -> None:
        a, b = Shared(torch.tensor([3]), 4), Shared(torch.tensor([5]), 6)
        for z, expected in ((a + b, 17), (a - b, 7), (b - a, -7), (b + a, 17), (-a, -3)):
            assert z.share.tolist() == [expected]
        assert (a + b).frac_bits == 6 and (-a).frac_bits == 4

    def test_sums_wrap_around(self) -> None:
        a = Shared(torch.tensor([2**63 - 1]))
        assert (a + Shared(torch.tensor([1]))).share.tolist() == [-(2**63)]

    def test_linear_maps_and_public_factors(self) -> None:
        a = Shared(torch.arange(6).reshape(2, 3), 16)
        assert a.map(lambda t: t.sum(0)).share.tolist() == [3, 5, 7]
        assert a.times(-2).share.tolist() == [[0, -2, -4], [-6, -8, -10]]
        assert a.times(torch.tensor([0, 1, 0])).share.tolist() == [[0, 1, 0], [0, 4, 0]]
        assert a.times(3).frac_bits == a.map(torch.t).frac_bits == 16
        assert a.map(torch.t).shape == (3, 2)

    def test_rescaling_goes_one_way(self) -> None:
        a = Shared(torch.tensor([-3]), 4)
        assert a.rescaled(6).share.tolist() == [-12] and a.rescaled(6).frac_bits == 6
        assert a.rescaled(4).share.tolist() == [-3]
        with pytest.raises(ProtocolError, match="truncate"):
            a.rescaled(3)

    @pytest.mark.parametrize("other", [1, 1.0, torch.tensor([1])])
    def test_public_things_do_not_slip_in(self, other: Any) -> None:
        a = Shared(torch.tensor([1]))
        for combine in (lambda: a + other, lambda: a - other, lambda: a * other, lambda: other * a, lambda: other + a):
            with pytest.raises(TypeError):
                combine()
