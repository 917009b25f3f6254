"""Shares that move between CrypTen and mpcinfer: refreshed, for any number of parties, and never added up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcinfer.errors import DtypeError, InputError, ShapeError
from mpcinfer.interop.crypten import export_shares, import_shares
from mpcinfer.protocol.types import Shared
from mpcinfer.ring.codec import FixedPoint
from mpcinfer.ring.domain import Z64
from mpcinfer.ring.sharing import combine
from tests.inprocess import InProcess, mlp, plain, random_weights
from tests.interop.conftest import run_parties

SECRET = torch.tensor([[1.5, -2.25, 0.0], [1000.0, -0.125, -1.0]])


@pytest.fixture(scope="module")
def shared(crypten: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two parties have left their shares of SECRET."""
    directory = tmp_path_factory.mktemp("crypten")
    torch.save(SECRET, directory / "secret.pt")
    run_parties("share", 2, directory)
    return directory


def additive(x: torch.Tensor, parties: int) -> list[torch.Tensor]:
    """Shares with the least possible randomness, as if CrypTen's had been guessed: all but one are zero."""
    return [*(torch.zeros_like(x) for _ in range(parties - 1)), x]


def total(shares: list[Shared]) -> torch.Tensor:
    """What shares add up to."""
    return combine([s.share for s in shares], Z64)


X = FixedPoint().encode(torch.linspace(-4, 4, 4096))


@pytest.mark.parametrize("here", [2, 3, 5])
@pytest.mark.parametrize("there", [2, 3, 4])
def test_shares_of_any_number_of_parties_become_shares_of_any_other(there: int, here: int) -> None:
    imported = import_shares(additive(X, there), here)
    assert len(imported) == here and all(s.frac_bits == 16 for s in imported)
    assert torch.equal(total(imported), X)
    exported = export_shares(imported, there)
    assert len(exported) == there and torch.equal(combine(exported, Z64), X)


def looks_uniform(x: torch.Tensor) -> bool:
    """Whether each of the 64 bits is set in about half of the 4,096 elements: six standard deviations."""
    return all(abs(int((x >> bit & 1).sum()) - 2048) < 192 for bit in range(64))


@pytest.mark.parametrize("moved", [import_shares, lambda shares: export_shares([Shared(s, 16) for s in shares])])
def test_what_moves_is_refreshed(moved: Callable[[list[torch.Tensor]], list[Any]]) -> None:
    before = additive(X, 3)
    torch.manual_seed(0)
    once = [getattr(s, "share", s) for s in moved(before)]
    torch.manual_seed(0)  # torch's generator has no part in it
    again = [getattr(s, "share", s) for s in moved(before)]
    for old, first, second in zip(before, once, again, strict=True):
        assert looks_uniform(first) and looks_uniform(first - second)
        # shares of before and after do not fit together
        assert looks_uniform(X - old + first) and looks_uniform(X - first + second)
    assert all(torch.equal(old, new) for old, new in zip(before, additive(X, 3), strict=True))  # not written to


def test_an_imported_share_shows_nothing() -> None:
    share = import_shares(additive(X, 2))[0]
    assert repr(share) == "Shared(shape=(4096,), frac_bits=16)"


def test_shapes_without_elements_or_axes_and_strides_move_too() -> None:
    for x in (torch.tensor(5), torch.zeros(0, 3, dtype=torch.int64), X.reshape(64, 64).t()):
        assert torch.equal(total(import_shares(additive(x, 2))), x)


def test_a_coarser_scale_is_made_finer_and_a_finer_one_is_refused() -> None:
    whole = import_shares(additive(torch.tensor([3, -1]), 2), frac_bits=0)
    assert torch.equal(combine(export_shares(whole), Z64), torch.tensor([3, -1]) * 65536)
    fine = import_shares(additive(X, 2), frac_bits=20)
    with pytest.raises(InputError, match="pass frac_bits=20"):
        export_shares(fine)
    assert torch.equal(combine(export_shares(fine, frac_bits=20), Z64), X)


@pytest.mark.parametrize(
    ("shares", "options", "kind", "says"),
    [
        ([], {}, InputError, "0 shares"),
        ([X], {}, InputError, "at least two parties"),
        ([X, X], {"parties": 1}, InputError, "at least two parties"),
        ([X, X[1:]], {}, ShapeError, "different shapes"),
        ([X.double(), X], {}, DtypeError, "not torch.float64 on cpu"),
        ([X.int(), X], {}, DtypeError, "not torch.int32"),
        ([X.tolist(), X], {}, DtypeError, "not list"),
    ],
)
def test_what_is_no_sharing_is_refused(shares: Any, options: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        import_shares(shares, **options)


def test_crypten_tensors_know_their_scale_and_binary_ones_are_refused(crypten: Any) -> None:
    primitives = crypten.mpc.primitives
    arithmetic = [primitives.ArithmeticSharedTensor.from_shares(s, precision=20) for s in additive(X, 2)]
    assert [s.frac_bits for s in import_shares(arithmetic)] == [20, 20]
    with pytest.raises(InputError, match="20 fraction bits, not frac_bits=16"):
        import_shares(arithmetic, frac_bits=16)
    with pytest.raises(InputError, match="different scales"):
        import_shares([arithmetic[0], X])
    with pytest.raises(InputError, match="different scales"):
        export_shares([Shared(X, 16), Shared(X, 20)])
    with pytest.raises(DtypeError, match="convert it before"):
        import_shares([primitives.BinarySharedTensor.from_shares(s) for s in additive(X, 2)])


@pytest.mark.timeout(300)
def test_each_party_of_crypten_can_hand_on_its_share_by_itself(shared: Path) -> None:
    pieces = [[Shared(share, bits) for share, bits in torch.load(shared / f"pieces-{rank}.pt")] for rank in range(2)]
    held = [pieces[0][i] + pieces[1][i] for i in range(3)]
    assert torch.equal(FixedPoint().decode(total(held)), SECRET.double())


@pytest.mark.timeout(300)
def test_a_secret_goes_through_our_parties_and_back_without_being_revealed(
    shared: Path, tmp_path: Path, use: Callable[[list[torch.Tensor]], list[torch.Tensor]]
) -> None:
    program = mlp((3, 4, 2))
    weights = random_weights(program)
    imported = import_shares([torch.load(shared / f"share-{rank}.pt") for rank in range(2)], 3)
    with InProcess(tmp_path / "cluster", 3) as cluster:
        caller = cluster.caller()
        assert not any(isinstance(answer, Exception) for answer in caller.deploy(program, weights))
        requests = caller.inferences(SECRET)  # of which nothing but the form is used
        for request, share in zip(requests, imported, strict=True):
            request.inputs[0].data = bytes(Z64.pack(share.share))
        answers = caller.at_all("Infer", requests)
    outputs = [Shared(Z64.unpack(a.outputs[0].data, tuple(a.outputs[0].shape)), 16) for a in answers]
    same, relu = use(export_shares(outputs, 2))
    wanted = plain(weights, SECRET)
    assert float((same - wanted).abs().max()) < 0.001
    assert float((relu - wanted.relu()).abs().max()) < 0.002
