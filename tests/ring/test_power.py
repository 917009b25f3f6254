"""Powers of e: the tables against exact decimals, and powers of masked numbers against the formula, mod 2^64."""

from __future__ import annotations

from decimal import ROUND_UP, Decimal, localcontext

import numpy as np
import pytest
import torch

from mpcinfer.ring import power
from mpcinfer.ring.power import masked_exp, scaled_exp

RNG = torch.Generator().manual_seed(1)
CHECKSUMS = [-8637791234678513975, 231118060778344033]


@pytest.mark.parametrize(("scale", "top"), [(17, 20), (19, 17), (39, 0), (42, 0)])
@pytest.mark.parametrize("frac_bits", [8, 16, 20, 24, 28])
def test_table_is_exact_to_the_last_place(frac_bits: int, scale: int, top: int) -> None:
    """To 29 bits and the last place: beyond 2^43 it is the former that counts."""
    x = torch.randint(-16 << frac_bits, top << frac_bits or 1, (400,), generator=torch.Generator().manual_seed(scale))
    x[:2] = torch.tensor([-16 << frac_bits, (top << frac_bits) - 1])
    with localcontext(prec=40):
        for u, got in zip(x.tolist(), scaled_exp(x, frac_bits, scale).tolist(), strict=True):
            want = (Decimal(u) / (1 << frac_bits)).exp() * (1 << scale)
            assert abs(got - want) <= Decimal("0.5") + want / (1 << 28)


def test_table_is_the_same_on_every_host() -> None:
    """Parties and dealers multiply by these numbers: a host that rounds in another way makes noise."""
    x = torch.arange(-16 << 12, 17 << 12)
    weights = torch.arange(1, len(x) + 1)
    assert [int((scaled_exp(x, 12, scale) * weights).sum()) for scale in (19, 30)] == CHECKSUMS
    assert scaled_exp(x.to("meta"), 12, 19).shape == x.shape


def test_decimal_settings_change_nothing() -> None:
    exact = power._exact.__wrapped__
    expected = exact(range(-64, 64), 64)
    with localcontext(prec=5, rounding=ROUND_UP):
        assert all(np.array_equal(a, b) for a, b in zip(exact(range(-64, 64), 64), expected, strict=True))


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=RNG)


def shared(x: torch.Tensor, parties: int) -> list[torch.Tensor]:
    shares = [words(*x.shape) for _ in range(parties - 1)]
    return [*shares, x - sum(shares)]


@pytest.mark.parametrize("parties", [2, 3, 5])
@pytest.mark.parametrize("shape", [(), (0,), (17,), (2, 3, 4)])
@pytest.mark.parametrize("ceiling", [False, True])
def test_powers_of_masked_numbers(shape: tuple[int, ...], parties: int, ceiling: bool) -> None:
    f, scale, window, limit = 12, 19, 16 << 12, 12345
    x = torch.randint(0, window, shape, generator=RNG)
    ends = torch.randint(0, 2, (3, *shape), generator=RNG)
    betas, dealt = torch.randint(0, 2, (3, *shape), generator=RNG), words(*shape)
    of = torch.stack([dealt, *(betas[k] * dealt for k in (1, 2)[: 2 if ceiling else 1])])
    powers = shared(torch.stack([of, betas[0] * of]), parties)
    under = shared(betas[2], parties)
    e = (ends ^ betas).to(torch.uint8)[: 3 if ceiling else 2]
    got = sum(
        masked_exp(x, f, scale, window, e, powers[i], (under[i], limit) if ceiling else None, i == 0)
        for i in range(parties)
    )
    wrapped, clip, below = ends != 0
    value = torch.where(wrapped, scaled_exp(x, f, scale), scaled_exp(x - window, f, scale)) * dealt
    expected = torch.where(clip, 0, value)
    if ceiling:  # what is under the ceiling is not clipped there; the clip is of what is far below zero
        expected = torch.where(below, value, 0) - torch.where(clip, value, 0) + torch.where(below, 0, limit)
    assert torch.equal(torch.as_tensor(got), expected)


def test_views_and_meta_tensors() -> None:
    x, powers = torch.arange(24).reshape(4, 6), words(2, 3, 4, 6)
    e, under = torch.randint(0, 2, (3, 4, 6), generator=RNG).to(torch.uint8), words(4, 6)
    whole = masked_exp(x, 12, 19, 16 << 12, e, powers, (under, 5), True)
    turned = [t.transpose(-1, -2) for t in (x, e, powers, under)]
    assert torch.equal(masked_exp(turned[0], 12, 19, 16 << 12, turned[1], turned[2], (turned[3], 5), True), whole.T)
    meta = [t.to("meta") for t in turned]
    assert masked_exp(meta[0], 12, 19, 16 << 12, meta[1], meta[2], (meta[3], 5), True).shape == (6, 4)
