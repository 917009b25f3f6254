"""Fixed point: a real number v is the integer round(v * 2^f) in Z_2^64, negative numbers in two's complement.

A product has scale 2^2f and truncation handles absolute values below 2^62, so the codec refuses |v| >= 2^(62 - 2f):
what it lets through survives a multiplication by 1. Sums and products inside a model must stay below that too:
`graph.bounds` finds out which inputs see to that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpcinfer.errors import DtypeError, RangeError

FRAC_BITS = 16
MIN_FRAC_BITS, MAX_FRAC_BITS = 8, 24


@dataclass(frozen=True)
class FixedPoint:
    """Encoder and decoder for `frac_bits` fraction bits (8 to 24)."""

    frac_bits: int = FRAC_BITS

    def __post_init__(self) -> None:
        if not MIN_FRAC_BITS <= self.frac_bits <= MAX_FRAC_BITS:
            raise RangeError(
                f"frac_bits must be {MIN_FRAC_BITS} to {MAX_FRAC_BITS}, not {self.frac_bits}: "
                "fewer lose precision, more leave no room for products in 64 bits"
            )

    @property
    def limit(self) -> float:
        """Encodable numbers are smaller than this in absolute value."""
        return float(2.0 ** (62 - 2 * self.frac_bits))

    def encode(self, x: torch.Tensor, what: str = "value") -> torch.Tensor:
        """int64 of x's shape, nearest integer to x * 2^f. DtypeError, RangeError (naming `what`, never a value)."""
        if x.is_complex() or x.is_quantized:
            raise DtypeError(f"{what} has dtype {x.dtype}; pass real numbers (float, integer or bool)")
        v = x.detach().to(device="cpu", dtype=torch.float64)
        if not bool(torch.isfinite(v).all()):
            raise RangeError(f"{what} contains NaN or infinity; replace those entries before sharing it")
        if v.numel() and float(v.abs().max()) >= self.limit:
            raise RangeError(
                f"{what} contains numbers of absolute value {self.limit:g} or more, which {self.frac_bits} fraction "
                "bits can't hold; rescale it or use fewer fraction bits"
            )
        return torch.round(v * 2.0**self.frac_bits).to(torch.int64)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """float64 of x's shape: x / 2^f."""
        return x.to(torch.float64) / 2.0**self.frac_bits


def check_indices(x: torch.Tensor, limit: float, what: str) -> torch.Tensor:
    """x as int64, indices from 0 up to but not including `limit`. DtypeError, RangeError (naming `what`, no value)."""
    if x.is_floating_point() or x.is_complex() or x.is_quantized or x.dtype == torch.bool:
        raise DtypeError(f"{what} has dtype {x.dtype}; pass integers: they are indices, such as token ids")
    index = x.detach().to(device="cpu", dtype=torch.int64)
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < limit:
        raise RangeError(
            f"{what} contains indices that are not from 0 to {int(limit) - 1}, which is all the model knows"
        )
    return index
