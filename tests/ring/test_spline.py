"""The kernel of splines: against Python's integers, mod 2^64."""

from __future__ import annotations

import pytest
import torch

from mpcinfer.ring.spline import COEFFICIENTS, coefficients, polynomial, spline

RNG = torch.Generator().manual_seed(1)


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=RNG)


def dealt(shape: tuple[int, ...], t: int, parties: int) -> tuple[torch.Tensor, torch.Tensor, list[list[torch.Tensor]]]:
    """m, its other value less m, beta, and each party's shares of powers, wraps, bits and bit_wraps, as the kernel has
    them."""
    m, by, beta = words(*shape), words(*shape), torch.randint(0, 2, (t, *shape), generator=RNG)
    powers, others = (torch.stack([x, x * x, x * x * x]) for x in (m, m + by))
    bits = torch.cat([beta.unsqueeze(0), beta * powers.unsqueeze(1)])
    values = [powers, others - powers, bits, beta * (others - powers).unsqueeze(1)]
    first = [[words(*v.shape) for v in values] for _ in range(parties - 1)]
    last = [v - sum(shares[i] for shares in first) for i, v in enumerate(values)]
    return torch.stack([m, m + by]), beta, [*first, last]


@pytest.mark.parametrize("parties", [2, 3, 5])
@pytest.mark.parametrize("t", [1, 3, 10])
@pytest.mark.parametrize("shape", [(), (0,), (17,), (2, 3, 4)])
@pytest.mark.parametrize("truncated", [False, True])
def test_sum_of_chosen_cubics(shape: tuple[int, ...], t: int, parties: int, truncated: bool) -> None:
    x, b = words(*shape), torch.randint(0, 2, (t, *shape), generator=RNG)
    m, beta, shares = dealt(shape, t, parties)
    base, *steps = (tuple(row) for row in words(t + 1, COEFFICIENTS).tolist())
    e = (b ^ beta).to(torch.uint8)
    wrapped = torch.randint(0, 2, shape, generator=RNG)
    none = torch.empty(0, dtype=torch.int64)
    c = x + torch.where(wrapped != 0, m[1], m[0]) if truncated else x + m[0]
    got = sum(
        spline(c, wrapped, e, powers, wraps, bits, bit_wraps, base, tuple(steps), i == 0)
        if truncated
        else spline(c, none, e, powers, none, bits, none, base, tuple(steps), i == 0)
        for i, (powers, wraps, bits, bit_wraps) in enumerate(shares)
    )
    check(got, x, b, base, steps)


def check(got: object, x: torch.Tensor, b: torch.Tensor, base: tuple[int, ...], steps: list[tuple[int, ...]]) -> None:
    expected = [
        sum(
            a * v**j
            for row, taken in zip([base, *steps], [1, *chosen], strict=True)
            if taken
            for j, a in enumerate(row)
        )
        for v, chosen in zip(x.reshape(-1).tolist(), b.reshape(len(steps), -1).T.tolist(), strict=True)
    ]
    assert isinstance(got, torch.Tensor)
    assert [(int(g) - w) % 2**64 for g, w in zip(got.reshape(-1), expected, strict=True)] == [0] * x.numel()


@pytest.mark.parametrize("parties", [2, 3, 5])
@pytest.mark.parametrize("t", [1, 3, 10])
@pytest.mark.parametrize("shape", [(), (0,), (17,), (2, 3, 4)])
def test_the_chosen_cubic_is_opened(shape: tuple[int, ...], t: int, parties: int) -> None:
    x, b = words(*shape), torch.randint(0, 2, (t, *shape), generator=RNG)
    m, beta, shares = dealt(shape, t, parties)
    base, *steps = (tuple(row) for row in words(t + 1, COEFFICIENTS).tolist())
    e = (b ^ beta).to(torch.uint8)
    wrapped = torch.randint(0, 2, shape, generator=RNG)
    c = x + torch.where(wrapped != 0, m[1], m[0])
    q = [coefficients(c, e, bits[0], base, tuple(steps), i == 0) for i, (_, _, bits, _) in enumerate(shares)]
    masks = words(3, *shape)
    opened = sum(each[1:] for each in q) + masks
    powers, wraps = (sum(each[k] for each in shares) for k in (0, 1))
    first = [[words(3, *shape), words(3, *shape)] for _ in range(parties - 1)]
    wanted = masks * powers, masks * wraps
    products = [*first, [w - sum(each[k] for each in first) for k, w in enumerate(wanted)]]
    got = sum(
        polynomial(q[i][0], wrapped, opened, powers, wraps, p, more)
        for i, ((powers, wraps, _, _), (p, more)) in enumerate(zip(shares, products, strict=True))
    )
    check(got, x, b, base, steps)


def test_views_and_meta_tensors() -> None:
    m, _, (shares, other) = dealt((4, 6), 2, 2)
    x, e = words(4, 6), torch.randint(0, 2, (2, 4, 6), generator=RNG).to(torch.uint8)
    wrapped = torch.randint(0, 2, (4, 6), generator=RNG)
    cubics = (9, 8, 7, 6), ((1, 2, 3, 4), (-5, 6, 0, 7))
    whole = spline(x + m[0], wrapped, e, *shares, *cubics, True)
    turned = spline((x + m[0]).T, wrapped.T, e.transpose(1, 2), *(s.transpose(-1, -2) for s in shares), *cubics, True)
    assert torch.equal(turned, whole.T)
    assert not torch.equal(spline(x + m[0], wrapped, e, *other, *cubics, False), whole)
    q = coefficients(x + m[0], e, shares[2][0], *cubics, True)
    turned = coefficients((x + m[0]).T, e.transpose(1, 2), shares[2][0].transpose(1, 2), *cubics, True)
    assert torch.equal(turned, q.transpose(1, 2))
    rows = q[1:], *shares[:2], *shares[:2]
    turned = polynomial(q[0].T, wrapped.T, *(row.transpose(1, 2) for row in rows))
    assert torch.equal(turned, polynomial(q[0], wrapped, *rows).T)
    assert polynomial(*(v.to("meta") for v in (q[0], wrapped, *rows))).shape == (4, 6)
    assert coefficients(*(v.to("meta") for v in (x, e, shares[2][0])), *cubics, True).shape == (4, 4, 6)
    on_meta = spline(*(v.to("meta") for v in (x, wrapped, e, *shares)), *cubics, True)
    assert on_meta.device.type == "meta" and on_meta.shape == (4, 6)
