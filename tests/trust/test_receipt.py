"""What all parties sign together about one answer, and what becomes of it when anything is changed."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpcinfer.canonical import canonical
from mpcinfer.config import Cluster, Endpoint
from mpcinfer.errors import IdentityError, MpcInferError, SignatureError, TamperingError
from mpcinfer.trust import receipt as module
from mpcinfer.trust.commitment import (
    answers_commitment,
    check_salt,
    commitment,
    salt_commitment,
    upload_commitment,
)
from mpcinfer.trust.facts import Facts, digest
from mpcinfer.trust.pin import Member, Pin
from mpcinfer.trust.receipt import SHARED, Receipt
from mpcinfer.trust.signing import Signed, Signer, Statement
from mpcinfer.wire import identity
from mpcinfer.wire.identity import Identity
from mpcinfer.wire.v1 import tensor_pb2

INPUTS = [[tensor_pb2.Tensor(shape=[2], frac_bits=16, seed=bytes([i]) * 32)] for i in range(2)]
OUTPUTS = [[[tensor_pb2.Tensor(shape=[1], frac_bits=16, data=bytes([i, k] * 4))] for k in range(2)] for i in range(2)]
SALTS = [bytes([7 + i]) * 32 for i in range(2)]


class World:
    """Two parties, and what they sign."""

    def __init__(self) -> None:
        self.ca_key, self.ca = identity.create_ca("local")
        self.members = [self.issue(f"party/{i}") for i in range(2)]
        *parties, dealer = [
            Endpoint(m.role, f"localhost:{i + 1}", identity.key_pin(m.cert_pem))
            for i, m in enumerate([*self.members, self.issue("dealer")])
        ]
        self.cluster = Cluster("local", self.ca, tuple(parties), dealer)

    def issue(self, role: str) -> Identity:
        key, csr = identity.create_request("local", role)
        return Identity(role, "local", key, identity.sign_request(self.ca_key, self.ca, csr, role=role))

    def content(self, index: int, **changes: Any) -> dict[str, Any]:
        answered = b""
        for outputs in OUTPUTS[index]:
            answered = answers_commitment(SALTS[index], answered, outputs)
        shared = dict.fromkeys(SHARED, "x") | {"format": 1, "parties": 2, "request": "ab" * 16, "answers": 2}
        own = {
            "party": index,
            "certificate": hashlib.sha256(self.members[index].cert_pem).hexdigest(),
            "salt": salt_commitment(SALTS[index]).hex(),
            "request_shares": upload_commitment(SALTS[index], INPUTS[index]).hex(),
            "answer_shares": answered.hex(),
            "bytes_sent": 17,
            "log": [3, "0" * 64],
            "time": 1.5,
        }
        return shared | own | changes

    def sign(self, index: int, purpose: str = "receipt", **changes: Any) -> Signed:
        return Signer(self.members[index]).sign(purpose, self.content(index, **changes))

    def receipt(self, *statements: Signed) -> Receipt:
        return Receipt.verify(statements or [self.sign(0), self.sign(1)], self.cluster, SALTS)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def test_what_was_sent_and_answered_is_what_was_signed(world: World) -> None:
    found = world.receipt()
    assert found.id == "ab" * 16 and found.line(1).sequence == 3
    for i in range(2):
        found.check_request(i, INPUTS[i])
        found.check_answers(i, OUTPUTS[i])
        for other in (INPUTS[1 - i], [], [*INPUTS[i], *INPUTS[i]]):
            with pytest.raises(TamperingError, match=f"party {i} signed for other shares of the request"):
                found.check_request(i, other)
        for answers in (OUTPUTS[1 - i], OUTPUTS[i][:1], OUTPUTS[i][::-1], [*OUTPUTS[i], []]):
            with pytest.raises(TamperingError, match=f"party {i} signed for other shares of the answer"):
                found.check_answers(i, answers)
    assert all(salt.hex() not in repr(found) + str(found.to_json()) for salt in SALTS)


@pytest.mark.parametrize("name", sorted(SHARED - {"format", "parties"}))
def test_all_parties_must_say_the_same(world: World, name: str) -> None:
    with pytest.raises(TamperingError, match=f"different receipts: {name} differ"):
        world.receipt(world.sign(0), world.sign(1, **{name: "y"}))


def test_what_is_no_receipt_of_this_party(world: World) -> None:
    mine, other = world.sign(0), world.sign(1)
    stranger = World()
    cases: list[list[Signed]] = [
        [mine],
        [other, mine],
        [mine, mine],
        [mine, other, other],
        [mine, world.sign(1, "grant")],
        [mine, world.sign(1, party=0)],
        [mine, world.sign(1, format=2)],
        [mine, world.sign(1, parties=3)],
        [mine, world.sign(1, more="x")],
        [mine, world.sign(1, certificate="0" * 64)],
        [mine, stranger.sign(1)],
    ]
    for statements in cases:
        with pytest.raises(MpcInferError) as caught:
            world.receipt(*statements)
        assert isinstance(caught.value, SignatureError) or "pin" in str(caught.value) or "CA" in str(caught.value)
    with pytest.raises(SignatureError, match="the salt of party 1"):
        Receipt.verify([mine, other], world.cluster, [SALTS[0], SALTS[0]])


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")  # of changed certificates
@pytest.mark.parametrize("salts", [pytest.param(False, marks=pytest.mark.slow), True])
def test_every_changed_byte_of_a_file_is_found(world: World, tmp_path: Path, salts: bool) -> None:
    path = tmp_path / "receipt.json"
    world.receipt().save(path, salts=salts)
    data = path.read_bytes()
    loaded = Receipt.load(path, world.cluster)
    assert loaded.shared == world.receipt().shared and bool(loaded.salts) is salts
    survived = []
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ (1, 2, 4, 8, 16, 32, 64)[at % 7]]) + data[at + 1 :])
        try:
            Receipt.load(path, world.cluster)
        except MpcInferError:
            continue
        survived.append(at)
    assert not survived


def test_it_is_the_signature_that_finds_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    signed = world.sign(1)
    forged = Signed(**{**vars(signed), "payload": signed.payload.replace(b'"bytes_sent":17', b'"bytes_sent":18')})
    with pytest.raises(SignatureError, match="does not hold"):
        world.receipt(world.sign(0), forged)

    def unchecked(given: Signed, cluster: Cluster, purpose: str, *, past: bool) -> Statement:
        content = json.loads(given.payload)
        return Statement(f"party/{content['party']}", "", given.key, content)

    monkeypatch.setattr(module, "open_signed", unchecked)
    assert world.receipt(world.sign(0), forged).own[1]["bytes_sent"] == 18


def test_without_its_salts_nobody_can_say_which_shares_it_is_about(world: World, tmp_path: Path) -> None:
    world.receipt().save(tmp_path / "receipt.json")
    with pytest.raises(SignatureError, match="saved without its salts"):
        Receipt.load(tmp_path / "receipt.json", world.cluster).check_request(0, INPUTS[0])


@pytest.mark.parametrize("there", [False, True])
def test_others_on_the_machine_cannot_read_it(world: World, tmp_path: Path, there: bool) -> None:
    """Its salts would let them test what the shares were."""
    path = tmp_path / "receipt.json"
    if there:
        path.touch(0o644)
    world.receipt().save(path, salts=True)
    assert path.stat().st_mode & 0o777 == 0o600


# --- keys that were replaced -----------------------------------------------------------------------------------------


def pin_of(world: World) -> Pin:
    """The parties of a world as a client pins them."""
    signers = map(Signer, world.members)
    return Pin(tuple(Member(Facts.of(s, world.cluster, operator="", evidence="none"), {}) for s in signers))


def manifest(pin: Pin) -> str:
    return digest([member.facts for member in pin.members]).hex()


class Replaced:
    """A receipt in a file, and the cluster after its parties, and the CA, have other keys: they were pinned again."""

    def __init__(self, directory: Path) -> None:
        self.old, self.new = World(), World()
        self.pin = pin_of(self.new).after(pin_of(self.old), now=100.0)
        self.path = directory / "receipt.json"

    def write(self, *by: World, **changes: Any) -> None:
        """A receipt that party i of `by[i]` has signed, of the old manifest unless it is said otherwise."""
        said = {"manifest": manifest(pin_of(self.old)), "time": 50.0} | changes
        statements = [world.sign(i, **said) for i, world in enumerate(by)]
        file = {"format": 1, "statements": [s.to_json() for s in statements], "salts": [s.hex() for s in SALTS]}
        self.path.write_bytes(canonical(file) + b"\n")

    def load(self, pin: Pin | None) -> Receipt:
        return Receipt.load(self.path, self.new.cluster, pin)


@pytest.fixture(scope="module")
def replaced(tmp_path_factory: pytest.TempPathFactory) -> Replaced:
    return Replaced(tmp_path_factory.mktemp("replaced"))


def test_a_receipt_is_checked_with_the_keys_that_were_pinned_when_it_was_signed(replaced: Replaced) -> None:
    replaced.write(replaced.old, replaced.old)
    found = replaced.load(replaced.pin)
    found.check_request(0, INPUTS[0])
    for forgetful in (None, pin_of(replaced.new), pin_of(World()).after(pin_of(World()), 100.0)):
        with pytest.raises(IdentityError, match="CA"):
            replaced.load(forgetful)
    # those of today, whether they are pinned or only in the cluster file
    for own in (manifest(pin_of(replaced.new)), "00"):
        replaced.write(replaced.new, replaced.new, manifest=own, time=1e12)
        assert replaced.load(replaced.pin).own[1]["time"] == 1e12


def test_keys_that_nobody_has_pinned_sign_no_receipt_of_the_past(replaced: Replaced) -> None:
    stranger, same_ca = World(), World()
    same_ca.ca_key, same_ca.ca = replaced.old.ca_key, replaced.old.ca
    same_ca.members = [same_ca.issue(f"party/{i}") for i in range(2)]
    for forgers in (
        (stranger, stranger),
        (replaced.old, same_ca),  # the CA has given out another key for this role
        (replaced.old, replaced.new),  # today's key, which did not exist then
        (replaced.new, replaced.new),
    ):
        replaced.write(*forgers)
        with pytest.raises(SignatureError, match="another key than the one pinned for it then"):
            replaced.load(replaced.pin)
    replaced.write(replaced.old, replaced.old, time=100.5)
    with pytest.raises(SignatureError, match="with a key that was replaced before"):
        replaced.load(replaced.pin)
    replaced.write(replaced.old, replaced.old, manifest="00")  # of parties that were never pinned
    with pytest.raises(IdentityError, match="CA"):
        replaced.load(replaced.pin)


def test_what_is_checked_by_another_manifest_is_no_receipt(replaced: Replaced) -> None:
    replaced.write(replaced.old, replaced.old)
    statements = replaced.load(replaced.pin).statements
    then = replaced.pin.earlier[0]
    assert Receipt.verify_pinned(statements, then).id == "ab" * 16
    other = tuple(replace(m, facts=replace(m.facts, code="ab")) for m in then.members)  # the same keys
    with pytest.raises(SignatureError, match="another manifest"):
        Receipt.verify_pinned(statements, replace(then, members=other))


def test_it_is_the_pinned_key_that_finds_forgers(replaced: Replaced, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a look at the keys, whoever knows the old manifest could sign what he likes."""
    stranger, real = World(), module.open_pinned
    replaced.write(stranger, stranger)

    def credulous(signed: Signed, role: str, pin: str, key: bytes, purpose: str) -> Statement:
        return real(signed, role, identity.key_pin(signed.certificate), signed.key, purpose)

    monkeypatch.setattr(module, "open_pinned", credulous)
    assert replaced.load(replaced.pin).id == "ab" * 16
    monkeypatch.undo()
    with pytest.raises(SignatureError):
        replaced.load(replaced.pin)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")  # of changed certificates
