"""The model owner's side against fake parties: which shares of the weights leave, and in which form."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from mpcinfer.client import owner as module
from mpcinfer.client.owner import ModelOwner
from mpcinfer.errors import (
    AgreementError,
    ConflictError,
    DeadlineError,
    InputError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
    UploadError,
)
from mpcinfer.graph.capture import Captured, capture
from mpcinfer.graph.program import Program
from mpcinfer.ring import prg
from mpcinfer.ring.domain import Z64
from tests.client.fakes import FakeCluster, info, total

MODEL = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
DEFAULTS = {"frac_bits": 16, "reveal": "logits", "k": 5, "public": (), "dynamic_shapes": None}
LARGE = nn.Sequential(nn.Linear(500, 600), nn.ReLU(), nn.Linear(600, 2)).eval()


_captured: dict[object, Captured] = {}


def capture_once(model: Any, examples: Any, **options: Any) -> Captured:
    """`capture`, which takes its time, once for each model and options."""
    key = id(model) if isinstance(model, nn.Module) else type(model), str(options)
    if key not in _captured:
        _captured[key] = capture(model, examples, **options)
    return Captured(_captured[key].program, dict(_captured[key].weights))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "capture", capture_once)


@pytest.fixture
def owner(world: FakeCluster) -> Iterator[ModelOwner]:
    with ModelOwner.connect(world.cluster, world.issue("owner/o")) as connected:
        yield connected


def weights(world: FakeCluster, upload: int = -1) -> dict[str, torch.Tensor]:
    """The encoded weights, added up from what each party was sent."""
    shares: dict[str, list[torch.Tensor]] = {}
    for party in world.parties:
        header, chunks = party.uploads[upload]
        data, position = b"".join(chunks), 0
        for entry in header.weights:
            shape = tuple(entry.shape)
            if entry.seed:
                share = prg.expand(entry.seed, shape, Z64)
            else:
                size = 8 * share_size(shape)
                share = Z64.unpack(data[position : position + size], shape)
                position += size
            shares.setdefault(entry.name, []).append(share)
        assert position == len(data)
    return {name: total(parts) for name, parts in shares.items()}


def hang(world: FakeCluster, method: str) -> None:
    """As a party's behaviour: keep a deploy waiting until the caller gives up."""
    if method == "Deploy":
        world.parties[0].cancelled.wait(5)


def share_size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def test_shares_of_the_weights_leave_and_nothing_else(worlds: FakeCluster) -> None:
    expected = capture_once(MODEL, (torch.zeros(1, 6),), **DEFAULTS)
    with ModelOwner.connect(worlds.cluster, worlds.issue("owner/o")) as owner:
        for _ in range(2):
            deployed = owner.deploy(MODEL, torch.zeros(1, 6), name="mlp")
    assert (deployed.name, deployed.version, deployed.parameters) == ("mlp", 1, expected.program.size)
    assert deployed.deployment_id == "01" * 32
    for upload in range(2):
        found = weights(worlds, upload)
        assert found.keys() == expected.weights.keys()
        assert all(torch.equal(found[name], expected.weights[name]) for name in found)
        headers = [party.uploads[upload][0] for party in worlds.parties]
        assert len({header.request_id for header in headers}) == 1 and len(headers[0].request_id) == 16
        assert all(Program.from_bytes(header.program) == expected.program for header in headers)
        for header, (_, chunks) in zip(headers, [party.uploads[upload] for party in worlds.parties], strict=True):
            data = b"".join(chunks)
            assert (header.size, header.digest) == (len(data), hashlib.sha256(data).digest())
            if header is not headers[-1]:
                assert not data and all(len(entry.seed) == 32 for entry in header.weights)
        assert headers[-1].size == 8 * expected.program.size and not any(entry.seed for entry in headers[-1].weights)
    seeds = [w.seed for party in worlds.parties[:-1] for header, _ in party.uploads for w in header.weights]
    assert len(set(seeds)) == len(seeds)
    first, second = (b"".join(chunks) for _, chunks in worlds.parties[-1].uploads)
    assert first != second


def test_a_large_share_goes_in_chunks(world: FakeCluster, owner: ModelOwner) -> None:
    seen: list[tuple[int, int]] = []
    owner.deploy(LARGE, torch.zeros(2, 500), name="large", progress=lambda done, all_: seen.append((done, all_)))
    _, chunks = world.parties[1].uploads[0]
    assert sum(map(len, chunks)) == 8 * (500 * 600 + 600 + 600 * 2 + 2)
    assert max(map(len, chunks)) == 2**20
    done, everything = zip(*seen, strict=True)
    assert list(done) == sorted(done) and (done[0], done[-1]) == (0, everything[0]) and len(set(everything)) == 1
    expected = capture_once(LARGE, (torch.zeros(2, 500),), **DEFAULTS).weights
    assert all(torch.equal(found, expected[name]) for name, found in weights(world).items())


