"""The data owner's side against fake parties: what leaves the process, what comes back, what is refused."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch

from mpcinfer.client import inputs
from mpcinfer.client.aio import AsyncClient
from mpcinfer.client.cluster import Connection
from mpcinfer.client.data import Client
from mpcinfer.errors import (
    AbortedError,
    AgreementError,
    BusyError,
    DeadlineError,
    DtypeError,
    InputError,
    MpcInferError,
    NotFoundError,
    ProtocolError,
    RangeError,
    ShapeError,
    UnavailableError,
)
from mpcinfer.trust.receipt import Receipt
from tests.client.fakes import FakeCluster, info, spec

X = torch.tensor([[1.5, -2.0, 0.25], [1000.0, 0.0, -0.001]])
ENCODED = torch.round(X.double() * 65536).to(torch.int64)
SAME = info("same", [spec("x", -1, 3)], [spec("y", -1, 3)])


def client_of(world: FakeCluster) -> Client:
    return Client.connect(world.cluster, world.issue("client/a"))


# --- what is sent ----------------------------------------------------------------------------------------------------


def test_shares_of_the_input_leave_and_nothing_else(worlds: FakeCluster) -> None:
    worlds.deploy(SAME)
    with client_of(worlds) as client:
        first, second = client.infer("same", X), client.infer("same", X)
    assert torch.equal(first, ENCODED.double().div(65536).float()) and torch.equal(first, second)
    for attempt in range(2):
        requests = [party.inferences[attempt] for party in worlds.parties]
        assert torch.equal(worlds.secrets(attempt)[0], ENCODED)
        assert len({r.request_id for r in requests}) == 1 and len(requests[0].request_id) == 16
        assert {(r.model, r.version) for r in requests} == {("o/same", 1)}
        for request in requests:
            (x,) = request.inputs
            assert (tuple(x.shape), x.frac_bits, x.ring_bits) == ((2, 3), 16, 64)
        *others, last = (r.inputs[0] for r in requests)
        assert all(x.WhichOneof("content") == "seed" and len(x.seed) == 32 for x in others)
        assert last.WhichOneof("content") == "data" and len(last.data) == 8 * 6
        assert last.data != ENCODED.numpy().tobytes()
    seeds = [x.seed for party in worlds.parties[:-1] for request in party.inferences for x in request.inputs]
    assert len(set(seeds)) == len(seeds)
    assert len({request.request_id for request in worlds.parties[0].inferences}) == 2


def test_several_inputs_and_outputs(world: FakeCluster) -> None:
    specs = [spec("a", -1, 3), spec("b", -1, 2, frac_bits=8)]
    world.deploy(info("pair", specs, [spec("p", -1, 2, frac_bits=8), spec("q", -1, 3)]))
    world.function = lambda inputs: inputs[::-1]
    b = np.array([[1.0, 2.0], [3.0, 4.0]])
    with client_of(world) as client:
        p, q = client.infer("pair", X.numpy(), b)
    assert isinstance(p, np.ndarray) and p.dtype == np.float32 and np.array_equal(p, b)
    assert np.allclose(q, X, atol=2**-16)


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int32, torch.int64, torch.bool],
)
def test_torch_in_torch_out(world: FakeCluster, dtype: torch.dtype) -> None:
    world.deploy(SAME)
    x = torch.tensor([[0, 1, 1]]).to(dtype)
    with client_of(world) as client:
        y = client.infer("same", x)
    assert isinstance(y, torch.Tensor) and y.dtype == torch.float32 and torch.equal(y, x.float())


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "u1", "i2", "u4", "i8", "u8", "?"])
def test_numpy_in_numpy_out(world: FakeCluster, dtype: str) -> None:
    world.deploy(SAME)
    x = np.array([[0, 1, 1], [1, 0, 0]]).astype(dtype)
    with client_of(world) as client:
        y = client.infer("same", x.T[::1].T)
    assert isinstance(y, np.ndarray) and y.dtype == np.float32 and np.array_equal(y, x)


def test_an_input_that_needs_grad_or_is_not_contiguous(world: FakeCluster) -> None:
    world.deploy(SAME)
    x = X.t().contiguous().t().requires_grad_()
    with client_of(world) as client:
        y = client.infer("same", x)
    assert not y.requires_grad and torch.allclose(y, X, atol=2**-16)


def test_an_index_comes_back_as_an_integer(world: FakeCluster) -> None:
    world.deploy(info("pick", [spec("x", -1, 3)], [spec("i", -1, frac_bits=0)], reveal="argmax"))
    world.function = lambda inputs: [inputs[0].argmax(-1)]
    with client_of(world) as client:
        picked = client.infer("pick", X)
    assert picked.dtype == torch.int64 and picked.tolist() == [0, 0]


def test_an_output_in_a_smaller_ring_keeps_its_sign(world: FakeCluster) -> None:
    world.deploy(info("small", [spec("x", 3)], [spec("y", 3, ring_bits=32)]))
    x = torch.tensor([-2.5, 0.0, 3.0])
    with client_of(world) as client:
        assert torch.equal(client.infer("small", x), x)


def test_the_cost_is_that_of_the_slowest_party_and_of_the_whole_dealer(world: FakeCluster) -> None:
    world.deploy(SAME)
    with client_of(world) as client:
        assert client.last_cost is None
        client.infer("same", X)
        phase = {"seconds": 1.5, "rounds": 8, "bytes_sent_per_party": 101}
        assert client.last_cost == {"online": phase, "offline": {**phase, "bytes_sent_by_dealer": 1000}}


def test_a_large_batch_is_sent_in_parts(world: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    world.deploy(SAME)
    monkeypatch.setattr(inputs, "MAX_REQUEST_BYTES", 8 * 3 * 4)
    x = torch.arange(30.0).reshape(10, 3)
    receipts: list[Receipt] = []
    with client_of(world) as client:
        assert torch.equal(client.infer("same", x, receipts=receipts), x)
        assert client.last_cost is not None and client.last_cost["online"]["rounds"] == 24
        assert client.last_receipt is receipts[-1]
    # each request has its own
    assert [r.id for r in receipts] == [r.request_id.hex() for r in world.parties[0].inferences]
    assert [r.inputs[0].shape[0] for r in world.parties[0].inferences] == [4, 4, 2]
    assert len({r.request_id for r in world.parties[0].inferences}) == 3


def test_what_cannot_be_cut_is_refused(world: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed, whole = spec("x", 4, 3), info("whole", [spec("x", -1, 3)], [spec("y", 3)])
    world.deploy(SAME, info("fixed", [fixed], [fixed]), whole)
    monkeypatch.setattr(inputs, "MAX_REQUEST_BYTES", 23)
    with client_of(world) as client:
        for name, x in [("same", X), ("fixed", torch.zeros(4, 3)), ("whole", X)]:
            with pytest.raises(InputError, match="MiB"):
                client.infer(name, x)
    assert not world.parties[0].inferences


# --- what is refused before anything is sent -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (torch.zeros(3), ShapeError),  # no batch: not guessed
        (torch.zeros(2, 4), ShapeError),
        (torch.zeros(1, 2, 3), ShapeError),
        (torch.zeros(0, 3), ShapeError),
        (np.zeros((0, 3)), ShapeError),
        (torch.zeros(()), ShapeError),
        (torch.zeros(2, 3, dtype=torch.complex64), DtypeError),
        (torch.zeros(2, 3).to_sparse(), DtypeError),
        (torch.zeros(2, 3, device="meta"), DtypeError),
        (np.zeros((2, 3), dtype=complex), DtypeError),
        (np.array([["a", "b", "c"]]), DtypeError),
        (np.array([[None, 1, 2]]), DtypeError),
        ([[1.0, 2.0, 3.0]], DtypeError),
        (torch.tensor([[0.0, float("nan"), 0.0]]), RangeError),
        (np.array([[0.0, np.inf, 0.0]]), RangeError),
        (torch.full((1, 3), 2.0**31), RangeError),
        (np.full((1, 3), 2**62), RangeError),
        (torch.full((1, 3), 100.0), RangeError),  # beyond the model's own limit
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_bad_input_never_leaves(world: FakeCluster, bad: Any, error: type[MpcInferError]) -> None:
    world.deploy(info("strict", [spec("x", -1, 3, limit=100.0)], [spec("y", -1, 3)]))
    with client_of(world) as client, pytest.raises(error, match="'x'"):
        client.infer("strict", bad)
    assert not any(party.inferences for party in world.parties)


def test_the_error_names_the_models_limit(world: FakeCluster) -> None:
    world.deploy(info("strict", [spec("x", -1, 3, limit=64.0)], [spec("y", -1, 3)]))
    with client_of(world) as client:
        for x in (64.0, -64.0, 64 - 2.0**-18, 2.0**29):  # the third is rounded to the limit
            with pytest.raises(RangeError, match="input 'x' contains numbers of absolute value 64 or more"):
                client.infer("strict", torch.full((1, 3), x, dtype=torch.float64))
    assert not any(party.inferences for party in world.parties)


def test_an_error_does_not_show_the_input(world: FakeCluster) -> None:
    world.deploy(SAME)
    with client_of(world) as client, pytest.raises(RangeError) as caught:
        client.infer("same", torch.full((1, 3), 1234567890123.0))
    assert "12345" not in str(caught.value)


def test_the_number_of_inputs_and_their_batches_must_fit(world: FakeCluster) -> None:
    world.deploy(info("pair", [spec("a", -1, 3), spec("b", -1, 3)], [spec("y", -1, 3)]))
    with client_of(world) as client:
        with pytest.raises(InputError, match="takes 2 inputs"):
            client.infer("pair", X)
        with pytest.raises(ShapeError, match="different batch sizes"):
            client.infer("pair", X, X[:1])


# --- which model -----------------------------------------------------------------------------------------------------


def test_unknown_models_and_versions(world: FakeCluster) -> None:
    world.deploy(SAME)
    with client_of(world) as client:
        with pytest.raises(NotFoundError, match="no model 'other'"):
            client.infer("other", X)
        with pytest.raises(NotFoundError, match="no version 7, only 1"):
            client.infer("same", X, version=7)


def test_the_newest_version_is_taken_also_when_it_came_later(world: FakeCluster) -> None:
    world.deploy(SAME)
    newer = info("same", [spec("x", -1, 2)], [spec("y", -1, 2)], version=2)
    with client_of(world) as client:
        client.infer("same", X)
        world.deploy(SAME, newer)
        with pytest.raises(ShapeError):
            client.infer("same", X)
        client.infer("same", X[:, :2])
        client.infer("same", X, version=1)
    assert [r.version for r in world.parties[0].inferences] == [1, 2, 1]


def test_a_version_deployed_anew_is_looked_up_again(world: FakeCluster) -> None:
    world.deploy(SAME)
    again = info("same", [spec("x", -1, 2)], [spec("y", -1, 2)], deployment_id=b"\7" * 32)

    def missing_once(method: str) -> None:
        if method == "Infer" and len(world.parties[0].inferences) == 2:
            raise NotFoundError("no such version")

    with client_of(world) as client:
        client.infer("same", X, version=1)
        world.deploy(again)
        world.parties[0].before = missing_once
        with pytest.raises(ShapeError, match=r"takes \[batch, 2\]"):
            client.infer("same", X, version=1)
        assert client.infer("same", X[:, :2], version=1).shape == (2, 2)


def test_parties_that_hold_different_models(world: FakeCluster) -> None:
    world.deploy(SAME)
    world.parties[1].models = [info("same", SAME.inputs, SAME.outputs, deployment_id=b"\7" * 32), info("more", [], [])]
    with client_of(world) as client:
        with pytest.raises(AgreementError, match="'same' version 1 is not the same"):
            client.infer("same", X)
        with pytest.raises(AgreementError, match="'more' version 1 is missing at party/0"):
            client.models()


def test_one_damaged_model_does_not_stop_the_others(world: FakeCluster) -> None:
    world.deploy(SAME)
    world.parties[1].models.append(info("more", [], []))
    with client_of(world) as client:
        assert client.infer("same", X).shape == X.shape


def test_models_and_status(world: FakeCluster) -> None:
    world.deploy(SAME, info("other", [], []))
    with client_of(world) as client:
        assert [model.key for model in client.models()] == [("other", "owner/o", 1), ("same", "owner/o", 1)]
        assert client.models()[1].inputs[0].shape == (-1, 3)
        world.stop_party(1)
        assert [status.state for status in client.status()] == ["ready", "unreachable"]


# --- failures --------------------------------------------------------------------------------------------------------


def failing(world: FakeCluster, index: int, *errors: Exception | None) -> None:
    """Make a party fail its inferences with these errors, one after the other."""
    pending = list(errors)

    def before(method: str) -> None:
        error = pending.pop(0) if method == "Infer" and pending else None
        if error is not None:
            raise error

    world.parties[index].before = before


def test_an_aborted_request_is_shared_afresh_and_sent_once_more(world: FakeCluster) -> None:
    world.deploy(SAME)
    failing(world, 0, AbortedError("lost party 1"))
    failing(world, 1, AbortedError("lost party 0"))
    with client_of(world) as client:
        assert torch.allclose(client.infer("same", X), X, atol=2**-16)
    first, second = world.parties[0].inferences
    assert first.request_id != second.request_id and first.inputs[0].seed != second.inputs[0].seed
    assert torch.equal(world.secrets(1)[0], ENCODED)


def test_it_is_sent_only_once_more(world: FakeCluster) -> None:
    world.deploy(SAME)
    failing(world, 0, *[AbortedError("lost party 1")] * 3)
    failing(world, 1, *[AbortedError("lost party 0")] * 3)
    with client_of(world) as client, pytest.raises(AbortedError, match="lost party"):
        client.infer("same", X)
    assert len(world.parties[0].inferences) == 2


def test_it_is_not_sent_again_when_no_time_is_left(world: FakeCluster) -> None:
    world.deploy(SAME)
    failing(world, 0, AbortedError("lost party 1"))
    failing(world, 1, AbortedError("lost party 0"))
    world.parties[1].status["state"] = "connecting"
    started = time.monotonic()
    with client_of(world) as client, pytest.raises(AbortedError, match="lost party.*party/1 is connecting"):
        client.infer("same", X, timeout=1.0)
    assert time.monotonic() - started < 3 and len(world.parties[0].inferences) == 1


@pytest.mark.parametrize(
    "error", [BusyError("full"), UnavailableError("dealer down"), ShapeError("no"), ProtocolError("no")]
)
def test_other_errors_come_back_as_they_are(world: FakeCluster, error: MpcInferError) -> None:
    world.deploy(SAME)
    failing(world, 1, error, error)
    with client_of(world) as client, pytest.raises(type(error), match=f"party/1.*{error}"):
        client.infer("same", X)
    assert len(world.parties[1].inferences) == 1


def test_time_is_limited(world: FakeCluster) -> None:
    world.deploy(SAME)
    world.parties[0].before = lambda method: time.sleep(3) if method == "Infer" else None
    started = time.monotonic()
    with client_of(world) as client, pytest.raises(DeadlineError, match="longer than"):
        client.infer("same", X, timeout=0.5)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "change",
    [
        lambda outputs: [],
        lambda outputs: [type(outputs[0])(shape=[2, 2], frac_bits=16, data=bytes(32))],
        lambda outputs: [type(outputs[0])(shape=[2, 3], frac_bits=15, data=bytes(48))],
        lambda outputs: [type(outputs[0])(shape=[2, 3], frac_bits=16, data=bytes(47))],
        lambda outputs: [type(outputs[0])(shape=[2, 3], frac_bits=16, seed=bytes(32))],
        lambda outputs: [type(outputs[0])(shape=[2, 3], frac_bits=16, ring_bits=32, data=bytes(48))],
    ],
    ids=["none", "shape", "scale", "short data", "a seed", "ring"],
)
def test_a_wrong_answer_is_noticed(world: FakeCluster, change: Callable[[list[Any]], list[Any]]) -> None:
    world.deploy(SAME)
    world.tamper = lambda index, outputs: change(outputs) if index == 1 else outputs
    with client_of(world) as client, pytest.raises(ProtocolError, match="party/1"):
        client.infer("same", X)


def test_parties_that_are_not_ready_take_no_longer_than_allowed(world: FakeCluster) -> None:
    world.parties[1].before = lambda method: time.sleep(3) if method == "ListModels" else None
    started = time.monotonic()
    with client_of(world) as client, pytest.raises(DeadlineError, match="ListModels took longer than"):
        client.infer("same", X, timeout=0.5)
    assert time.monotonic() - started < 2


def test_a_closed_client_says_so(world: FakeCluster) -> None:
    client = client_of(world)
    client.close()
    with pytest.raises(UnavailableError, match="closed"):
        client.infer("same", X)


# --- asyncio ---------------------------------------------------------------------------------------------------------


def test_calls_of_the_async_client_run_at_the_same_time(world: FakeCluster) -> None:
    world.deploy(SAME)
    together = threading.Barrier(6)
    world.parties[0].before = lambda method: together.wait(10) and None if method == "Infer" else None

    async def main() -> list[torch.Tensor]:
        async with await AsyncClient.connect(world.cluster, world.issue("client/a")) as client:
            answers = await asyncio.gather(*(client.infer("same", X + i) for i in range(6)))
            assert client.last_cost is not None
            assert len(await client.models()) == 1 and len(await client.status()) == 2
            with pytest.raises(ShapeError):
                await client.infer("same", X[0])
            return answers

    for i, answer in enumerate(asyncio.run(main())):
        assert torch.allclose(answer, X + i, atol=2**-15)


def test_threads_that_share_a_client_have_their_own_receipts(world: FakeCluster) -> None:
    """`last_receipt` is of the answer that came last, whoever asked: here always the other's."""
    world.deploy(SAME)
    found: list[list[Receipt]] = [[], []]
    with client_of(world) as client:

        async def main() -> None:
            together = threading.Barrier(2)
            world.parties[0].before = lambda method: together.wait(10) and None if method == "Infer" else None
            await asyncio.gather(
                *(asyncio.to_thread(client.infer, "same", X[: i + 1], receipts=found[i]) for i in range(2))
            )

        asyncio.run(main())
    by_rows = {r.inputs[0].shape[0]: r.request_id.hex() for r in world.parties[0].inferences}
    assert [[r.id for r in each] for each in found] == [[by_rows[1]], [by_rows[2]]]


def test_threads_may_share_a_client(world: FakeCluster) -> None:
    world.deploy(SAME)
    results: list[Any] = []
    with closing(Connection(world.cluster, world.issue("client/a"))) as connection:
        client = Client(connection)
        threads = [threading.Thread(target=lambda: results.append(client.infer("same", X))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 4
