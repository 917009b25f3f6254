"""Fitted functions: the committed splines without any protocol, and the protocol, against float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest
import torch
from splines import TARGETS

from mpcinfer.errors import ProtocolError
from mpcinfer.protocol import piecewise as module
from mpcinfer.protocol.compare import NEAR
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.local import LocalWorld
from mpcinfer.protocol.piecewise import Pieces, Spline, piecewise, splines
from mpcinfer.protocol.tracing import trace
from mpcinfer.protocol.types import Shared
from tests.openings import assert_hides
from tests.protocol.conftest import Ran

Worlds = Callable[..., LocalWorld]
# of the fit; issue 3 asks for 5e-4 in the first six
ERRORS = {
    "gelu": 1.5e-4, "gelu_tanh": 1.5e-4, "silu": 1.3e-4, "sigmoid": 5.3e-5, "tanh": 9.6e-5, "erf": 4.8e-5,
    "softplus": 5.1e-5, "elu": 1.8e-5, "hardswish": 1e-9, "mish": 8.6e-5,
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", ERRORS)
FAR = [sign * x for x in (32, 64, 100, 20_000, 2**29) for sign in (-1, 1)]


def named(name: str) -> Callable[[Context, Shared], object]:
    return lambda ctx, x: piecewise(ctx, x, splines()[name])


def real(x: torch.Tensor, frac_bits: int = 16) -> torch.Tensor:
    return x.double() / 2.0**frac_bits


def wanted(name: str, x: torch.Tensor, frac_bits: int = 16) -> torch.Tensor:
    return torch.as_tensor(TARGETS[name].function(real(x, frac_bits).numpy()))


def residual(spline: Spline, x: torch.Tensor) -> torch.Tensor:
    """Mod 2^64, for x with 16 fraction bits: as the protocol has it, but in the clear."""
    total = torch.zeros_like(x)
    for at, (a, b, c, d) in zip(spline.thresholds, spline.steps, strict=True):
        total += torch.where(x < at, a + (b + (c + d * x) * x) * x, 0)
    return total


def asymptote(spline: Spline, x: torch.Tensor, scale: int) -> torch.Tensor:
    """At x's own scale, exactly."""
    left = x < spline.thresholds[spline.switch] * 2.0 ** (scale - 16)
    (a, b), (c, d) = spline.left, spline.right
    return torch.where(left, a * x + (b << scale), c * x + (d << scale))


def decoded(world: LocalWorld, name: str, x: torch.Tensor, frac_bits: int = 16) -> torch.Tensor:
    shares = world.run(named(name), world.share(x, frac_bits))  # type: ignore[arg-type]
    assert shares[0].frac_bits == frac_bits
    return world.reveal(shares)


def test_every_function_is_there() -> None:
    assert splines().keys() == ERRORS.keys() == TARGETS.keys()


@EVERY
def test_knots_are_near_each_other(name: str) -> None:
    """Of what is between the outer ones, the low bits say where it is; the asymptotes change there."""
    spline = splines()[name]
    assert spline.thresholds[-1] - spline.thresholds[0] < 1 << (NEAR - 2)
    assert 0 < spline.switch < len(spline.thresholds) - 1


@EVERY
def test_committed_splines_are_as_good_as_their_fit(name: str) -> None:
    """Every fourth number within +-40, and all around the knots; what is truncated stays below 2^62."""
    spline = splines()[name]
    assert list(spline.thresholds) == sorted(set(spline.thresholds))
    near = [torch.arange(t - 50, t + 50) for t in spline.thresholds]
    x = torch.cat([torch.arange(-40 << 16, 40 << 16, 4), *near, torch.tensor(FAR) << 16])
    rest = residual(spline, x)
    assert int(rest.abs().max()) < 2**62
    got = real(rest, spline.frac_bits) + real(asymptote(spline, x, 16))
    assert float((got - wanted(name, x)).abs().max()) <= ERRORS[name]
    outside = (x < spline.thresholds[0]) | (x >= spline.thresholds[-1])
    assert bool((rest[outside] == 0).all())


