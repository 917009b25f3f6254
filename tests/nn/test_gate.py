"""A smooth function of a product times another product, neither truncated before, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mpcinfer.nn.activation import gate
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.local import LocalWorld
from mpcinfer.protocol.types import Shared
from tests.openings import assert_hides, seed
from tests.protocol.conftest import Ran, run_both_ways
from tests.protocol.test_piecewise import ERRORS, EVERY, by_coefficients, dealt_bits, opened, sent_bits, wanted

FAR = [sign * x for x in (32, 64, 100, 255, 256, 257, 20_000) for sign in (-1, 1)]


@pytest.fixture(params=[2, 3, 5], ids="n={}".format)
def run(request: pytest.FixtureRequest) -> Callable[..., Ran]:
    return lambda protocol, *inputs: run_both_ways(
        LocalWorld(request.param, seed(request.node.name)), protocol, *inputs
    )


def named(name: str) -> Callable[[Context, Shared, Shared], object]:
    return lambda ctx, x, u: gate(ctx, x, u, name)


def products(*sizes: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates near zero, around the knots and far away; what they let through, up to each of these sizes."""
    near = torch.linspace(-40, 40, 3_000, dtype=torch.float64)
    x = torch.cat([near, torch.tensor(FAR, dtype=torch.float64)]).repeat(len(sizes))
    u = torch.randn(len(x), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    u = u * torch.tensor(sizes, dtype=torch.float64).repeat_interleave(len(x) // len(sizes))
    return (x * 2.0**32).to(torch.int64).reshape(len(sizes), -1), (u * 2.0**32).to(torch.int64).reshape(len(sizes), -1)


def close(name: str, got: torch.Tensor, x: torch.Tensor, u: torch.Tensor) -> bool:
    """f of the truncated gate, with a unit in the last place of its own, times what is truncated; that truncated."""
    f, factor = wanted(name, x, 32), u.double() / 2.0**32
    allowed = (ERRORS[name] + 2.5 * 2**-16) * factor.abs() + 2**-16 * f.abs() + 2**-15
    return bool(((got.double() / 2.0**16 - f * factor).abs() <= allowed).all())


@pytest.mark.parametrize("sizes", [(0.01, 1, 100), (1,)], ids=["many", "few"])
@EVERY
def test_every_function(run: Callable[..., Ran], name: str, sizes: tuple[float, ...]) -> None:
    """Of many numbers coefficients are opened, of few none."""
    x, u = products(*sizes)
    ran = run(named(name), (x, 32), (u, 32))
    many = ("Pieces.q", 64) in ran.opened()
    assert many == by_coefficients(name, len(sizes) > 1)
    assert ran.frac_bits == 16 and close(name, ran.value, x, u)


@pytest.mark.parametrize("times", [1, 700])
def test_to_the_ends_of_the_domain(run: Callable[..., Ran], times: int) -> None:
    """Each of x, u and the product may be as large as a truncation allows."""
    end = 1 << 62
    x = torch.tensor([-end, end - 1, -end, end - 1, 1 << 48, -(1 << 48)])
    u = torch.tensor([end - 1, 1 << 32, -end, -(1 << 32), (1 << 46) - 1, -end])
    x, u = x.repeat(times), u.repeat(times)
    got = run(named("silu"), (x, 32), (u, 32)).value
    expected = torch.where(x > 0, (x >> 16) * (u >> 16), 0) >> 16
    assert int((got - expected).abs().max()) <= (1 << 30) + (1 << 14)


@pytest.mark.parametrize(("rows", "wide"), [(1, 64), (3, 2_056)])
@pytest.mark.parametrize("name", ["silu", "hardswish", "tanh"])
def test_costs(run: Callable[..., Ran], name: str, rows: int, wide: int) -> None:
    """Of rows of any width."""
    zeros = torch.zeros(rows, wide, dtype=torch.int64)
    ran = run(named(name), (zeros, 32), (zeros, 32))
    many, bytes_of_a_bit = rows > 1, rows * wide // 8
    product, last = 2 * (64 + 16), 64 + 16
    expected = [*opened(name, 48, many), ("TruncatedProduct.r", 64), ("TruncatedProduct.b", 64), ("Truncation.r", 64)]
    ran.costs(
        7 + by_coefficients(name, many),
        bytes_of_a_bit * (sent_bits(name, 48, many) + 3 * 64),
        bytes_of_a_bit * (dealt_bits(name, 48, 16, many) + product + last),
    )
    assert ran.opened() == expected


@pytest.mark.parametrize("shape", [(), (0,), (2, 3, 4)])
def test_any_shape(run: Callable[..., Ran], shape: tuple[int, ...]) -> None:
    x, u = torch.full(shape, -3 << 31), torch.full(shape, 5 << 31)
    value = run(named("silu"), (x, 32), (u, 32)).value
    assert value.shape == shape and close("silu", value, x, u)


@pytest.mark.parametrize("name", ["hardswish", "silu"])
def test_openings(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    async def two(ctx: Context, x: Shared) -> None:
        for _ in range(2):
            await gate(ctx, Shared(x.share, 32), Shared(x.share * 5, 32), name)

    assert_hides(monkeypatch, two, torch.arange(14_000) * 977_000_001, torch.zeros(14_000, dtype=torch.int64))


def test_numbers_that_were_truncated_are_refused() -> None:
    world, x = LocalWorld(2, seed("refused")), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="not truncated"):
        world.run(named("silu"), world.share(x, 16), world.share(x, 32))
