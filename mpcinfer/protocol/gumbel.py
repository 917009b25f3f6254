"""Gumbel noise in shares: what turns an argmax into a draw from a softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from mpcinfer.protocol.context import Context
from mpcinfer.protocol.correlation import Field, FixedMasks, Kind, Tensors, kind
from mpcinfer.protocol.types import Shared
from mpcinfer.ring.domain import Z64, Ring

_UNIFORM_BITS = 52  # of the uniform number that a draw is made of, so that double precision holds it exactly
_TERMS = 11  # of the logarithm's series
_LN2 = 0.6931471805599453


@kind
@dataclass(frozen=True)
class Gumbel(Kind):
    """g = -ln(-ln u) at scale 2^frac_bits, independent for each element; u uniform on (0, 1), never opened."""

    shape: tuple[int, ...]
    frac_bits: int
    unopened: ClassVar[tuple[str, ...]] = ("u",)

    def free(self) -> dict[str, Field]:
        """u: only the dealer knows the sum of its shares."""
        return {"u": Field(self.shape, Ring(_UNIFORM_BITS))}

    def derived(self) -> dict[str, Field]:
        """g."""
        return {"g": Field(self.shape, Z64)}

    def derive(self, free: Tensors, fixed: FixedMasks) -> Tensors:
        """See `derived`."""
        u = (free["u"].numpy().astype(np.float64) + 0.5) * 2.0**-_UNIFORM_BITS
        g = -logarithm(-logarithm(u))
        return {"g": torch.from_numpy(np.rint(g * 2.0**self.frac_bits).astype(np.int64))}


def logarithm(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """ln x of positive doubles, relative error below 2^-48, from additions, products and quotients alone.

    IEEE 754 says exactly what these yield, so any two dealers agree; library logarithms differ in their last bit.
    """
    mantissa, exponent = np.frexp(x)
    small = mantissa < 0.7071067811865476
    mantissa, exponent = np.where(small, 2 * mantissa, mantissa), exponent - small
    z = (mantissa - 1) / (mantissa + 1)
    square = z * z
    series = np.full_like(z, 1.0 / (2 * _TERMS + 1))
    for k in range(_TERMS - 1, -1, -1):
        series = series * square + 1.0 / (2 * k + 1)
    result: np.ndarray[Any, Any] = exponent * _LN2 + 2 * z * series
    return result


def gumbel(ctx: Context, shape: tuple[int, ...], frac_bits: int) -> Shared:
    """Shares of independent draws from the standard Gumbel distribution.

    Opened: nothing. Rounds 0; offline 8 bytes per element; correlation `Gumbel`. The dealer knows the draws: it sees
    nothing that they are added to. Draws are at most 36.7, e^-36.7 being what 52 bits resolve.
    """
    return Shared(ctx.correlation(Gumbel(shape, frac_bits))["g"], frac_bits)