@EVERY
def test_dense_grid_and_far_away(world: Worlds, name: str) -> None:
    grid = torch.arange(-40 << 16, 40 << 16, 331)
    near = torch.cat([torch.arange(t - 3, t + 4) for t in splines()[name].thresholds])
    far = torch.tensor(FAR) << 16
    x = torch.cat([grid, near, far])
    got = decoded(world(2), name, x)
    error = float((real(got) - wanted(name, x)).abs().max())
    assert error <= ERRORS[name] + 2**-16 and error <= 5e-4
    assert torch.equal(got[-len(far) :], asymptote(splines()[name], far, 16))


@pytest.mark.parametrize("name", ["gelu", "tanh"])
def test_for_more_parties(world: Worlds, parties: int, name: str) -> None:
    x = torch.cat([torch.arange(-10 << 16, 10 << 16, 997), torch.tensor(FAR) << 16])
    error = (real(decoded(world(parties), name, x)) - wanted(name, x)).abs()
    assert float(error.max()) <= ERRORS[name] + 2**-16


@pytest.mark.parametrize("frac_bits", [8, 9, 12, 15, 17, 20, 24])
@pytest.mark.parametrize("name", ["silu", "sigmoid"])
def test_other_scales(world: Worlds, frac_bits: int, name: str) -> None:
    x = torch.linspace(-12 * 2.0**frac_bits, 12 * 2.0**frac_bits, 5000).to(torch.int64)
    error = (real(decoded(world(2), name, x, frac_bits), frac_bits) - wanted(name, x, frac_bits)).abs()
    argument = 1.2 * 2**-16 if frac_bits > 16 else 0
    assert float(error.max()) <= ERRORS[name] + 1.5 * 2.0**-frac_bits + argument


@pytest.mark.parametrize("frac_bits", [8, 16, 24])
@pytest.mark.parametrize("name", ["gelu", "erf", "elu"])
def test_to_the_ends_of_the_domain(world: Worlds, parties: int, frac_bits: int, name: str) -> None:
    edge = 1 << (62 - max(0, 16 - frac_bits))
    exponents = range(frac_bits + 5, edge.bit_length() - 1)
    x = torch.tensor([-edge, edge - 1, *(s << k for k in exponents for s in (-1, 1))])
    error = decoded(world(parties), name, x, frac_bits) - asymptote(splines()[name], x, frac_bits)
    assert int(error.abs().max()) <= (1 << max(0, frac_bits - 16)) - 1


