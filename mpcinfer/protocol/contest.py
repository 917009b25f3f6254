"""The largest of three or four numbers: all pairs are compared at once, and the winner picked in the same rounds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations

import torch

from mpcinfer.protocol.compare import below, block_masks, digit_tables, digit_values
from mpcinfer.protocol.context import Context, together
from mpcinfer.protocol.correlation import Field, FixedMasks, Kind, Tensors, kind
from mpcinfer.protocol.types import Masked, Shared
from mpcinfer.ring.domain import BIT, Z64, Ring

MOST = 4


@cache
def _pairs(size: int) -> list[tuple[int, int]]:
    return list(combinations(range(size), 2))


@cache
def _duels(size: int, winner: int) -> list[tuple[int, bool]]:
    """The pairs a winner is in, and whether the outcome [the first is less than the second] must be true for it."""
    return [(at, second == winner) for at, (first, second) in enumerate(_pairs(size)) if winner in (first, second)]


def count_of_pairs(size: int) -> int:
    """In a contest of so many."""
    return len(_pairs(size))


def pair_differences(x: torch.Tensor) -> torch.Tensor:
    """Of each two of x [k, *S] the difference: [pairs, *S]."""
    return torch.stack([x[i] - x[j] for i, j in _pairs(len(x))])


def products_of_outcomes(beta: torch.Tensor, size: int) -> torch.Tensor:
    """For each number but the first, the products of the bits of its pairs, by subset that is not empty.

    beta [pairs, *S], a bit for each pair -> [size - 1, 2^(size - 1) - 1, *S].
    """
    return torch.stack([_products([beta[at] for at, _ in _duels(size, i)])[1:] for i in range(1, size)])


def _products(bits: list[torch.Tensor]) -> torch.Tensor:
    """The products of all subsets of `bits`, each [*S]: [2^len, *S], a subset's number having its members as digits."""
    found = [torch.ones_like(bits[0])]
    for bit in bits:
        found += [product * bit for product in found]
    return torch.stack(found)


@cache
def _coefficients(bits: int) -> torch.Tensor:
    """For each word of bits f, the coefficients of the products of betas in prod (f + (1 - 2 f) beta): [2^n, 2^n]."""
    table = torch.zeros(1 << bits, 1 << bits, dtype=torch.int64)
    for word in range(1 << bits):
        for subset in range(1 << bits):
            # a member of the subset contributes 1 - 2 f, any other f
            value = 1
            for i in range(bits):
                f = word >> i & 1
                value *= (1 - 2 * f) if subset >> i & 1 else f
            table[word, subset] = value
    return table


def winning(e: torch.Tensor, size: int) -> torch.Tensor:
    """For each number but the first, the coefficients of 1 and of its `products_of_outcomes` in [it has won].

    e [pairs, *S]: each outcome [the first of a pair is less than the second], xor the pair's bit ->
    [size - 1, 2^(size - 1), *S].
    """
    e = e.to(torch.int64)
    words = torch.stack(
        [
            torch.stack([(e[at] ^ (not true)) << b for b, (at, true) in enumerate(_duels(size, i))]).sum(0)
            for i in range(1, size)
        ]
    )
    return _coefficients(size - 1).to(words.device)[words].movedim(-1, 1)


def picked(
    first: bool,
    coefficients: torch.Tensor,
    bits: torch.Tensor,
    c: torch.Tensor,
    r: torch.Tensor | int,
    bits_r: torch.Tensor | int,
) -> torch.Tensor:
    """A share of the sum over i of [i has won] (c_i - r_i), from public c and shares of products, r, and both's."""
    rest = coefficients[:, 1:] * (bits * c.unsqueeze(1) - bits_r)
    return (coefficients[:, 0] * ((c if first else 0) - r) + rest.sum(1)).sum(0)


