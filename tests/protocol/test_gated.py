"""A smooth function of a product times another product, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mpcinfer.errors import ProtocolError
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.gated import GatedPieces, gated
from mpcinfer.protocol.local import LocalWorld
from mpcinfer.protocol.piecewise import _FEW, splines
from mpcinfer.protocol.tracing import trace
from mpcinfer.protocol.types import Shared
from tests.openings import assert_hides
from tests.protocol.conftest import Ran
from tests.protocol.test_piecewise import ERRORS, EVERY, by_coefficients, dealt_bits, opened, sent_bits, wanted

Worlds = Callable[..., LocalWorld]
FAR = [sign * x for x in (32, 64, 100, 255, 256, 257, 20_000, 2**20) for sign in (-1, 1)]


def named(name: str) -> Callable[[Context, Shared, Shared], object]:
    return lambda ctx, x, u: gated(ctx, x, u, splines()[name])


def products(*sizes: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates near zero, around the knots and far away; what they let through, up to each of these sizes."""
    near = torch.linspace(-40, 40, 3_000, dtype=torch.float64)
    x = torch.cat([near, torch.tensor(FAR, dtype=torch.float64)]).repeat(len(sizes))
    u = torch.randn(len(x), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    u = u * torch.tensor(sizes, dtype=torch.float64).repeat_interleave(len(x) // len(sizes))
    return (x * 2.0**32).to(torch.int64), (u * 2.0**32).to(torch.int64)


def close(name: str, got: torch.Tensor, x: torch.Tensor, u: torch.Tensor) -> bool:
    """f of the truncated gate, with a unit in the last place of its own, times what is truncated."""
    f, factor = wanted(name, x, 32), u.double() / 2.0**32
    allowed = (ERRORS[name] + 2.5 * 2**-16) * factor.abs() + 2**-16 * f.abs() + 2**-31
    return bool(((got.double() / 2.0**32 - f * factor).abs() <= allowed).all())


@pytest.mark.parametrize("sizes", [(0.01, 1, 100), (1,)], ids=["many", "few"])
@EVERY
def test_every_function(world: Worlds, parties: int, name: str, sizes: tuple[float, ...]) -> None:
    """Of many numbers coefficients are opened, of few none."""
    x, u = products(*sizes)
    assert (len(x) > _FEW) == (len(sizes) > 1)
    shares = world(parties).run(named(name), *(world(parties).share(v, 32) for v in (x, u)))
    assert shares[0].frac_bits == 32  # type: ignore[attr-defined]
    assert close(name, world(parties).reveal(shares), x, u)  # type: ignore[arg-type]


@pytest.mark.parametrize("times", [1, 700])
def test_to_the_ends_of_the_domain(run: Callable[..., Ran], times: int) -> None:
    """Each of x, u and the product may be as large as a truncation allows."""
    end = 1 << 62
    x = torch.tensor([-end, end - 1, -end, end - 1, 1 << 48, -(1 << 48)])
    u = torch.tensor([end - 1, 1 << 32, -end, -(1 << 32), (1 << 46) - 1, -end])
    x, u = x.repeat(times), u.repeat(times)
    got = run(named("silu"), (x, 32), (u, 32)).value
    expected = torch.where(x > 0, (x >> 16) * (u >> 16), 0)
    assert int((got - expected).abs().max()) <= (1 << 46) + (1 << 30)


@pytest.mark.parametrize("rows", [8, 513])
@pytest.mark.parametrize("name", ["silu", "hardswish", "tanh"])
def test_costs(run: Callable[..., Ran], name: str, rows: int) -> None:
    zeros = torch.zeros(rows, 8, dtype=torch.int64)
    ran = run(named(name), (zeros, 32), (zeros, 32))
    more = 64 * 3 + 16 * 3 + 2 * (64 + 16 + 16) + 2 * (64 + splines()[name].frac_bits - 16 + 16)
    many = rows > 512
    expected = [(label.replace("Pieces", "GatedPieces"), bits) for label, bits in opened(name, 48, many)]
    expected.insert(1, ("GatedPieces.t", 64))
    rounds = 5 + by_coefficients(name, many)
    ran.costs(rounds, rows * (sent_bits(name, 48, many) + 64), rows * (dealt_bits(name, 48, 16, many) + more))
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
            await gated(ctx, Shared(x.share, 32), Shared(x.share * 5, 32), splines()[name])

    assert_hides(monkeypatch, two, torch.arange(14_000) * 977_000_001, torch.zeros(14_000, dtype=torch.int64))


def test_numbers_that_were_truncated_are_refused(world: Worlds) -> None:
    x = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="not truncated"):
        world(2).run(named("silu"), world(2).share(x, 16), world(2).share(x, 32))


def test_a_mask_serves_one_factor() -> None:
    """The second factor under the first one's mask: the trace refuses it."""

    async def fault(ctx: Context, x: Shared) -> None:
        correlation = ctx.correlation(GatedPieces(x.shape, 10, 47))
        await ctx.open(x, correlation.mask("r"))
        await ctx.open(x, correlation.mask("r"))

    with pytest.raises(ProtocolError, match="used already"):
        trace(lambda ctx: fault(ctx, Shared(torch.empty(4, dtype=torch.int64, device="meta"))), parties=2)
