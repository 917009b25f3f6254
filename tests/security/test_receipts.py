"""Receipts of a running cluster: what a party may try, and what the client, who has asked, makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mpcinfer.client.cluster import Connection
from mpcinfer.client.data import Client
from mpcinfer.errors import MpcInferError, SignatureError, StoreError, TamperingError
from mpcinfer.party.audit import NAME
from mpcinfer.party.receipts import Account, Receipts
from mpcinfer.trust import chain
from mpcinfer.trust.receipt import Receipt
from mpcinfer.trust.signing import Signed
from tests.decoders_local import captured_decoder, tiny_decoder
from tests.inprocess import InProcess, kinds, mlp, random_weights, reveal

PROGRAM = mlp()
WEIGHTS = random_weights(PROGRAM)
X = torch.linspace(-2, 2, 12).reshape(3, 4)

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    with InProcess(tmp_path_factory.mktemp("cluster"), 2) as running:
        caller = running.caller()
        assert [a.version for a in caller.deploy(PROGRAM, WEIGHTS)] == [1] * 2
        captured = captured_decoder(tiny_decoder(layers=1))
        assert [a.version for a in caller.deploy(captured.program, dict(captured.weights), "text")] == [1] * 2
        yield running


@pytest.fixture
def client(cluster: InProcess) -> Iterator[Client]:
    keys = cluster.keys
    with Client.connect(keys.directory, keys.identity("client/bob")) as connected:
        yield connected


def log_of(cluster: InProcess, index: int) -> chain.Log:
    return chain.read(cluster.keys.path(f"party/{index}", "store") / NAME)


def test_an_answer_comes_with_what_all_parties_signed(cluster: InProcess, client: Client, tmp_path: Path) -> None:
    assert client.last_receipt is None
    client.infer("m", X)
    found = client.last_receipt
    assert found is not None and client.last_cost is not None
    model = cluster.parties[0].catalogue.find("m", 0)
    assert found.shared["deployment"] == model.id.hex() and found.shared["client"] == "client/bob"
    assert found.shared["model_commitment"] == model.grant.model and len(found.shared["manifest"]) == 64
    assert found.shared["rounds"] == client.last_cost["online"]["rounds"] and found.shared["answers"] == 1
    assert sum(found.shared["openings"].values()) >= 8 and found.shared["tapes"]["count"] == 1
    assert found.own[0]["bytes_sent"] > 0 and found.own[0]["request_shares"] != found.own[1]["request_shares"]
    found.save(tmp_path / "receipt.json")
    assert Receipt.load(tmp_path / "receipt.json", cluster.keys.cluster).shared == found.shared
    for index in range(2):
        log = log_of(cluster, index)
        assert log.check(log.party, [found.line(index)], "the receipt") == 1
        assert log.entries[found.line(index).sequence]["request"] == found.id


def test_a_text_has_one_that_grows(cluster: InProcess, client: Client) -> None:
    receipts = []
    answer = client.generate("text", [1, 2, 3], max_new_tokens=3)
    assert client.last_receipt is None
    for _ in answer:
        receipts.append(client.last_receipt)
    assert [r.shared["answers"] for r in receipts if r is not None] == [1, 2, 3]
    assert len({r.shared["transcript"] for r in receipts if r is not None}) == 3
    last = receipts[-1]
    assert last is not None and last.shared["tapes"]["count"] == 3
    actions = [e["action"] for e in log_of(cluster, 0).entries if e.get("request") == last.id]
    assert actions[0] == "generate"


def test_a_plain_caller_without_salts_gets_no_receipt(cluster: InProcess) -> None:
    caller = cluster.caller()
    requests = caller.inferences(X)
    for request in requests:
        request.salt = b""
    answers = caller.at_all("Infer", requests)
    assert kinds(answers) == ["InferResponse"] * 2 and not any(a.HasField("receipt") for a in answers)
    reveal(answers)
    requests = caller.inferences(X)
    requests[1].salt = b"short"
    assert "InputError" in kinds(caller.at_all("Infer", requests))


def test_a_plain_caller_computes_the_commitments_from_its_messages(cluster: InProcess) -> None:
    caller = cluster.caller()
    requests = caller.inferences(X)
    for request in requests:
        request.salt = bytes([9]) * 32
    answers = caller.at_all("Infer", requests)
    found = Receipt.verify([Signed.of(a.receipt) for a in answers], cluster.keys.cluster, [r.salt for r in requests])
    for index in range(2):
        found.check_request(index, requests[index].inputs)
        found.check_answers(index, [answers[index].outputs])


LIES: dict[str, Any] = {
    "request": "0" * 32,
    "client": "client/eve",
    "model": "n",
    "version": 2,
    "deployment": "0" * 64,
    "manifest": "0" * 64,
    "transcript": "0" * 64,
    "answers": 2,
    "request_shares": "0" * 64,
    "answer_shares": "0" * 64,
    "salt": "0" * 64,
    "party": 1,
}


@pytest.mark.parametrize("everybody", [False, True])
@pytest.mark.parametrize("name", LIES)
def test_a_receipt_of_anything_else_is_refused(
    cluster: InProcess, client: Client, monkeypatch: pytest.MonkeyPatch, name: str, everybody: bool
) -> None:
    """Also when all parties lie alike: but for what only they know, which is what they have seen opened."""
    client.infer("m", X)
    before, real = client.last_receipt, Receipts.sign

    def sign(by: Receipts, content: dict[str, Any]) -> Any:
        return real(by, content | {name: LIES[name]} if everybody or by.index == 0 else content)

    monkeypatch.setattr(Receipts, "sign", sign)
    if everybody and name == "transcript":
        client.infer("m", X)
        return
    with pytest.raises((TamperingError, SignatureError)):
        client.infer("m", X)
    assert client.last_receipt is before


def test_an_answer_that_is_changed_after_it_was_signed_is_refused(
    cluster: InProcess, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Connection.call

    def altered(self: Any, method: str, requests: Any, **how: Any) -> Any:
        answers = call(self, method, requests, **how)
        if method == "Infer":
            data = bytearray(answers[0].outputs[0].data)
            data[0] ^= 1
            answers[0].outputs[0].data = bytes(data)
        return answers

    monkeypatch.setattr(Connection, "call", altered)
    with pytest.raises(TamperingError, match="party 0 signed for other shares of the answer"):
        client.infer("m", X)


def test_an_answer_without_its_receipt_is_refused(
    cluster: InProcess, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Account, "answer", lambda self, outputs: None)
    with pytest.raises(SignatureError, match="no receipt"):
        client.infer("m", X)
    with pytest.raises(SignatureError, match="no receipt"):
        client.generate("text", [1, 2], max_new_tokens=2, stream=False)


def test_a_log_is_not_what_the_receipt_says_once_it_is_rewritten(
    cluster: InProcess, client: Client, tmp_path: Path
) -> None:
    client.infer("m", X)
    found = client.last_receipt
    assert found is not None
    lines = log_of(cluster, 0).path.read_bytes().splitlines(keepends=True)
    cut = tmp_path / "cut"
    cut.write_bytes(b"".join(lines[: found.line(0).sequence]))
    log = chain.read(cut)
    with pytest.raises(TamperingError, match="was rewritten"):
        log.check(log.party, [found.line(0)], "the receipt")
    changed = lines[found.line(0).sequence].replace(b"client/bob", b"client/eve")
    cut.write_bytes(b"".join([*lines[: found.line(0).sequence], changed]))
    with pytest.raises(StoreError):
        chain.read(cut)


def test_it_is_the_client_who_checks(cluster: InProcess, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Receipts.sign
    monkeypatch.setattr(Receipts, "sign", lambda by, content: real(by, content | {"request_shares": "0" * 64}))
    with pytest.raises(MpcInferError):
        client.infer("m", X)
    monkeypatch.setattr(Receipt, "check_shares", lambda *_: None)
    assert client.infer("m", X).shape == (3, 2)