def test_every_changed_byte_of_an_old_file_is_found(replaced: Replaced) -> None:
    replaced.write(replaced.old, replaced.old)
    replaced.load(replaced.pin)
    data, survived = replaced.path.read_bytes(), []
    for at in range(len(data)):
        replaced.path.write_bytes(data[:at] + bytes([data[at] ^ (1, 2, 4, 8, 16, 32, 64)[at % 7]]) + data[at + 1 :])
        try:
            replaced.load(replaced.pin)
        except MpcInferError:
            continue
        survived.append(at)
    assert not survived


# --- commitments -----------------------------------------------------------------------------------------------------


def test_parts_cannot_be_moved_from_one_to_the_next() -> None:
    salt = secrets.token_bytes(32)
    found = {commitment(salt, b"a", *parts) for parts in ((b"bc",), (b"b", b"c"), (b"", b"bc"), (b"bc", b""), ())}
    assert len(found | {commitment(salt, b"ab", b"c"), commitment(bytes(32), b"a", b"bc")}) == 7


def test_a_seed_and_the_same_bytes_as_data_differ_and_a_ring_of_0_bits_is_one_of_64() -> None:
    salt, some = bytes(32), bytes(range(32))
    tensors = [
        tensor_pb2.Tensor(shape=[4], seed=some),
        tensor_pb2.Tensor(shape=[4], data=some),
        tensor_pb2.Tensor(shape=[2, 2], data=some),
        tensor_pb2.Tensor(shape=[4], data=some, frac_bits=1),
        tensor_pb2.Tensor(shape=[4], data=some, ring_bits=32),
    ]
    assert len({upload_commitment(salt, [t]) for t in tensors} | {answers_commitment(salt, b"", tensors[:1])}) == 6
    same = tensor_pb2.Tensor(shape=[4], data=some, ring_bits=64)
    assert upload_commitment(salt, [same]) == upload_commitment(salt, [tensors[1]])


def test_salts_have_256_bits() -> None:
    check_salt(bytes(32))
    for size in (0, 16, 31, 33):
        with pytest.raises(MpcInferError):
            check_salt(bytes(size))


def test_the_commitments_of_the_documents() -> None:
    """As docs/protocol.md has them for whoever has only that."""
    page = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
    salt, tensor = bytes(range(32)), tensor_pb2.Tensor(shape=[1, 2], frac_bits=16, data=bytes(range(16)))

    def described(purpose: bytes, *parts: bytes) -> str:
        framed = b"".join(len(part).to_bytes(8, "little") + part for part in (purpose, *parts))
        return hmac.digest(salt, b"mpcinfer v1 commitment\0" + framed, "sha256").hex()

    parts = b"[[1,2],16,64]", b"", bytes(range(16))
    found = described(b"salt"), described(b"upload", *parts), described(b"answer", b"", *parts)
    assert all(each in page for each in found)
    ours = salt_commitment(salt), upload_commitment(salt, [tensor]), answers_commitment(salt, b"", [tensor])
    assert found == tuple(each.hex() for each in ours)
