"""Additive and XOR secret sharing among n parties: n - 1 shares are pseudo-random, the last one makes the sum right."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch

from mpcinfer.ring import prg
from mpcinfer.ring.domain import Ring


def split(x: torch.Tensor, ring: Ring, n: int) -> tuple[list[bytes], torch.Tensor]:
    """Fresh shares of x: n - 1 seeds (for parties 0..n-2) and the last party's share, a tensor like x.

    Any n - 1 of the n are uniform and independent of x (the seeds under the AES assumption).
    """
    if n < 2:
        raise ValueError("sharing needs at least two parties")
    seeds = [secrets.token_bytes(prg.SEED_BYTES) for _ in range(n - 1)]
    last = ring.reduce(x.to(ring.dtype))
    for seed in seeds:
        last = ring.sub(last, prg.expand(seed, tuple(x.shape), ring))
    return seeds, last


def combine(shares: Sequence[torch.Tensor], ring: Ring) -> torch.Tensor:
    """The secret: the sum of all shares (in [0, 2^bits); for 64 bits signed, as the container holds it)."""
    total = shares[0]
    for share in shares[1:]:
        total = ring.add(total, share)
    return total
