"""Kinds of value that cannot be confused: shares, masks, what was opened under a mask, and public values.

None of the first three converts to an array, prints its content, or pickles. A protocol reaches the tensor inside by
the attribute that names what it is (`.share`, `.value`); nothing outside `protocol/` and `nn/` has a reason to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Self

import torch

from mpcinfer.errors import ProtocolError
from mpcinfer.ring.domain import Z64, Ring


class Sealed:
    """No content in repr, no pickle, no copy to arrays, no truth value."""

    __slots__ = ()

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} cannot be pickled")

    def __bool__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} has no truth value: secrets never steer control flow")


class Shared(Sealed):
    """This party's additive share over Z_2^64 of a tensor at scale 2^frac_bits."""

    __slots__ = ("frac_bits", "share")

    def __init__(self, share: torch.Tensor, frac_bits: int = 0) -> None:
        if share.dtype != torch.int64:
            raise ProtocolError(f"a share over Z_2^64 is int64, not {share.dtype}")
        self.share = share
        self.frac_bits = frac_bits

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape: public."""
        return tuple(self.share.shape)

    def __repr__(self) -> str:
        return f"Shared(shape={self.shape}, frac_bits={self.frac_bits})"

    def map(self, linear: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """Apply a map that is linear over Z_2^64 (reshaping, slicing, sums): local, the scale stays."""
        return type(self)(linear(self.share), self.frac_bits)

    def times(self, k: int | torch.Tensor) -> Self:
        """Multiply by public integers: local, exact, the scale stays."""
        return type(self)(self.share * k, self.frac_bits)

    def rescaled(self, frac_bits: int) -> Self:
        """The same number at a finer scale (a shift left: local, exact)."""
        if frac_bits < self.frac_bits:
            raise ProtocolError("a coarser scale needs truncate()")
        return type(self)(self.share << (frac_bits - self.frac_bits), frac_bits)

    def __add__(self, other: Shared) -> Shared:
        a, b = self._aligned(other)
        return Shared(a.share + b.share, a.frac_bits)

    def __sub__(self, other: Shared) -> Shared:
        a, b = self._aligned(other)
        return Shared(a.share - b.share, a.frac_bits)

    def __neg__(self) -> Shared:
        return Shared(-self.share, self.frac_bits)

    def _aligned(self, other: Shared) -> tuple[Shared, Shared]:
        if not isinstance(other, Shared):
            raise TypeError(f"cannot combine Shared with {type(other).__name__}")
        frac = max(self.frac_bits, other.frac_bits)
        return self.rescaled(frac), other.rescaled(frac)


class SharedBits(Sealed):
    """This party's XOR share of k-bit words."""

    __slots__ = ("ring", "share")

    def __init__(self, share: torch.Tensor, ring: Ring) -> None:
        if not ring.xor or share.dtype != ring.dtype:
            raise ProtocolError("SharedBits need an XOR ring and its dtype")
        self.share = share
        self.ring = ring

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape: public."""
        return tuple(self.share.shape)

    def __repr__(self) -> str:
        return f"SharedBits(shape={self.shape}, bits={self.ring.bits})"


class Mask(Sealed):
    """This party's share of a uniform mask: masks exactly one opening, over exactly `ring`."""

    __slots__ = ("label", "ring", "share", "used")

    def __init__(self, share: torch.Tensor, ring: Ring, label: str) -> None:
        self.share = share
        self.ring = ring
        self.label = label
        self.used = False

    def __repr__(self) -> str:
        return f"Mask({self.label}, shape={tuple(self.share.shape)}, bits={self.ring.bits}, used={self.used})"

    def spend(self, shape: tuple[int, ...], ring: Ring) -> None:
        """Mark as used for an opening of `shape` over `ring`; refuses anything but the one opening it is for."""
        if self.used:
            raise ProtocolError(f"mask {self.label} was used already: a mask hides one opening only")
        if ring != self.ring:
            raise ProtocolError(
                f"mask {self.label} is uniform on {_words(self.ring)} but the opening is over {_words(ring)}: "
                "it would leak"
            )
        if tuple(self.share.shape) != tuple(shape):
            raise ProtocolError(
                f"mask {self.label} has shape {tuple(self.share.shape)}, the opening has {tuple(shape)}"
            )
        self.used = True


