"""The same networks in the real CrypTen and here: our error against float64 is at most CrypTen's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mpcinfer.graph.capture import capture
from mpcinfer.interop.crypten import from_crypten
from tests.interop import networks
from tests.interop.conftest import run_parties
from tests.models_local import plaintext, run_local


@pytest.fixture(scope="module")
def ran(crypten: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two parties have left their results."""
    directory = tmp_path_factory.mktemp("crypten")
    run_parties("infer+zoo+decrypt", 2, directory)
    return directory


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", networks.BUILDERS)
def test_our_error_is_at_most_that_of_crypten(name: str, crypten: Any, ran: Path) -> None:
    model, x = networks.example(name)
    (wanted,) = plaintext(model, [x])
    theirs = float((torch.load(ran / f"{name}-0.pt") - wanted).abs().max())
    captured = capture(from_crypten(networks.in_crypten(crypten, name)), [x])
    for parties in (2, 3):
        (result,), _ = run_local(captured, [x], parties)
        ours = float((result - wanted).abs().max())
        assert 0 < ours <= theirs < 0.01, f"{parties} parties: {ours:.6f}, CrypTen: {theirs:.6f}"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_module_means_what_it_means_in_crypten(crypten: Any, ran: Path) -> None:
    theirs = torch.load(ran / "zoo-0.pt")
    models = networks.zoo(crypten.nn)
    assert set(theirs) == set(models)
    for name, (model, shape) in models.items():
        x = networks.zoo_input(shape)
        converted = from_crypten(model.eval())
        (wanted,) = plaintext(converted, [x])
        assert wanted.shape == theirs[name].shape, name
        assert float((wanted - theirs[name]).abs().max()) < 0.02, name  # its exponential is that rough
        program = capture(converted, [x]).program  # refuses what has no protocol
        assert not program.constants, name  # all but single numbers and sizes is secret


@pytest.mark.timeout(300)
def test_an_encrypted_model_is_decoded_exactly_by_all_of_its_parties(ran: Path) -> None:
    wanted = torch.tensor([[-2.0, 1.5], [3.25, -1.0]]) + 2.0**-16
    for rank in range(2):
        assert torch.equal(torch.load(ran / f"opened-{rank}.pt"), wanted.t())