@kind
@dataclass(frozen=True)
class Contest(Kind):
    """Masks r of the differences of `size` numbers from the first of them, and what comparing all pairs takes.

    r_i - r_j masks a pair's difference: tables of its digits, AND-block masks and a bit beta, as in `Comparison`. For
    each number but the first the products of the betas of its pairs, by subset, as numbers and times r_i; with
    `others` masks s of further differences, and these products times s_i, both modulo 2^other_bits.
    """

    shape: tuple[int, ...]
    size: int
    width: int = 64
    others: int = 0
    other_bits: int = 64

    def __post_init__(self) -> None:
        if not 2 < self.size <= MOST:
            raise ValueError("a contest is of three or four")

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Of what there is for each pair, each number but the first, and each of these and subset."""
        most = self.size - 1
        return (
            (count_of_pairs(self.size), *self.shape),
            (most, *self.shape),
            (most, (1 << most) - 1, *self.shape),
        )

    def free(self) -> dict[str, Field]:
        """r; the block masks of both levels; beta; s."""
        pairs, numbers, _ = self._shapes()
        fields = {
            "r": Field(numbers, Z64),
            **block_masks((1, *pairs), self.width),
            "beta": Field((1, *pairs), BIT),
        }
        if self.others:
            fields["s"] = Field((self.others, *numbers), Ring(self.other_bits))
        return fields

    def derived(self) -> dict[str, Field]:
        """lt tables and sign of each r_i - r_j; block products; products of betas, these times r, and times s."""
        pairs, _, subsets = self._shapes()
        fields = {
            **digit_tables(pairs, (1, *pairs), self.width),
            "bits": Field(subsets, Z64),
            "bits_r": Field(subsets, Z64),
        }
        if self.others:
            fields["bits_s"] = Field((self.others, *subsets), Ring(self.other_bits))
        return fields

    def derive(self, free: Tensors, fixed: FixedMasks) -> Tensors:
        """See `derived`."""
        r, beta = free["r"], free["beta"][0].to(torch.int64)
        all_r = torch.cat([torch.zeros_like(r[:1]), r])
        bits = products_of_outcomes(beta, self.size)
        values = {
            **digit_values(pair_differences(all_r), free, self.width),
            "bits": bits,
            "bits_r": bits * r.unsqueeze(1),
        }
        if self.others:
            values["bits_s"] = bits * free["s"].unsqueeze(2)
        return values


async def largest(
    ctx: Context,
    x: Shared,
    carried: tuple[Shared, ...] = (),
    width: int = 64,
    *,
    bits: int = 64,
    placed: bool = False,
) -> tuple[Shared, list[Shared]]:
    """The largest of each three or four numbers, and of each carried tensor what is in its place. The first of equals.

    x [*S, k], k = 3 or 4, carried ones of x's shape -> [*S]. Exact where all differences are in
    [-2^(width-1), 2^(width-1)). bits: of carried numbers only so many are meant, here and in what is found of them.
    placed: at the end of the carried ones, the place 0 .. k - 1, an integer, which takes no opening.
    Opened: d_i = x_i - x_0 + r_i over Z_2^64 for i > 0, and such differences of what is carried; for every pair the
    words of `below` of d_i - d_j, whose mask is r_i - r_j; all outcomes xor beta. x_i has won if the outcomes of its
    k - 1 pairs are what they should: a product of bits that are public but for beta, so that it and its product with
    d_i - r_i are sums of dealt products of betas.
    Rounds 4; online for k = 4 and width 64 50.25 bytes per peer and four numbers (29.1 for three), 24 (16) more for
    each carried tensor; offline 594 (225) and 168 (48) more; with fewer bits, as many fewer; correlation `Contest`.
    Source: comparing all pairs at once is folklore; picking by dealt products of masks is ABY2.0's multi-input AND.
    """
    size = x.shape[-1]
    correlation = ctx.correlation(Contest(x.shape[:-1], size, width, len(carried), bits))

    def differences(t: torch.Tensor) -> torch.Tensor:
        return (t[..., 1:] - t[..., :1]).movedim(-1, 0)

    d = ctx.open(x.map(differences), correlation.mask("r"))
    if carried:
        more = Shared(torch.stack([differences(y.share) for y in carried]))
        opened, u = await together(d, ctx.open(more, correlation.mask("s")))
    else:
        opened, u = await d, Masked(torch.empty(0), Z64)
    c = torch.cat([torch.zeros_like(opened.value[:1]), opened.value])
    outcomes = await below(ctx, Masked(pair_differences(c), Z64), (0,), correlation, width)
    e = (await ctx.open(outcomes, correlation.mask("beta"))).value[0]
    coefficients, bit_products = winning(e, size), correlation["bits"]

    def won(c: torch.Tensor, r: torch.Tensor | int, bits_r: torch.Tensor | int) -> torch.Tensor:
        """Shares of the winner's difference from the first."""
        return picked(ctx.first, coefficients, bit_products, c, r, bits_r)

    found = x.map(lambda t: t[..., 0] + won(opened.value, correlation["r"], correlation["bits_r"]))
    others = [
        y.map(lambda t, i=i: t[..., 0] + won(u.value[i], correlation["s"][i], correlation["bits_s"][i]))  # type: ignore[misc]
        for i, y in enumerate(carried)
    ]
    if placed:
        places = torch.arange(1, size, device=c.device).reshape(-1, *[1] * (c.dim() - 1))
        others.append(Shared(won(places.expand(opened.value.shape), 0, 0)))
    return found, others
