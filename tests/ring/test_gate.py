"""The kernel of gates: against the formula, mod 2^64."""

from __future__ import annotations

import pytest
import torch

from mpcinfer.ring.gate import gate

RNG = torch.Generator().manual_seed(1)
ASYMPTOTES = (3, -5, 7, 11)


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=RNG)


def bits(*shape: int) -> torch.Tensor:
    return torch.randint(0, 2, shape, generator=RNG)


def shared(x: torch.Tensor, parties: int) -> list[torch.Tensor]:
    shares = [words(*x.shape) for _ in range(parties - 1)]
    return [*shares, x - sum(shares)]


class Case:
    """Random numbers, outcomes and masks of a shape; what the kernel makes of them."""

    def __init__(self, shape: tuple[int, ...], parties: int) -> None:
        self.public = tuple(f(*shape) << by for f, by in [(words, 0), (bits, 48), (words, 0), (bits, 17)]) + (
            words(*shape),
            bits(*shape) << 48,
        )
        c, by, c_s, by_s, c_u, by_u = self.public
        (m, m_wrap), (n, n_wrap), (h, h_wrap) = ((words(*shape), bits(*shape)) for _ in range(3))
        beta, e = bits(2, *shape), bits(3, *shape)
        ends, switch = beta
        y, u, rest = c - (m - by * m_wrap), c_u - (n - by_u * n_wrap), c_s - (h - by_s * h_wrap)
        chosen, left = e[0] ^ ends, e[1] ^ switch
        slope, constant, right, last = ASYMPTOTES
        self.expected = chosen * rest * u + torch.where(left != 0, slope * y + constant, right * y + last) * u
        one = torch.ones_like(m)
        each, switched, inside = torch.stack([one, switch, ends]), torch.stack([one, switch]), torch.stack([one, ends])
        values = {
            "n": each * n, "n_wrap": each * n_wrap, "mn": switched * (m * n), "m_wrap_n": switched * (m_wrap * n),
            "m_n_wrap": switched * (m * n_wrap), "hn": inside * (h * n), "h_wrap_n": inside * (h_wrap * n),
            "h_n_wrap": inside * (h * n_wrap), "high": inside * h, "wrap": inside * h_wrap,
        }  # fmt: skip
        dealt = {name: shared(value, parties) for name, value in values.items()}
        self.dealt = [{name: shares[i] for name, shares in dealt.items()} for i in range(parties)]
        of_m = m - by * m_wrap
        own = [shared(x, parties) for x in (of_m, switch, switch * of_m, ends)]
        self.own = [tuple(shares[i] for shares in own) for i in range(parties)]
        self.e = e.to(torch.uint8)

    def found(self) -> torch.Tensor:
        total = torch.zeros_like(self.expected)
        for i, (own, dealt) in enumerate(zip(self.own, self.dealt, strict=True)):
            total += gate(i == 0, self.e, self.public, own, dealt, ASYMPTOTES)
        return total


@pytest.mark.parametrize("parties", [2, 3, 5])
@pytest.mark.parametrize("shape", [(), (0,), (17,), (2, 3, 4)])
def test_a_chosen_number_times_another(shape: tuple[int, ...], parties: int) -> None:
    case = Case(shape, parties)
    assert torch.equal(case.found(), case.expected)


@pytest.mark.parametrize("name", ["n", "n_wrap", "mn", "m_wrap_n", "m_n_wrap", "hn", "h_wrap_n", "h_n_wrap", "wrap"])
def test_every_product_is_needed(name: str) -> None:
    """What the test above would catch."""
    case = Case((50,), 2)
    case.dealt[1][name] = torch.zeros_like(case.dealt[1][name])
    assert not torch.equal(case.found(), case.expected)


def test_views_and_meta_tensors() -> None:
    case = Case((4, 6), 2)
    whole = gate(True, case.e, case.public, case.own[0], case.dealt[0], ASYMPTOTES)
    turned = {name: x.transpose(1, 2) for name, x in case.dealt[0].items()}
    public, own = tuple(x.T for x in case.public), tuple(x.T for x in case.own[0])
    assert torch.equal(gate(True, case.e.transpose(1, 2), public, own, turned, ASYMPTOTES), whole.T)
    meta = {name: x.to("meta") for name, x in turned.items()}
    e, public, own = case.e.to("meta"), tuple(x.to("meta") for x in public), tuple(x.to("meta") for x in own)
    assert gate(True, e, public, own, meta, ASYMPTOTES).shape == (6, 4)
