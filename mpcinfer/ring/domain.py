"""The groups in which shares live: Z_2^k under addition, and k-bit words under XOR.

A `Ring` says how shares combine, which values are uniform, how wide an opening of them is on the wire. Elements are
held in the smallest torch integer that fits (additive: always int64), reduced to the low k bits except for k = 64,
where the machine's own wrap-around is the ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mpcinfer.ring import bits as packed

_SMALLEST = ((8, torch.uint8), (16, torch.int16), (32, torch.int32), (64, torch.int64))


@dataclass(frozen=True)
class Ring:
    """`bits` wide, `xor`: combined by exclusive or, else added mod 2^bits."""

    bits: int
    xor: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 64:
            raise ValueError(f"a ring is 1 to 64 bits wide, not {self.bits}")

    @cached_property
    def dtype(self) -> torch.dtype:
        """The container of one element."""
        if not self.xor:
            return torch.int64
        return next(dtype for width, dtype in _SMALLEST if self.bits <= width)

    @cached_property
    def width(self) -> int:
        """Bits of the container."""
        return self.dtype.itemsize * 8

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The representative in [0, 2^bits) (for 64 bits: x itself)."""
        return x if self.bits == self.width else x & ((1 << self.bits) - 1)

    def add(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The group operation."""
        return a ^ b if self.xor else self.reduce(a + b)

    def sub(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The inverse of `add`."""
        return a ^ b if self.xor else self.reduce(a - b)

    def packed_bytes(self, count: int) -> int:
        """Bytes on the wire for `count` elements."""
        return (count * self.bits + 7) // 8

    def pack(self, x: torch.Tensor) -> memoryview:
        """Elements in row-major order, `bits` bits each, least significant first, without gaps."""
        x = x.contiguous()
        if self._whole is not None:
            return x.numpy().reshape(-1).astype(self._whole, copy=False).view("uint8").data
        return packed.pack(x.numpy().reshape(-1), self.bits).data

    def unpack(self, data: memoryview | bytes, shape: tuple[int, ...]) -> torch.Tensor:
        """The inverse of `pack`; `data` must be exactly `packed_bytes` long (ValueError)."""
        count = 1
        for size in shape:
            count *= size
        if len(data) != self.packed_bytes(count):
            raise ValueError(f"{len(data)} bytes where {self.packed_bytes(count)} were expected")
        found = self._read(data, count)
        return torch.from_numpy(found.astype(self._numpy, copy=self._whole is not None)).reshape(shape)

    def add_packed(self, own: torch.Tensor, data: memoryview | bytes) -> torch.Tensor:
        """`add` of a tensor and what somebody has packed, who has as many elements, in one pass."""
        mine = own.numpy()
        theirs = self._read(data, mine.size).reshape(mine.shape)
        if self.xor:
            return torch.from_numpy(np.asarray(mine ^ theirs))
        total = np.asarray(mine + theirs)  # of scalars numpy makes no array
        if self.bits < self.width:
            total &= (1 << self.bits) - 1
        return torch.from_numpy(total)

    @cached_property
    def _numpy(self) -> np.dtype[Any]:
        return np.dtype(str(self.dtype).removeprefix("torch."))

    @cached_property
    def _whole(self) -> np.dtype[Any] | None:
        """What an element is on the wire, where it takes whole bytes."""
        if self.bits == self.width:
            return self._numpy
        return np.dtype(f"u{self.bits // 8}") if self.bits in (8, 16, 32) else None

    def _read(self, data: memoryview | bytes, count: int) -> npt.NDArray[Any]:
        """The elements, in a type as wide as theirs or a narrower one; perhaps the very bytes that were given."""
        if self._whole is not None:
            return np.frombuffer(data, self._whole)
        flat = np.empty(count, self._numpy)
        packed.unpack(data, self.bits, flat)
        return flat

    def pack_rows(self, x: torch.Tensor) -> memoryview:
        """Each row of x [m, n] as `pack` packs it, one after the other."""
        if x.shape[1] * self.bits % 8 == 0:
            return self.pack(x)
        return packed.pack_rows(x.contiguous().numpy(), self.bits).reshape(-1).data

    def unpack_rows(self, data: memoryview | bytes, shape: tuple[int, int]) -> torch.Tensor:
        """The inverse of `pack_rows`; `data` must be exactly as long as that makes it (ValueError)."""
        count, length = shape
        if length * self.bits % 8 == 0:
            return self.unpack(data, shape)
        if len(data) != count * self.packed_bytes(length):
            raise ValueError(f"{len(data)} bytes where {count * self.packed_bytes(length)} were expected")
        out = torch.empty(shape, dtype=self.dtype)
        packed.unpack_rows(data, self.bits, out.numpy())
        return out


Z64 = Ring(64)
BIT = Ring(1, xor=True)


def array(x: torch.Tensor, *shape: int) -> npt.NDArray[Any]:
    """What a kernel works on: the elements in this shape, one after the other in memory; copied if they are not."""
    found: npt.NDArray[Any] = x.contiguous().numpy().reshape(shape)
    return found
