"""The kernel of step functions: against Python's integers, mod 2^64."""

from __future__ import annotations

import pytest
import torch

from mpcinfer.ring.steps import added

RNG = torch.Generator().manual_seed(1)


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=RNG)


def split(value: torch.Tensor, parties: int) -> list[torch.Tensor]:
    others = [words(*value.shape) for _ in range(parties - 1)]
    return [*others, value - sum(others)]


@pytest.mark.parametrize("parties", [2, 3])
@pytest.mark.parametrize("t", [1, 5])
@pytest.mark.parametrize("shape", [(), (0,), (17,), (2, 3, 400)])
def test_sums_of_steps_and_of_slopes(shape: tuple[int, ...], t: int, parties: int) -> None:
    x, r, base = words(*shape), words(*shape), words(3, *shape)
    b, beta = torch.randint(0, 2, (2, t, *shape), generator=RNG)
    offsets, slopes = words(3, t), words(3, t)
    offsets[0], slopes[1] = 0, 0
    e, c = (b ^ beta).to(torch.uint8), x + r
    shares = [split(value, parties) for value in (base, beta, r, beta * r)]
    got, plain = torch.zeros_like(base), torch.zeros_like(base)
    for i in range(parties):
        out, bit, own_r, bit_r = (of[i].clone() for of in shares)
        plain += added(out.clone(), i == 0, e, bit, offsets)
        got += added(out, i == 0, e, bit, offsets, slopes, (c, own_r, bit_r))
    by = torch.einsum("kt,t...->k...", offsets, b)
    assert torch.equal(plain, base + by)
    assert torch.equal(got, base + by + torch.einsum("kt,t...->k...", slopes, b) * x)


def test_views_and_meta_tensors() -> None:
    e, bit, offsets = torch.ones(2, 6, 4, dtype=torch.uint8), words(2, 6, 4), words(1, 2)
    zeros = torch.zeros(1, 4, 6, dtype=torch.int64)
    turned = added(zeros.clone(), True, e.transpose(1, 2), bit.transpose(1, 2), offsets)
    assert torch.equal(turned.transpose(1, 2), added(zeros.reshape(1, 6, 4).clone(), True, e, bit, offsets))
    assert added(zeros.to("meta"), True, e.to("meta"), bit.to("meta"), offsets).device.type == "meta"
