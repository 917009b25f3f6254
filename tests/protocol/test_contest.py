"""The largest of three or four at once: every order, ties, extremes, and what is seen of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from mpcinfer.errors import InputError
from mpcinfer.protocol import contest
from mpcinfer.protocol.contest import Contest, largest
from mpcinfer.protocol.correlation import from_json, to_json
from mpcinfer.protocol.types import Shared
from tests.openings import assert_hides

Run = Callable[..., Any]
RNG = torch.Generator().manual_seed(1)


@pytest.mark.parametrize("k", [3, 4])
@pytest.mark.parametrize("width", [64, 48, 36, 32])
def test_every_order_and_every_tie(run: Run, k: int, width: int) -> None:
    x = torch.tensor(list(product(range(k), repeat=k))) << (width - 4)
    y, z = (torch.randint(-(2**63), 2**63 - 1, x.shape, generator=RNG) for _ in range(2))

    async def protocol(ctx: Any, x: Shared, y: Shared, z: Shared) -> list[Shared]:
        found, others = await largest(ctx, x, (y, z), width)
        return [found, *others]

    ran = run(protocol, (x, 16), (y, 0), z)
    first = x.max(-1, keepdim=True).values.eq(x).int().argmax(-1, keepdim=True)
    assert torch.equal(ran.value[0], x.amax(-1)) and ran.frac_bits[0] == 16
    assert torch.equal(ran.value[1], y.gather(-1, first)[..., 0])
    assert torch.equal(ran.value[2], z.gather(-1, first)[..., 0])


@pytest.mark.parametrize("k", [3, 4])
def test_places_and_numbers_of_few_bits(run: Run, k: int) -> None:
    """The place takes no opening; of what is carried 8 bits are opened and right."""
    x = torch.tensor(list(product(range(3), repeat=k)))
    y = torch.randint(-(2**63), 2**63 - 1, x.shape, generator=RNG)

    async def protocol(ctx: Any, x: Shared, y: Shared) -> list[Shared]:
        return (await largest(ctx, x, (y,), 48, bits=8, placed=True))[1]

    ran = run(protocol, (x, 16), y)
    first = x.max(-1, keepdim=True).values.eq(x).int().argmax(-1, keepdim=True)
    assert torch.equal(ran.value[0] & 255, y.gather(-1, first)[..., 0] & 255)
    assert torch.equal(ran.value[1], first[..., 0])
    assert [bits for label, bits in ran.opened() if label == "Contest.s"] == [8]
    assert [label for label, _ in run(_place, x).opened()] == [f"Contest.{f}" for f in ("r", "leaf", "top", "beta")]


async def _place(ctx: Any, x: Shared) -> Shared:
    return (await largest(ctx, x, placed=True))[1][0]


@pytest.mark.parametrize("k", [3, 4])
def test_extremes(run: Run, k: int) -> None:
    x = torch.tensor(list(product((-(2**61), -1, 0, 2**61), repeat=k)))
    assert torch.equal(run(lambda ctx, s: _first(ctx, s), x).value, x.amax(-1))


async def _first(ctx: Any, x: Shared) -> Shared:
    return (await largest(ctx, x))[0]


@pytest.mark.parametrize("k", [3, 4])
def test_what_is_opened_differs_by_what_is_hidden(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    x = torch.arange(15_000 * k).reshape(-1, k) << 30
    y = torch.arange(15_000 * k).reshape(-1, k) % 5
    hidden = [(v[:, 1:] - v[:, :1]).T for v in (x, y)]

    async def twice(ctx: Any, x: Shared) -> list[Shared]:
        return [await _first(ctx, x), await _first(ctx, x)]

    assert_hides(monkeypatch, twice, x, y, hidden[0] - hidden[1])


@pytest.mark.parametrize("word", range(8))
def test_products_of_what_is_public_but_for_a_mask(word: int) -> None:
    """The coefficients are those of the product itself."""
    table = contest._coefficients(3)
    for betas in product((0, 1), repeat=3):
        bits = [(word >> i & 1) ^ betas[i] for i in range(3)]
        products = contest._products([torch.tensor(b) for b in betas])
        assert int((table[word] * products).sum()) == bits[0] * bits[1] * bits[2]


def test_a_contest_is_of_three_or_four() -> None:
    data = to_json(Contest((5,), 4))
    assert from_json(data) == Contest((5,), 4)
    for size in (-1, 0, 2, 5, 64):
        with pytest.raises(ValueError, match="three or four"):
            replace(Contest((5,), 4), size=size)
        with pytest.raises(InputError):
            from_json(data | {"size": size})
