"""Private token ids from the SDK to the parties and back: one deployment, sentences of different lengths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

from mpcinfer.client.data import Client
from mpcinfer.client.owner import ModelOwner
from mpcinfer.errors import DtypeError, RangeError, ShapeError
from mpcinfer.graph.sizes import Size
from tests.inprocess import InProcess

ROWS, LONGEST = 40, 12


class Tagger(nn.Module):
    """Token and position embeddings and two layers: scores of three tags for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(ROWS, 6), nn.Embedding(LONGEST, 6)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        tags: torch.Tensor = self.layers(self.tokens(ids) + self.positions(torch.arange(ids.shape[1])))
        return tags


@pytest.fixture(scope="module", params=[2, 3], ids="n={}".format)
def tagger(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Tagger]]:
    torch.manual_seed(0)
    model = Tagger().eval()
    sizes = {"ids": {0: Dim("batch"), 1: Dim("length", max=LONGEST)}}
    with ExitStack() as stack:
        cluster = stack.enter_context(InProcess(tmp_path_factory.mktemp("ids"), request.param)).keys
        owner = stack.enter_context(ModelOwner.connect(cluster.cluster, cluster.identity("owner/alice")))
        owner.deploy(model, torch.arange(6).reshape(2, 3), name="tagger", dynamic_shapes=sizes)
        yield stack.enter_context(Client.connect(cluster.cluster, cluster.identity("client/bob"))), model


def test_what_clients_are_told(tagger: tuple[Client, Tagger]) -> None:
    (model,) = tagger[0].models()
    assert model.sizes == (Size("batch", 1, 0), Size("length", 1, LONGEST))
    assert [(v.name, v.shape, v.frac_bits, v.limit) for v in model.inputs] == [("ids", (-1, -2), 0, ROWS)]
    assert [v.shape for v in model.outputs] == [(-1, -2, 3)]


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (1, LONGEST)])
def test_sentences_of_every_length(tagger: tuple[Client, Tagger], shape: tuple[int, int]) -> None:
    client, model = tagger
    ids = torch.randint(0, ROWS, shape, generator=torch.Generator().manual_seed(1))
    answer, as_numpy = client.infer("tagger", ids), client.infer("tagger", ids.numpy().astype(np.int32))
    assert isinstance(as_numpy, np.ndarray)
    for got in (answer, torch.from_numpy(as_numpy)):
        assert got.shape == (*shape, 3) and float((got - model(ids).detach()).abs().max()) < 1e-3


def test_ids_that_are_refused_before_anything_leaves(tagger: tuple[Client, Tagger]) -> None:
    client, _ = tagger
    for bad in (-1, ROWS, 2**40):
        with pytest.raises(RangeError, match=f"'ids' contains indices that are not from 0 to {ROWS - 1}"):
            client.infer("tagger", torch.tensor([[0, bad]]))
    for wrong in (torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool), np.zeros((1, 2))):
        with pytest.raises(DtypeError, match="'ids' has dtype .*pass integers"):
            client.infer("tagger", wrong)
    for shape in ((1, LONGEST + 1), (1, 0), (2,), (1, 2, 3)):
        with pytest.raises(ShapeError, match=rf"takes \[batch, length\].*length from 1 to {LONGEST}"):
            client.infer("tagger", torch.zeros(shape, dtype=torch.int64))
