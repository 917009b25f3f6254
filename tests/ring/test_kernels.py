"""Convolutions and what bilinear maps share: against torch in float64 on small integers, and mod 2^64 on large ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from mpcinfer.ring import kernels
from mpcinfer.ring.kernels import MATMUL, MUL, Bilinear

RNG = torch.Generator().manual_seed(1)
# x, w, stride, padding, dilation, groups
CONVOLUTIONS = {
    "1d": ((2, 3, 11), (4, 3, 3), (1,), (0,), (1,), 1),
    "1d strided padded dilated": ((2, 4, 17), (6, 2, 3), (2,), (3,), (2,), 2),
    "1d depthwise": ((2, 4, 9), (4, 1, 3), (2,), (1,), (1,), 4),
    "2d": ((2, 3, 7, 6), (5, 3, 3, 3), (1, 1), (0, 0), (1, 1), 1),
    "2d 1x1": ((2, 3, 4, 4), (5, 3, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "2d strided": ((1, 2, 9, 8), (3, 2, 3, 2), (2, 3), (0, 0), (1, 1), 1),
    "2d padded": ((2, 2, 5, 5), (3, 2, 3, 5), (1, 1), (1, 2), (1, 1), 1),
    "2d dilated": ((1, 2, 9, 9), (3, 2, 3, 3), (1, 1), (2, 1), (2, 3), 1),
    "2d grouped": ((2, 6, 6, 6), (4, 3, 3, 3), (1, 1), (1, 1), (1, 1), 2),
    "2d grouped strided dilated padded": ((3, 4, 10, 9), (8, 1, 3, 3), (2, 1), (2, 1), (2, 2), 4),
    "2d depthwise": ((2, 5, 7, 7), (5, 1, 3, 3), (1, 1), (1, 1), (1, 1), 5),
    "2d depthwise strided dilated": ((2, 5, 9, 9), (5, 1, 3, 2), (2, 1), (1, 0), (1, 2), 5),
    "one channel, one pixel": ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "no batch": ((0, 3, 7, 6), (5, 3, 3, 3), (1, 1), (0, 0), (1, 1), 1),
    "no batch, depthwise": ((0, 3, 7, 6), (3, 1, 3, 3), (1, 1), (0, 0), (1, 1), 3),
}


def small(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(-1000, 1000, shape, generator=RNG)


def large(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=RNG)


Ints = tuple[int, ...]


def naive_conv(x: np.ndarray, w: np.ndarray, stride: Ints, padding: Ints, dilation: Ints, groups: int) -> np.ndarray:
    """The definition, one output at a time, in unsigned words that wrap around."""
    d = w.ndim - 2
    x = np.pad(x.view(np.uint64), [(0, 0), (0, 0), *((p, p) for p in padding)])
    w = w.view(np.uint64)
    o, per = w.shape[:2]
    spatial = [(x.shape[2 + i] - dilation[i] * (w.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in range(d)]
    out = np.zeros((x.shape[0], o, *spatial), np.uint64)
    for channel in range(o):
        first = channel // (o // groups) * per
        for place in itertools.product(*(range(s) for s in spatial)):
            window = tuple(
                slice(p * s, p * s + dl * (k - 1) + 1, dl)
                for p, s, dl, k in zip(place, stride, dilation, w.shape[2:], strict=True)
            )
            patch = x[(slice(None), slice(first, first + per), *window)]
            out[(slice(None), channel, *place)] = (patch * w[channel]).sum(tuple(range(1, w.ndim)), dtype=np.uint64)
    return out.view(np.int64)


@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
class TestConv:
    def test_small_integers_as_torch(self, case: tuple) -> None:
        xs, ws, stride, padding, dilation, groups = case
        x, w = small(xs), small(ws)
        torch_conv = functional.conv1d if len(ws) == 3 else functional.conv2d
        expected = torch_conv(x.double(), w.double(), None, stride, padding, dilation, groups)
        assert torch.equal(kernels.conv(x, w, stride, padding, dilation, groups), expected.long())

    def test_large_numbers_wrap_around(self, case: tuple) -> None:
        xs, ws, *args = case
        x, w = large(xs), large(ws)
        expected = naive_conv(x.numpy(), w.numpy(), *args)
        assert (kernels.conv(x, w, *args).numpy() == expected).all()

    def test_meta_gives_the_shape(self, case: tuple) -> None:
        xs, ws, *args = case
        expected = tuple(kernels.conv(small(xs), small(ws), *args).shape)
        op = Bilinear("conv", tuple(args))
        assert op.shape(xs, ws) == expected
        assert tuple(op(small(xs), small(ws)).shape) == expected

    def test_slices_of_the_batch_change_nothing(self, case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
        xs, ws, *args = case
        x, w = large(xs), large(ws)
        whole = kernels.conv(x, w, *args)
        monkeypatch.setattr(kernels, "_PATCH_ELEMENTS", 1)
        assert torch.equal(kernels.conv(x, w, *args), whole)

    def test_strided_inputs(self, case: tuple) -> None:
        xs, ws, *args = case
        x, w = large(xs[::-1]).permute(*reversed(range(len(xs)))), large(ws[::-1]).permute(*reversed(range(len(ws))))
        assert torch.equal(kernels.conv(x, w, *args), kernels.conv(x.contiguous(), w.contiguous(), *args))


def test_a_window_larger_than_the_image() -> None:
    for device in ("cpu", "meta"):
        x, w = (torch.empty(s, dtype=torch.int64, device=device) for s in ((1, 1, 2, 2), (1, 1, 3, 3)))
        with pytest.raises(ValueError, match="does not fit"):
            kernels.conv(x, w, (1, 1), (0, 0), (1, 1), 1)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
def test_mul_is_mod_2_64(a: int, b: int) -> None:
    assert int(MUL(torch.tensor(a), torch.tensor(b))) % 2**64 == a * b % 2**64


def test_mul_broadcasts() -> None:
    assert MUL.shape((2, 3), (3,)) == (2, 3)
    assert MUL.shape((4, 1), (1, 5)) == (4, 5)


def test_bilinear_is_plain_data() -> None:
    op = Bilinear("conv", ((1, 1), (0, 0), (1, 1), 1))
    assert op == Bilinear("conv", ((1, 1), (0, 0), (1, 1), 1)) and hash(op) == hash(Bilinear(op.name, op.args))
    with pytest.raises(ValueError, match="unknown bilinear map"):
        Bilinear("median")(torch.zeros(1), torch.zeros(1))


def test_maps_are_bilinear() -> None:
    for op, xs, ws in [(MUL, (3, 4), (4,)), (MATMUL, (1, 4), (4, 3)), (MATMUL, (5, 4), (4, 3))]:
        x, y, w = large(xs), large(xs), large(ws)
        assert torch.equal(op(x + y, w), op(x, w) + op(y, w))


def test_pool_windows() -> None:
    x = torch.arange(2 * 5 * 6).reshape(2, 5, 6)
    windows = kernels.pool_windows(x, (2, 3), (2, 1), (1, 2))
    assert windows.shape == (2, 2, 2, 2, 3)
    expected = x.unfold(1, 2, 2).unfold(2, 5, 1)[..., ::2]
    assert torch.equal(windows, expected)
    view = kernels.pool_windows(x[:, 1:, 2:], (2, 2), (1, 1), (1, 1))
    assert torch.equal(view, x[:, 1:, 2:].unfold(1, 2, 1).unfold(2, 2, 1))


@pytest.mark.parametrize(
    ("xs", "ws", "args"),
    [
        ((2, 4, 7), (4, 3, 3), ((1,), (0,), (0,), (1,), 1)),
        ((2, 4, 7), (4, 3, 4), ((3,), (2,), (1,), (2,), 2)),
        ((2, 3, 5, 4), (3, 2, 3, 2), ((2, 3), (1, 0), (1, 2), (1, 2), 1)),
        ((1, 4, 5, 4), (4, 1, 3, 3), ((1, 1), (2, 2), (0, 0), (1, 1), 4)),
        ((1, 2, 3, 3), (2, 2, 2, 2), ((2, 2), (1, 1), (1, 1), (1, 1), 1)),  # padded by as much as the kernel spans
    ],
)
def test_transposed_convolution(xs: Ints, ws: Ints, args: tuple[Ints, Ints, Ints, Ints, int]) -> None:
    x, w = small(xs), small(ws)
    stride, padding, output_padding, dilation, groups = args
    torch_conv = functional.conv_transpose1d if len(ws) == 3 else functional.conv_transpose2d
    expected = torch_conv(x.double(), w.double(), None, stride, padding, output_padding, groups, dilation)
    op = Bilinear("conv_transpose", args)
    assert torch.equal(op(x, w), expected.long())
    assert op.shape(xs, ws) == tuple(expected.shape)
    # what wraps around is what is left of it modulo 2^64
    assert torch.equal(op(x + (1 << 40), w << 40) - op(torch.full_like(x, 1 << 40), w << 40), op(x, w) << 40)