@pytest.mark.parametrize("width", [48, 36])
def test_narrow_comparisons(world: Worlds, parties: int, width: int) -> None:
    """Right to the ends of their domain and wrong beyond, where a narrow comparison sees another number."""
    edge = 1 << (width - 2)
    x = torch.cat([torch.arange(-8 << 16, 8 << 16, 997), torch.tensor([-edge, edge - 1, -edge + 1, edge // 3])])
    used = world(parties)
    narrow = lambda ctx, s: piecewise(ctx, s, splines()["gelu"], width)  # noqa: E731
    got = used.reveal(used.run(narrow, used.share(x, 16)))
    assert float((real(got) - wanted("gelu", x)).abs().max()) <= ERRORS["gelu"] + 2**-16
    assert got[-4:].tolist() == [0, edge - 1, 0, edge // 3]
    beyond = torch.tensor([3 * edge])
    assert not torch.equal(used.reveal(used.run(narrow, used.share(beyond, 16))), beyond)


def dealt_bits(name: str, width: int, d: int, many: bool = False) -> int:
    """What the dealer sends per element; of many numbers those that coefficients take."""
    t = len(splines()[name].thresholds)
    digits, (leaf, top) = {48: (12, (3 * 22, 5)), 64: (16, (4 * 22, 15))}[width]
    comparisons = digits * 15 + 1 + 3 * (leaf + top) + (1 + (t - 3) * (2 * 8 + 1) if t > 3 else 0)
    cubics = 64 * ((3 if d else 2) + 4 * (t - 2)) + d * 3 * (1 + t - 2)
    fewer = (3 * (t - 2) - 4) * (64 + d) if by_coefficients(name, many) else 0
    return comparisons + cubics - fewer + 64 + 2 * (64 + splines()[name].frac_bits - 16)


def by_coefficients(name: str, many: bool) -> bool:
    """Whether those of the cubic that is chosen are opened."""
    return many and len(splines()[name].thresholds) > 6


def residual_bits(name: str) -> int:
    """Over how many bits a residual is opened."""
    return 32 if splines()[name].frac_bits - 16 >= 40 else 64


def sent_bits(name: str, width: int, many: bool = False) -> int:
    """What a party sends per element and peer."""
    t = len(splines()[name].thresholds)
    return (
        64
        + residual_bits(name)
        + by_coefficients(name, many) * 3 * 64
        + 3 * {48: 25, 64: 34}[width]
        + (t - 3) * 12
        + t
        - 1
    )


def opened(name: str, width: int, many: bool = False) -> list[tuple[str, int]]:
    """The openings, in order; those of one round by name."""
    near = len(splines()[name].thresholds) > 3
    return [
        ("Pieces.r", 64),
        ("Pieces.leaf", 7),
        *([("Pieces.near_leaf", 5)] if near else []),
        ("Pieces.top", {48: 4, 64: 6}[width]),
        *([("Pieces.near_top", 2)] if near else []),
        ("Pieces.beta", 1),
        *([("Pieces.q", 64)] if by_coefficients(name, many) else []),
        ("Pieces.s", residual_bits(name)),
    ]


def test_narrow_comparisons_cost_less(run: Callable[..., Ran]) -> None:
    x = (torch.zeros(64, dtype=torch.int64), 16)
    ran = run(lambda ctx, s: piecewise(ctx, s, splines()["silu"], 48), x)
    ran.costs(5, 8 * sent_bits("silu", 48), 8 * dealt_bits("silu", 48, 0))
    assert ran.opened() == opened("silu", 48)


@pytest.mark.parametrize("times", [1, 5], ids=["few", "many"])
@EVERY
def test_a_product_is_truncated_by_its_opening(run: Callable[..., Ran], name: str, times: int) -> None:
    """Of 32 fraction bits 16 are left, with no round of their own and to the ends of the domain."""
    x = torch.cat([torch.linspace(-12 * 2.0**32, 12 * 2.0**32, 999).to(torch.int64), torch.tensor(FAR) << 32])
    x = torch.cat([x.clamp(-(1 << 62), (1 << 62) - 1), torch.tensor([-(1 << 62), (1 << 62) - 1])])[-1000:].repeat(times)
    assert (len(x) > module._FEW) == (times > 1)
    x = x.reshape(times, -1)
    ran = run(named(name), (x, 32))
    error = (real(ran.value) - wanted(name, x, 32)).abs()
    assert ran.frac_bits == 16 and float(error.max()) <= ERRORS[name] + 2.5 * 2**-16
    many, rows = times > 1, 125 * times
    ran.costs(5 + by_coefficients(name, many), rows * sent_bits(name, 48, many), rows * dealt_bits(name, 48, 16, many))
    assert ran.opened() == opened(name, 48, many)


def test_of_wide_rows_what_is_sent_online_counts() -> None:
    for shape, many in (
        ((3, 2048), True),
        ((2, 50, 100), True),
        ((3, 2049), False),
        ((5000,), False),
        ((4, 1024), False),
    ):
        plan, cost, _ = trace(
            lambda ctx, s=shape: piecewise(  # type: ignore[misc]
                ctx, Shared(torch.empty(s, dtype=torch.int64, device="meta"), 32), splines()["gelu"]
            ),
            parties=2,
        )
        assert cost.rounds == 5 + many and [item.coefficients for _, item in plan.entries] == [many]


def test_far_away_a_residual_is_any_number_times_zero(monkeypatch: pytest.MonkeyPatch, world: Worlds) -> None:
    """Where low bits say nothing: were the residual not multiplied by a bit, garbage would come out."""
    x = torch.arange(1, 2000) << 24  # low bits are those of zero
    assert torch.equal(decoded(world(2), "silu", x), x)
    calls, product = count(), module.bit_product

    def whole(
        first: bool, e: torch.Tensor, bit: torch.Tensor, c: torch.Tensor, r: torch.Tensor, bit_r: torch.Tensor
    ) -> torch.Tensor:
        """The first of each party's two products with a bit, without the bit."""
        return product(first, e, bit, c, r, bit_r) if next(calls) % 2 else (c if first else 0) - r

    monkeypatch.setattr(module, "bit_product", whole)
    assert not torch.equal(decoded(world(2), "silu", x), x)


def test_beyond_the_domain_is_wrong(world: Worlds) -> None:
    """So the ends above are not further out."""
    x = torch.tensor([1 << 55, 1 << 56])
    assert not torch.equal(decoded(world(2), "gelu", x, 8), x)


@EVERY
def test_costs(run: Callable[..., Ran], name: str) -> None:
    ran = run(named(name), (torch.arange(64).reshape(8, 8) << 10, 16))
    ran.costs(5, 8 * sent_bits(name, 64), 8 * dealt_bits(name, 64, 0))
    assert ran.opened() == opened(name, 64)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_what_issue_3_allows(run: Callable[..., Ran], name: str) -> None:
    ran = run(named(name), (torch.zeros(1000, dtype=torch.int64), 16))
    assert ran.transcript.rounds <= 6 and ran.transcript.dealer_bytes <= 600 * 1000
    assert ran.transcript.bytes_sent <= 60 * 1000 * (ran.parties - 1)


@pytest.mark.parametrize(("frac_bits", "first", "last"), [(8, 0, 1), (24, 1, 0)])
def test_costs_at_other_scales(run: Callable[..., Ran], frac_bits: int, first: int, last: int) -> None:
    ran = run(named("hardswish"), (torch.zeros(8, dtype=torch.int64), frac_bits))
    kinds = [label.partition(".")[0] for label, _ in ran.opened()]
    assert kinds == ["Truncation"] * first + ["Pieces"] * 5 + ["Truncation"] * last
    assert ran.transcript.rounds == 6 and ran.frac_bits == frac_bits


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 3, 4)])
def test_any_shape(run: Callable[..., Ran], shape: tuple[int, ...]) -> None:
    x = torch.full(shape, -3 << 15)
    value = run(named("silu"), (x, 16)).value
    assert value.shape == shape and torch.allclose(real(value), wanted("silu", x), atol=2e-4)


def test_openings(monkeypatch: pytest.MonkeyPatch) -> None:
    async def two(ctx: Context, x: Shared) -> None:
        for name, width, frac_bits in (
            ("hardswish", 64, 16),
            ("gelu", 48, 16),
            ("hardswish", 48, 32),
            ("gelu", 48, 32),
        ):
            await piecewise(ctx, Shared(x.share, frac_bits), splines()[name], width)

    numbers = (torch.arange(14_000) * 977).reshape(14, 1000)
    assert_hides(monkeypatch, two, numbers, torch.zeros_like(numbers))


def test_a_mask_serves_one_argument() -> None:
    """Two functions of two numbers that share r: the trace refuses it."""

    async def fault(ctx: Context, x: Shared) -> None:
        correlation = ctx.correlation(Pieces(x.shape, 64, 3, 47))
        await ctx.open(x, correlation.mask("r"))
        await ctx.open(-x, correlation.mask("r"))

    with pytest.raises(ProtocolError, match="used already"):
        trace(lambda ctx: fault(ctx, Shared(torch.empty(4, dtype=torch.int64, device="meta"))), parties=2)
