"""The kernel of splines: against Python's integers, mod 2^64."""

from __future__ import annotations

import pytest
import torch

from mpcinfer.ring.spline import COEFFICIENTS, spline

RNG = torch.Generator().manual_seed(1)


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=RNG)


def dealt(shape: tuple[int, ...], t: int, parties: int) -> tuple[torch.Tensor, torch.Tensor, list[list[torch.Tensor]]]:
    """r, beta, and each party's shares of r, its powers, beta, and their products, in the kernel's order."""
    r, beta = words(*shape), torch.randint(0, 2, (t, *shape), generator=RNG)
    powers = torch.stack([r * r, r * r * r])
    values = [r, powers, beta, beta * r, beta * powers.unsqueeze(1)]
    first = [[words(*v.shape) for v in values] for _ in range(parties - 1)]
    last = [v - sum(shares[i] for shares in first) for i, v in enumerate(values)]
    return r, beta, [*first, last]


@pytest.mark.parametrize("parties", [2, 3, 5])
@pytest.mark.parametrize("t", [1, 3, 10])
@pytest.mark.parametrize("shape", [(), (0,), (17,), (2, 3, 4)])
def test_sum_of_chosen_cubics(shape: tuple[int, ...], t: int, parties: int) -> None:
    x, b = words(*shape), torch.randint(0, 2, (t, *shape), generator=RNG)
    r, beta, shares = dealt(shape, t, parties)
    steps = tuple(tuple(row) for row in words(t, COEFFICIENTS).tolist())
    e = (b ^ beta).to(torch.uint8)
    got = sum(spline(x + r, e, *s, steps, i == 0) for i, s in enumerate(shares))
    expected = [
        sum(a * v**j for k, row in enumerate(steps) if chosen[k] for j, a in enumerate(row))
        for v, chosen in zip(x.reshape(-1).tolist(), b.reshape(t, -1).T.tolist(), strict=True)
    ]
    assert [(int(g) - w) % 2**64 for g, w in zip(got.reshape(-1), expected, strict=True)] == [0] * x.numel()  # type: ignore[union-attr]


def test_views_and_meta_tensors() -> None:
    r, _, (shares, other) = dealt((4, 6), 2, 2)
    x, e = words(4, 6), torch.randint(0, 2, (2, 4, 6), generator=RNG).to(torch.uint8)
    steps = ((1, 2, 3, 4), (-5, 6, 0, 7))
    whole = spline(x + r, e, *shares, steps, True)
    turned = spline((x + r).T, e.transpose(1, 2), *(s.transpose(-1, -2) for s in shares), steps, True)
    assert torch.equal(turned, whole.T) and not torch.equal(spline(x + r, e, *other, steps, False), whole)
    on_meta = spline(*(v.to("meta") for v in (x, e, *shares)), steps, True)
    assert on_meta.device.type == "meta" and on_meta.shape == (4, 6)
