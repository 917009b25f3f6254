"""Bilinear maps over Z_2^64: product, matrix product, convolution, on int64 tensors (meta tensors give shapes).

A map is named by a `Bilinear`, plain data that a plan can carry: the parties and the dealer must agree on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from mpcinfer.ring.products import matmul, matmul_t

# im2col of larger inputs is done in slices of the batch, to bound memory (elements of 8 bytes)
_PATCH_ELEMENTS = 1 << 26


def pool_windows(
    x: torch.Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> torch.Tensor:
    """A strided view [..., *out, *kernel] of the windows of x [..., *spatial] (no padding, no copy)."""
    d = len(kernel)
    lead, spatial = x.shape[:-d], x.shape[-d:]
    strides = x.stride()
    out = tuple(
        (s - dl * (k - 1) - 1) // st + 1 for s, k, st, dl in zip(spatial, kernel, stride, dilation, strict=True)
    )
    if min(out, default=1) < 1:
        raise ValueError(f"a window of {kernel} does not fit into {tuple(spatial)}")
    return x.as_strided(
        (*lead, *out, *kernel),
        (
            *strides[:-d],
            *(a * b for a, b in zip(strides[-d:], stride, strict=True)),
            *(a * b for a, b in zip(strides[-d:], dilation, strict=True)),
        ),
        x.storage_offset(),
    )


def conv(
    x: torch.Tensor,
    w: torch.Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> torch.Tensor:
    """Cross-correlation mod 2^64 in one or two dimensions: x [N, C, *S], w [O, C/groups, *K] -> [N, O, *S']."""
    d = w.dim() - 2
    x = functional.pad(x, [p for size in reversed(padding) for p in (size, size)]).contiguous()
    windows = pool_windows(x, tuple(w.shape[2:]), stride, dilation)  # [N, C, *out, *K]
    n, c, out, taps = x.shape[0], x.shape[1], tuple(windows.shape[2 : 2 + d]), tuple(windows.shape[2 + d :])
    o = w.shape[0]
    area, depth = _product(out), _product(taps)
    if groups == c and o == c:  # depthwise: a short sum of shifted images beats thin matrix products
        weights = w.reshape(c, depth)
        columns = windows.reshape(n, c, *out, depth)
        result = torch.zeros((n, c, *out), dtype=torch.int64, device=x.device)
        for tap in range(depth):
            result += columns[..., tap] * weights[:, tap].reshape(c, *([1] * d))
        return result
    per = max(1, _PATCH_ELEMENTS // max(1, c * depth * area))
    parts = []
    for first in range(0, max(1, n), per):
        view = windows[first : first + per]
        batch = view.shape[0]
        # [groups, C/groups * K, N * out]: one matrix product per group serves the whole batch
        order = (1, *range(2 + d, 2 + 2 * d), 0, *range(2, 2 + d))
        patches = view.permute(order).reshape(groups, c // groups * depth, batch * area)
        rows = w.reshape(groups, o // groups, c // groups * depth)
        y = matmul(rows, patches)
        parts.append(y.reshape(o, batch, *out).transpose(0, 1))
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).contiguous()


def conv_transpose(
    x: torch.Tensor,
    w: torch.Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    output_padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> torch.Tensor:
    """Transposed convolution mod 2^64: x [N, C, *S], w [C, O/groups, *K] -> [N, O, *S'].

    It is a convolution of x, with zeros between its elements, with the kernel turned around.
    """
    d = w.dim() - 2
    axes = tuple(range(2, 2 + d))
    spread = x.new_zeros(
        (*x.shape[:2], *((size - 1) * step + 1 for size, step in zip(x.shape[2:], stride, strict=True)))
    )
    spread[(slice(None), slice(None), *(slice(None, None, step) for step in stride))] = x
    edges = [step * (k - 1) - p for step, k, p in zip(dilation, w.shape[2:], padding, strict=True)]
    pairs = list(zip(edges, output_padding, strict=True))
    spread = functional.pad(spread, [p for edge, more in reversed(pairs) for p in (edge, edge + more)])
    turned = w.reshape(groups, -1, *w.shape[1:]).transpose(1, 2).reshape(-1, w.shape[0] // groups, *w.shape[2:])
    return conv(spread, turned.flip(axes), (1,) * d, (0,) * d, dilation, groups)


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


@dataclass(frozen=True)
class Bilinear:
    """A bilinear map as data.

    `name`: "mul" (element-wise, broadcasting), "matmul", "matmul_t" (x @ w.T), "conv" or "conv_transpose".

    `args` of conv: (stride, padding, dilation, groups), each but the last a tuple per dimension; conv_transpose has
    output_padding after padding.
    """

    name: str
    args: tuple[Any, ...] = ()

    def __call__(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """The map's value on int64 tensors, mod 2^64; on meta tensors, its shape."""
        if self.name == "mul":
            return x * w
        if self.name == "matmul":
            return matmul(x, w)
        if self.name == "matmul_t":
            return matmul_t(x, w)
        if self.name == "conv":
            stride, padding, dilation, groups = self.args
            return conv(x, w, tuple(stride), tuple(padding), tuple(dilation), groups)
        if self.name == "conv_transpose":
            stride, padding, more, dilation, groups = self.args
            return conv_transpose(x, w, tuple(stride), tuple(padding), tuple(more), tuple(dilation), groups)
        raise ValueError(f"unknown bilinear map {self.name!r}")

    def shape(self, x: tuple[int, ...], w: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the value for arguments of shapes x and w."""
        meta = self(_meta(x), _meta(w))
        return tuple(meta.shape)

    def multiply_adds(self, x: tuple[int, ...], w: tuple[int, ...]) -> int:
        """How many multiplications the value takes for arguments of shapes x and w."""
        if self.name == "conv_transpose":  # each element of x meets the kernels of one group
            return _product(x) * _product(w[1:])
        terms = {"mul": (), "matmul": x[-1:], "matmul_t": x[-1:], "conv": w[1:]}[self.name]
        return _product(self.shape(x, w)) * _product(tuple(terms))


def _meta(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


MUL = Bilinear("mul")
MATMUL = Bilinear("matmul")
MATMUL_T = Bilinear("matmul_t")
