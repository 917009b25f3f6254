"""What a connected client is to the proxy, in front of fake parties."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from mpcinfer.client.data import Client
from mpcinfer.client.proxy.backend import of_client
from tests.client.fakes import FakeCluster, info, spec


def test_an_embedding_comes_with_the_receipt_of_its_own_request(world: FakeCluster) -> None:
    world.deploy(info("ids", [spec("ids", -1, frac_bits=0, limit=100.0)], [spec("vector", -1, frac_bits=0)]))
    with Client.connect(world.cluster, world.issue("client/a")) as client, ThreadPoolExecutor(4) as pool:
        backend = of_client(client, world.cluster)  # type: ignore[arg-type]
        found = list(pool.map(lambda n: backend.embed("ids", range(n), 20), range(1, 9)))
    requests = {r.inputs[0].shape[0]: r.request_id.hex() for r in world.parties[0].inferences}
    for n, each in enumerate(found, 1):
        assert (each.vector, each.tokens) == (list(range(n)), n)
        assert [receipt.id for receipt in each.receipts] == [requests[n]]