class Masked(Sealed):
    """x + r (or x xor r), opened: public, uniform, and meaningless without the mask."""

    __slots__ = ("ring", "value")

    def __init__(self, value: torch.Tensor, ring: Ring = Z64) -> None:
        self.value = value
        self.ring = ring

    def __repr__(self) -> str:
        return f"Masked(shape={tuple(self.value.shape)}, bits={self.ring.bits})"


class Public:
    """A tensor everybody knows, as integers at scale 2^frac_bits; equal at all parties by construction."""

    __slots__ = ("frac_bits", "value")

    def __init__(self, value: torch.Tensor, frac_bits: int = 0) -> None:
        self.value = value
        self.frac_bits = frac_bits

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(self.value.shape)


class Weight(Sealed):
    """A model weight: this party's share and the public F = W + B, opened once per deployment under the dealt B.

    mask: gives this party's share of B, for audits of the dealer.
    """

    __slots__ = ("frac_bits", "mask", "masked", "name", "share")

    def __init__(self, name: str, share: torch.Tensor, masked: torch.Tensor, frac_bits: int) -> None:
        self.name = name
        self.share = share
        self.masked = masked
        self.frac_bits = frac_bits
        self.mask: Callable[[], torch.Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape: public."""
        return tuple(self.share.shape)

    def reshape(self, *shape: int) -> Weight:
        """The same weight under the same mask, in another shape."""
        return Weight(self.name, self.share.reshape(shape), self.masked.reshape(shape), self.frac_bits)

    def __repr__(self) -> str:
        return f"Weight({self.name!r}, shape={self.shape})"


class Cached(Sealed):
    """This party's shares of m rows [*S, m, d] and the public rows + B, each row opened once under a B of its own.

    masked: None while an opening is under way (see `protocol.cache.appending`).
    capacity: at least m; what costs and message sizes depend on instead of m, so that they change every so often only.
    """

    __slots__ = ("_masked", "capacity", "frac_bits", "name", "share")

    def __init__(
        self, name: str, share: torch.Tensor, masked: torch.Tensor | None, capacity: int, frac_bits: int
    ) -> None:
        if share.shape[-2] > capacity:
            raise ProtocolError(f"cache {name!r} has more rows than it has room for")
        self.name = name
        self.share = share
        self.capacity = capacity
        self.frac_bits = frac_bits
        self._masked: torch.Tensor | None = None
        if masked is not None:
            self.complete(masked)

    def complete(self, masked: torch.Tensor) -> None:
        """The rows + B, once they have been opened."""
        if self._masked is not None or masked.shape != self.share.shape:
            raise ProtocolError(f"cache {self.name!r} has other rows than were opened")
        self._masked = masked

    @property
    def masked(self) -> torch.Tensor:
        """The rows + B; ProtocolError if they have not been opened yet."""
        if self._masked is None:
            raise ProtocolError(f"cache {self.name!r} is used before its rows have been opened")
        return self._masked

    @property
    def shape(self) -> tuple[int, ...]:
        """The rows' shape: public."""
        return tuple(self.share.shape)

    def __repr__(self) -> str:
        return f"Cached({self.name!r}, shape={self.shape}, capacity={self.capacity})"


def _words(ring: Ring) -> str:
    return f"{ring.bits} bits under XOR" if ring.xor else f"Z_2^{ring.bits}"


def sealed_types() -> tuple[type[Any], ...]:
    """All types here that hold secrets or masks (for tests and redaction filters)."""
    return (Shared, SharedBits, Mask, Masked, Weight, Cached)
