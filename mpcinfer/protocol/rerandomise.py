"""Fresh shares of the same value, for what leaves the parties."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpcinfer.protocol.context import Context
from mpcinfer.protocol.correlation import Field, FixedMasks, Kind, Tensors, kind
from mpcinfer.protocol.types import Shared
from mpcinfer.ring.domain import Z64


@kind
@dataclass(frozen=True)
class ZeroSharing(Kind):
    """Shares of zero."""

    shape: tuple[int, ...]

    def free(self) -> dict[str, Field]:
        """None: nothing is opened."""
        return {}

    def derived(self) -> dict[str, Field]:
        """zero."""
        return {"zero": Field(self.shape, Z64)}

    def derive(self, free: Tensors, fixed: FixedMasks) -> Tensors:
        """See `derived`."""
        return {"zero": torch.zeros(self.shape, dtype=torch.int64)}


def rerandomise(ctx: Context, x: Shared) -> Shared:
    """Shares of x that are independent of everything the parties computed so far.

    Without it a data owner, who sees all output shares, could learn more than their sum from how they came about.
    Opened: nothing. Rounds 0; offline 8 bytes per element; correlation `ZeroSharing`.
    """
    return Shared(x.share + ctx.correlation(ZeroSharing(x.shape))["zero"], x.frac_bits)
