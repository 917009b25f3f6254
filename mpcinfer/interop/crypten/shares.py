"""Secret shares between CrypTen and mpcinfer: those of both add up, in Z_2^64, to the number times 2^16.

Nothing is revealed on the way: what moves is refreshed by a fresh sharing of zero, never added up. CrypTen's own shares
come from a generator that is not made for secrets, and old and new ones together must not give anything away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mpcinfer.errors import DtypeError, InputError, ShapeError
from mpcinfer.protocol.types import Shared
from mpcinfer.ring import prg
from mpcinfer.ring.codec import FRAC_BITS
from mpcinfer.ring.domain import Z64
from mpcinfer.ring.sharing import split


def import_shares(shares: Sequence[Any], parties: int | None = None, *, frac_bits: int | None = None) -> list[Shared]:
    """Fresh shares for `parties` parties of mpcinfer (default: as many as CrypTen had) of a tensor shared in CrypTen.

    shares: one per party of CrypTen, all of one shape: arithmetic CrypTensors, or the int64 tensors in them
    (`x.share`), whose scale is 2^frac_bits (default 16; CrypTensors know their own). Element i of the result is party
    i's alone.

    Where nobody may hold all shares, each party of CrypTen calls this with a list of its own alone, and `parties`; it
    sends element i to party i, which adds up what it was sent.

    Raises DtypeError for what is no such share, ShapeError for different shapes, InputError for different scales, or
    fewer than two parties. That a share is missing, or numbers are too large, cannot be seen in shares.
    """
    own = [_opened(x, frac_bits) for x in shares]
    if len({bits for _, bits in own}) > 1:
        raise InputError("the shares have different scales: they are not of one tensor")
    return [Shared(share, own[0][1]) for share in _refreshed([share for share, _ in own], parties)]


def export_shares(
    shares: Sequence[Shared], parties: int | None = None, *, frac_bits: int = FRAC_BITS
) -> list[torch.Tensor]:
    """Fresh shares for `parties` parties of CrypTen (default: as many as here) of a tensor shared in mpcinfer.

    shares: one per party, or one's own alone, as in `import_shares`. Element i, int64 at scale 2^frac_bits, is for rank
    i alone, which calls `crypten.mpc.MPCTensor.from_shares(element)`, with `precision=frac_bits` if that is not 16.
    From here on it is CrypTen's: a plain tensor that prints and pickles.

    Raises ShapeError for different shapes, InputError for different scales, scales finer than 2^frac_bits (which only
    a protocol between the parties can make coarser), or fewer than two parties.
    """
    found = {share.frac_bits for share in shares}
    if len(found) > 1:
        raise InputError("the shares have different scales: they are not of one tensor")
    if any(bits > frac_bits for bits in found):
        raise InputError(
            f"the shares have {max(found)} fraction bits, more than {frac_bits}: pass frac_bits={max(found)}"
        )
    return _refreshed([share.rescaled(frac_bits).share for share in shares], parties)


def _opened(x: Any, frac_bits: int | None) -> tuple[torch.Tensor, int]:
    """The int64 tensor in a share of CrypTen's, and its fraction bits."""
    known = frac_bits
    # An MPCTensor holds an ArithmeticSharedTensor or a BinarySharedTensor, either of which holds a tensor. They are
    # told by name, so that who has mere files needs no CrypTen.
    if type(x).__name__ == "MPCTensor":
        x = x._tensor
    if type(x).__name__ == "BinarySharedTensor":
        raise DtypeError("a binary share is not additive: convert it before, x.to(crypten.mpc.arithmetic)")
    if type(x).__name__ == "ArithmeticSharedTensor":
        known = x.encoder.scale.bit_length() - 1
        if frac_bits not in (None, known):
            raise InputError(f"the share has {known} fraction bits, not frac_bits={frac_bits}")
        x = x.share
    if not isinstance(x, torch.Tensor) or x.dtype != torch.int64 or x.device.type != "cpu":
        kind = f"{x.dtype} on {x.device}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise DtypeError(f"a share is a CrypTensor or an int64 tensor on the CPU, not {kind}")
    return x.detach(), FRAC_BITS if known is None else known


def _refreshed(shares: Sequence[torch.Tensor], parties: int | None) -> list[torch.Tensor]:
    """`parties` tensors whose sum is that of `shares`; all but any one of them are uniform and independent of it."""
    parties = len(shares) if parties is None else parties
    if not shares or parties < 2:
        raise InputError(f"{len(shares)} shares for {parties} parties: at least one share for at least two parties")
    if len({share.shape for share in shares}) > 1:
        raise ShapeError("the shares have different shapes: they are not of one tensor")
    seeds, last = split(torch.zeros(shares[0].shape, dtype=torch.int64), Z64, parties)
    for share in shares:
        last += share  # masked before the first one comes: their bare sum is never computed
    return [*(prg.expand(seed, tuple(last.shape), Z64) for seed in seeds), last]
