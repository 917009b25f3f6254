"""Which models are served: those that all parties hold whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcinfer.errors import InputError, NotFoundError, StoreError
from mpcinfer.graph.sizes import Size
from mpcinfer.party.catalogue import Catalogue, Model
from mpcinfer.party.grants import Grants
from mpcinfer.party.record import WeightEntry
from mpcinfer.party.store import Store
from mpcinfer.party.uploads import check_manifest
from mpcinfer.ring.domain import Z64
from tests.inprocess import mlp
from tests.members import Members

PROGRAM = mlp()
KEY = bytes(range(32))


@cache
def members() -> Members:
    return Members()


def catalogue_of(store: Store) -> Catalogue:
    return Catalogue(store, Grants(store.directory / "grants", members().cluster))


class Holder:
    """One party's store and catalogue."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = Store(directory, KEY)
        self.catalogue = catalogue_of(self.store)

    def reopen(self) -> None:
        self.store.close()
        self.store = Store(self.directory, KEY)
        self.catalogue = catalogue_of(self.store)

    def commit(self, number: int, name: str = "m", version: int = 1, owner: str = "owner/a", **other: Any) -> Model:
        entries = [WeightEntry(p.name, p.shape, p.frac_bits) for p in PROGRAM.parameters]
        data = b"".join(bytes(8 * e.size // 8) for e in entries)
        metadata = {"name": name, "owner": owner, "program": PROGRAM.to_bytes().decode(), "created": 1.0, **other}
        staged = self.store.stage(b"r" * 16, metadata, entries)
        staged.write(data)
        staged.finish(len(data), hashlib.sha256(data).digest())
        return self.catalogue.commit(b"r" * 16, identifier(number), version)

    def damage(self, number: int) -> None:
        (path,) = (self.directory / "deployments").glob(f"{identifier(number).hex()}.*")
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        self.reopen()

    def files(self) -> list[str]:
        return sorted(p.name for p in (self.directory / "deployments").iterdir())


def identifier(number: int) -> bytes:
    return bytes([number]) * 32


def agree(*holders: Holder) -> None:
    inventories = {i: h.catalogue.inventory() for i, h in enumerate(holders)}
    for i, holder in enumerate(holders):
        holder.catalogue.agree(i, {peer: inv for peer, inv in inventories.items() if peer != i})


def served(holder: Holder) -> list[tuple[str, int]]:
    return [(m.name, m.version) for m in holder.catalogue.models()]


@pytest.fixture
def two(tmp_path: Path) -> Iterator[list[Holder]]:
    holders = [Holder(tmp_path / str(i)) for i in range(2)]
    yield holders
    for holder in holders:
        holder.store.close()


def confirmed(holder: Holder, number: int, *args: Any, **kwargs: Any) -> None:
    holder.catalogue.confirm(holder.commit(number, *args, **kwargs))


def test_what_all_hold_is_served_and_the_newest_is_found(two: list[Holder]) -> None:
    for holder in two:
        confirmed(holder, 1)
        confirmed(holder, 2, version=2)
        confirmed(holder, 3, name="other")
    for _ in range(2):
        agree(*two)
        for holder in two:
            assert served(holder) == [("m", 1), ("m", 2), ("other", 1)]
            assert holder.catalogue.find("m", 0).id == identifier(2)
            assert holder.catalogue.find("m", 1).id == identifier(1)
            for name, version in [("x", 0), ("m", 3)]:
                with pytest.raises(NotFoundError, match="deployed: m, other"):
                    holder.catalogue.find(name, version)
            holder.reopen()


def test_a_pending_model_is_served_once_all_have_it(two: list[Holder]) -> None:
    for holder in two:
        holder.commit(1)
        assert served(holder) == []
        with pytest.raises(NotFoundError):
            holder.catalogue.find("m", 0)
    for holder in two:
        holder.reopen()  # both stopped before they could confirm
    agree(*two)
    assert [served(h) for h in two] == [[("m", 1)]] * 2
    assert [h.files() for h in two] == [[f"{identifier(1).hex()}.mpc"]] * 2


def test_a_pending_model_is_kept_if_another_party_has_confirmed_it(two: list[Holder]) -> None:
    two[0].commit(1)
    confirmed(two[1], 1)
    agree(*two)
    assert [served(h) for h in two] == [[("m", 1)]] * 2


def test_a_pending_model_that_not_all_have_is_removed(two: list[Holder]) -> None:
    two[0].commit(1)
    agree(*two)
    assert [served(h) for h in two] == [[], []] and two[0].files() == []
    assert two[0].catalogue.next_version("m", "owner/b") == 1


def test_a_confirmed_model_that_another_party_lost_is_kept_but_not_served(two: list[Holder]) -> None:
    confirmed(two[0], 1)
    agree(*two)
    for holder in two:
        assert served(holder) == []
        with pytest.raises(NotFoundError, match="party 1 does not hold it; remove it and deploy it again"):
            holder.catalogue.find("m", 0)
    assert len(two[0].files()) == 1
    # the older version that both hold is still served
    for holder in two:
        confirmed(holder, 2, name="m", version=2)
    agree(*two)
    assert [h.catalogue.find("m", 0).version for h in two] == [2, 2]


def test_a_damaged_copy_is_named_at_all_parties_and_the_rest_is_served(two: list[Holder]) -> None:
    for holder in two:
        confirmed(holder, 1)
        confirmed(holder, 2, name="other")
    two[1].damage(1)
    agree(*two)
    for holder in two:
        assert served(holder) == [("other", 1)]
        with pytest.raises(StoreError, match="copy of party 1 is damaged; remove it and deploy it again"):
            holder.catalogue.find("m", 0)
    for holder in two:
        holder.catalogue.remove(identifier(1))
        assert len(holder.files()) == 1
        holder.reopen()
    agree(*two)
    for holder in two:
        with pytest.raises(NotFoundError):
            holder.catalogue.find("m", 0)


def test_a_damaged_pending_copy_is_not_mistaken_for_a_missing_one(two: list[Holder]) -> None:
    for holder in two:
        holder.commit(1)
    two[1].damage(1)
    agree(*two)
    assert [len(h.files()) for h in two] == [1, 1]
    assert [served(h) for h in two] == [[], []]


def test_a_program_this_version_does_not_know_does_not_stop_the_party(two: list[Holder]) -> None:
    for holder in two:
        confirmed(holder, 1)
        staged_metadata = {"name": "old", "owner": "owner/a", "program": "{}", "created": 1.0}
        staged = holder.store.stage(b"q" * 16, staged_metadata, [])
        staged.finish(0, hashlib.sha256().digest())
        holder.store.commit(b"q" * 16, identifier(9), 1)
        holder.reopen()
    agree(*two)
    assert [served(h) for h in two] == [[("m", 1)]] * 2
    two[0].catalogue.remove(identifier(9))
    assert len(two[0].files()) == 1


def test_versions_count_up_and_names_have_owners(two: list[Holder]) -> None:
    holder = two[0]
    assert holder.catalogue.next_version("m", "owner/a") == 1
    confirmed(holder, 1)
    holder.commit(2, version=2)
    assert holder.catalogue.next_version("m", "owner/a") == 3
    assert holder.catalogue.next_version("m", "owner/b") == 1
    assert holder.catalogue.matching("m", 0, "owner/a") == [identifier(1), identifier(2)]
    assert holder.catalogue.matching("m", 2, "owner/a") == [identifier(2)]
    assert holder.catalogue.matching("x", 0, "owner/a") == holder.catalogue.matching("m", 0, "owner/b") == []
    assert holder.catalogue.foreign(identifier(1), "owner/b")
    assert not holder.catalogue.foreign(identifier(1), "owner/a") and not holder.catalogue.foreign(identifier(7), "x")
    holder.catalogue.remove(identifier(7))  # none: fine


def test_shares_come_back_as_they_were_sent(tmp_path: Path) -> None:
    with Store(tmp_path / "s", KEY) as store:
        catalogue = catalogue_of(store)
        data = torch.arange(6, dtype=torch.int64).reshape(2, 3) - 3
        entries = [
            WeightEntry("a", (2, 3), 16),
            WeightEntry("seeded", (5,), 16, b"s" * 32),
            WeightEntry("empty", (0, 2), 16),
            WeightEntry("scalar", (), 16),
        ]
        metadata = {"name": "m", "owner": "o", "program": PROGRAM.to_bytes().decode(), "created": 1.0}
        raw = bytes(Z64.pack(data)) + bytes(Z64.pack(torch.tensor(7)))
        staged = store.stage(b"r" * 16, metadata, entries)
        staged.write(raw)
        staged.finish(len(raw), hashlib.sha256(raw).digest())
        shares = catalogue.load(model := catalogue.commit(b"r" * 16, identifier(1), 1))
        assert torch.equal(shares["a"].share, data) and shares["a"].frac_bits == 16
        assert shares["seeded"].shape == (5,) and shares["empty"].shape == (0, 2)
        assert int(shares["scalar"].share) == 7
        assert catalogue.load(model) is shares
        assert "Shared" not in repr(model)


def test_plans_are_traced_once_and_bounded(two: list[Holder]) -> None:
    model = two[0].commit(1)
    plan, digest = model.plan([(2, 4)], 2)
    assert model.plan([(2, 4)], 2)[0] is plan and digest == plan.digest()
    assert plan.deployment == identifier(1).hex() == model.mask_plan(2).deployment
    for batch in range(3, 70):
        model.plan([(batch, 4)], 2)
    assert len(model.plans) == 64


def test_a_manifest_must_be_the_program_s(two: list[Holder]) -> None:
    good = [WeightEntry(p.name, p.shape, p.frac_bits) for p in PROGRAM.parameters]
    check_manifest(PROGRAM, good)
    bad = WeightEntry(good[0].name, (9, 9), 16)
    for entries in ([], good[1:], [*good, good[0]], good[::-1], [bad, *good[1:]]):
        with pytest.raises(InputError):
            check_manifest(PROGRAM, entries)


@pytest.mark.parametrize(("name", "queries"), [("batch", 5), ("rows", 5), ("length", 1)])
def test_each_row_is_a_query_whether_or_not_others_influence_it(name: str, queries: int) -> None:
    program = replace(PROGRAM, sizes=(Size(name),))
    deployment: Any = None
    model = Model(deployment, program, "m", "owner/a", 1.0)
    width = program.inputs[0].shape[1]
    assert model.rows([(5, width)]) == queries
