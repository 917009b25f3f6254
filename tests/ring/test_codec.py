"""Fixed point: rounding, range, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpcinfer.errors import DtypeError, RangeError
from mpcinfer.ring.codec import MAX_FRAC_BITS, MIN_FRAC_BITS, FixedPoint

frac = st.integers(MIN_FRAC_BITS, MAX_FRAC_BITS)


@given(frac, st.floats(-1, 1), st.floats(0, 1))
def test_decode_undoes_encode_within_half_a_unit(f: int, sign: float, size: float) -> None:
    codec = FixedPoint(f)
    v = math.copysign(size * (codec.limit - 1), sign)
    x = codec.encode(torch.tensor(v, dtype=torch.float64))
    assert x.dtype == torch.int64
    assert abs(float(codec.decode(x)) - v) <= 2.0 ** -(f + 1) + abs(v) * 2**-53


@given(frac, st.integers(-(2**31), 2**31))
def test_encode_undoes_decode(f: int, v: int) -> None:
    codec = FixedPoint(f)
    x = torch.tensor([v])
    assert torch.equal(codec.encode(codec.decode(x)), x)


@given(frac, st.integers(-(2**13), 2**13), st.integers(-(2**13), 2**13))
def test_sums_of_codes_are_codes_of_sums(f: int, a: int, b: int) -> None:
    codec = FixedPoint(f)
    x, y = torch.tensor([float(a)]), torch.tensor([float(b)])
    assert torch.equal(codec.encode(x) + codec.encode(y), codec.encode(x + y))


@pytest.mark.parametrize("f", [8, 16, 24])
def test_the_limit_is_exclusive_on_both_sides(f: int) -> None:
    codec = FixedPoint(f)
    inside = math.nextafter(codec.limit, 0)
    assert abs(int(codec.encode(torch.tensor([inside], dtype=torch.float64)))) <= 2 ** (62 - f)
    assert abs(int(codec.encode(torch.tensor([-inside], dtype=torch.float64)))) <= 2 ** (62 - f)
    for outside in (codec.limit, -codec.limit, 1e300):
        with pytest.raises(RangeError, match="pixels"):
            codec.encode(torch.tensor([0.0, outside], dtype=torch.float64), "pixels")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_nan_and_no_infinity(bad: float) -> None:
    with pytest.raises(RangeError, match="NaN or infinity"):
        FixedPoint().encode(torch.tensor([1.0, bad]))


def test_messages_hold_no_value() -> None:
    with pytest.raises(RangeError) as caught:
        FixedPoint().encode(torch.tensor([123456789123.0]), "weight")
    assert "weight" in str(caught.value) and "12345" not in str(caught.value) and "1.23" not in str(caught.value)


REAL = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.uint8]


@pytest.mark.parametrize("dtype", REAL)
def test_all_real_dtypes(dtype: torch.dtype) -> None:
    assert FixedPoint(8).encode(torch.tensor([0, 1, 3], dtype=dtype)).tolist() == [0, 256, 768]


def test_bool_and_gradients() -> None:
    assert FixedPoint(8).encode(torch.tensor([True, False])).tolist() == [256, 0]
    assert not FixedPoint().encode(torch.ones(2, requires_grad=True)).requires_grad


def test_complex_is_refused() -> None:
    with pytest.raises(DtypeError, match="complex64"):
        FixedPoint().encode(torch.ones(1, dtype=torch.complex64))


@pytest.mark.parametrize("f", [7, 25, 0, -1])
def test_other_precisions_are_refused(f: int) -> None:
    with pytest.raises(RangeError, match="8 to 24"):
        FixedPoint(f)


def test_no_elements() -> None:
    assert FixedPoint().encode(torch.empty(0, 3)).shape == (0, 3)
    assert FixedPoint().decode(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3)


def test_rounds_to_nearest() -> None:
    codec = FixedPoint(8)
    assert codec.encode(torch.tensor([1.4, 1.6, -1.4, -1.6]) / 256).tolist() == [1, 2, -1, -2]