def test_options_reach_the_program(world: FakeCluster, owner: ModelOwner) -> None:
    deployed = owner.deploy(MODEL, [torch.zeros(1, 6)], name="top", frac_bits=12, reveal="top-k", k=2)
    program = Program.from_bytes(world.parties[0].uploads[0][0].program)
    assert (program.frac_bits, program.reveal, deployed.reveal) == (12, "top-k", "top-k")
    assert {entry.frac_bits for entry in world.parties[0].uploads[0][0].weights} == {12}


def test_an_exported_program_has_its_own_examples(world: FakeCluster, owner: ModelOwner) -> None:
    owner.deploy(torch.export.export(MODEL, (torch.zeros(1, 6),)), name="exported")
    assert len(weights(world)) == 4


@pytest.mark.parametrize(
    ("model", "error"),
    [(nn.Sequential(nn.Linear(6, 4), nn.RReLU()).eval(), UnsupportedError), (nn.Linear(6, 4).train(), InputError)],
)
def test_a_model_that_cannot_be_shared_never_leaves(
    world: FakeCluster, owner: ModelOwner, model: nn.Module, error: type[Exception]
) -> None:
    with pytest.raises(error):
        owner.deploy(model, torch.zeros(1, 6), name="m")
    assert not any(party.uploads for party in world.parties)


def test_a_refusal_ends_the_upload(world: FakeCluster, owner: ModelOwner) -> None:
    def refuse(method: str) -> None:
        if method == "Deploy":
            raise ConflictError("the model is being changed")

    world.parties[0].before = refuse
    with pytest.raises(ConflictError, match="party/0 at .*being changed"):
        owner.deploy(MODEL, torch.zeros(1, 6), name="m")


def test_a_party_that_fails_during_the_upload(world: FakeCluster, owner: ModelOwner) -> None:
    def fail(method: str) -> None:
        if method == "chunk":
            raise UploadError("damaged")

    world.parties[1].before = fail
    with pytest.raises(UploadError, match="party/1"):
        owner.deploy(LARGE, torch.zeros(2, 500), name="m")


def test_a_party_that_goes_away_during_the_upload(world: FakeCluster, owner: ModelOwner) -> None:
    def leave(method: str) -> None:
        if method == "chunk":
            threading.Thread(target=world.stop_party, args=(1,)).start()
            world.parties[1].cancelled.wait(10)

    world.parties[1].before = leave
    world.parties[0].before = lambda method: hang(world, method)
    with pytest.raises(UnavailableError, match="party/1"):
        owner.deploy(LARGE, torch.zeros(2, 500), name="m")


def test_a_deploy_takes_no_longer_than_allowed(world: FakeCluster, owner: ModelOwner) -> None:
    world.parties[0].before = lambda method: hang(world, method)
    with pytest.raises(DeadlineError):
        owner.deploy(MODEL, torch.zeros(1, 6), name="m", timeout=0.5)


def test_what_the_progress_callback_raises_is_raised(owner: ModelOwner) -> None:
    class Enough(Exception):
        pass

    def progress(done: int, everything: int) -> None:
        if done:
            raise Enough

    with pytest.raises(Enough):
        owner.deploy(MODEL, torch.zeros(1, 6), name="m", progress=progress)


def test_parties_that_disagree_about_what_was_deployed(world: FakeCluster, owner: ModelOwner) -> None:
    world.version_at = lambda index: 1 + index
    with pytest.raises(AgreementError, match="disagree"):
        owner.deploy(MODEL, torch.zeros(1, 6), name="m")


def test_removing(world: FakeCluster, owner: ModelOwner) -> None:
    assert owner.remove("m", 3) == 2
    first, second = (party.removals[0] for party in world.parties)
    assert first == second and (first.name, first.version, len(first.request_id)) == ("m", 3, 16)

    def refuse(method: str) -> None:
        raise NotFoundError("no such model")

    world.parties[0].before = world.parties[1].before = refuse
    with pytest.raises(NotFoundError, match="no such model"):
        owner.remove("m")


def test_a_removal_may_wait_for_its_turn_as_long_as_it_is_told(world: FakeCluster, owner: ModelOwner) -> None:
    world.parties[0].before = lambda _: time.sleep(1)
    with pytest.raises(DeadlineError, match="allow it more time"):
        owner.remove("m", timeout=0.5)
    assert owner.remove("m", timeout=30) == 2


def test_all_parties_must_confirm_a_removal(world: FakeCluster, owner: ModelOwner) -> None:
    world.removed_at = lambda index: 2 - index
    with pytest.raises(AgreementError, match="party 0 2, party 1 1.*try again"):
        owner.remove("m")


def test_listing(world: FakeCluster, owner: ModelOwner) -> None:
    world.deploy(info("m", [], [], version=2), info("m", [], []))
    assert [model.key for model in owner.models()] == [("m", "owner/o", 1), ("m", "owner/o", 2)]
