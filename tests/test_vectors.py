"""protos/vectors and docs/protocol.md: the package gets these vectors, and so does arithmetic that shares no code."""

from __future__ import annotations

import hashlib
import json
import re
import runpy
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from mpcinfer import errors
from mpcinfer.config import Cluster
from mpcinfer.errors import RangeError
from mpcinfer.ring import prg
from mpcinfer.ring.codec import FixedPoint
from mpcinfer.ring.domain import Z64
from mpcinfer.ring.sharing import combine
from mpcinfer.wire.identity import claimed_role, dns_name, key_pin, role_uri
from mpcinfer.wire.v1 import party_pb2, tensor_pb2

ROOT = Path(__file__).parents[1]
VECTORS = ROOT / "protos" / "vectors"


def load(name: str) -> Any:
    return json.loads((VECTORS / f"{name}.json").read_text())


def signed(number: int) -> int:
    """The residue of a number mod 2^64 in two's complement."""
    return (number + 2**63) % 2**64 - 2**63


def key_stream(seed: bytes, size: int) -> bytes:
    """AES-128 in counter mode, block by block."""
    block = Cipher(algorithms.AES(seed[:16]), modes.ECB()).encryptor()
    first = int.from_bytes(seed[16:], "big")
    blocks = (block.update(((first + i) % 2**128).to_bytes(16, "big")) for i in range(-(-size // 16)))
    return b"".join(blocks)[:size]


def words(data: bytes) -> list[int]:
    return [int.from_bytes(data[i : i + 8], "little", signed=True) for i in range(0, len(data), 8)]


def share_by_hand(message: tensor_pb2.Tensor) -> list[int]:
    count = 1
    for size in message.shape:
        count *= size
    return words(key_stream(message.seed, 8 * count) if message.seed else message.data)


def share(message: tensor_pb2.Tensor) -> torch.Tensor:
    shape = tuple(message.shape)
    return prg.expand(message.seed, shape, Z64) if message.seed else Z64.unpack(message.data, shape)


@pytest.mark.parametrize("case", load("fixed_point")["cases"], ids=lambda case: f"frac_bits={case['frac_bits']}")
def test_fixed_point(case: dict[str, Any]) -> None:
    codec = FixedPoint(case["frac_bits"])
    assert codec.limit == case["limit"]
    for vector in case["values"]:
        encoded = codec.encode(torch.tensor(vector["value"], dtype=torch.float64))
        assert str(encoded.item()) == vector["encoded"]
        assert codec.decode(encoded).item() == vector["decoded"]
        assert round(Fraction(vector["value"]) * 2 ** case["frac_bits"]) == int(vector["encoded"])
        assert Fraction(int(vector["encoded"]), 2 ** case["frac_bits"]) == Fraction(vector["decoded"])
    assert len(case["refused"]) == 6
    for text in case["refused"]:
        with pytest.raises(RangeError):
            codec.encode(torch.tensor(float(text), dtype=torch.float64))


@pytest.mark.parametrize("case", load("seeds")["cases"], ids=lambda case: case["note"])
def test_seeds(case: dict[str, Any]) -> None:
    seed, expected = bytes.fromhex(case["seed"]), [int(x) for x in case["share"]]
    assert seed.hex() == case["key"] + case["counter_block"]
    assert prg.expand(seed, (len(expected),), Z64).tolist() == expected
    assert key_stream(seed, 8 * len(expected)).hex() == case["key_stream"]
    assert words(bytes.fromhex(case["key_stream"])) == expected


@pytest.mark.parametrize("case", load("sharing")["cases"], ids=lambda case: f"parties={case['parties']}")
def test_sharing(case: dict[str, Any]) -> None:
    whole = load("sharing")
    values = torch.tensor(whole["values"], dtype=torch.float64)
    encoded = FixedPoint(whole["frac_bits"]).encode(values)
    assert [str(x) for x in encoded.reshape(-1).tolist()] == whole["encoded"]
    messages = [tensor_pb2.Tensor.FromString(bytes.fromhex(text)) for text in case["tensors"]]
    assert [m.WhichOneof("content") for m in messages] == ["seed"] * (case["parties"] - 1) + ["data"]
    assert [m.seed.hex() for m in messages[:-1]] == case["seeds"]
    for message, expected, text in zip(messages, case["shares"], case["tensors"], strict=True):
        assert list(message.shape) == whole["shape"]
        assert (message.frac_bits, message.ring_bits) == (16, 64)
        assert [str(x) for x in share(message).reshape(-1).tolist()] == expected
        assert [str(x) for x in share_by_hand(message)] == expected
        assert message.SerializeToString(deterministic=True).hex() == text
    assert torch.equal(FixedPoint(16).decode(combine([share(m) for m in messages], Z64)), values)
    sums = [signed(sum(column)) for column in zip(*map(share_by_hand, messages), strict=True)]
    assert [str(x) for x in sums] == whole["encoded"]


def test_request_and_response() -> None:
    vector = load("infer")
    requests = [party_pb2.InferRequest.FromString(bytes.fromhex(text)) for text in vector["requests"]]
    for request in requests:
        assert (request.request_id.hex(), request.model, request.version) == (vector["request_id"], "mlp", 3)
    assert len(bytes.fromhex(vector["request_id"])) == 16
    sent = combine([share(request.inputs[0]) for request in requests], Z64)
    assert FixedPoint(16).decode(sent).tolist() == vector["input"]
    answers = [party_pb2.InferResponse.FromString(bytes.fromhex(text)) for text in vector["responses"]]
    for i, output in enumerate(vector["outputs"]):
        tensors = [answer.outputs[i] for answer in answers]
        assert {(tuple(t.shape), t.frac_bits) for t in tensors} == {(tuple(output["shape"]), output["frac_bits"])}
        decoded = combine([share(t) for t in tensors], Z64) / 2 ** output["frac_bits"]
        assert decoded.tolist() == output["values"]
        sums = [signed(sum(column)) for column in zip(*map(share_by_hand, tensors), strict=True)]
        assert (torch.tensor(sums) / 2 ** output["frac_bits"]).reshape(output["shape"]).tolist() == output["values"]


def test_identities() -> None:
    vector = load("identities")
    cluster = Cluster.load(VECTORS / vector["cluster_file"])
    assert len(vector["members"]) == 3
    for member in vector["members"]:
        pem = (VECTORS / member["certificate"]).read_bytes()
        name, role = claimed_role(pem)
        assert (role_uri(name, role), dns_name(role)) == (member["uri"], member["dns_name"])
        assert key_pin(pem) == member["key"] == cluster.endpoint(role).key_pin
        public = x509.load_pem_x509_certificate(pem).public_key()
        der = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        assert member["key"] == "sha256:" + hashlib.sha256(der).hexdigest()
    # The digest as docs/protocol.md gives it.
    ca = x509.load_pem_x509_certificate((VECTORS / "ca.pem").read_bytes()).fingerprint(SHA256()).hex()
    endpoints = [[e.role, e.address, e.key_pin] for e in (*cluster.parties, cluster.dealer)]
    text = json.dumps({"ca": ca, "endpoints": endpoints, "name": "vectors"}, separators=(",", ":"))
    assert vector["digest"] == hashlib.sha256(text.encode()).hexdigest() == cluster.digest().hex()


def test_the_page_lists_every_error_and_every_vector() -> None:
    page = (ROOT / "docs" / "protocol.md").read_text()
    listed = {}
    for status, names in re.findall(r"^\| `([A-Z_]+)` \| ([^|]+) \|", page, re.MULTILINE):
        listed.update(dict.fromkeys(re.findall(r"`(\w+)`", names), status))
    classes = [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, Exception)]
    assert listed == {c.__name__: c.grpc_status for c in classes if c is not errors.MpcInferError}
    assert {path.name for path in VECTORS.glob("*.json")} == set(re.findall(r"`(\w+\.json)`", page))


def test_no_key_is_among_them() -> None:
    for path in VECTORS.iterdir():
        assert b"PRIVATE" not in path.read_bytes(), path.name


def test_the_committed_files_are_what_the_generator_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["vectors", "--check"])
    generator = runpy.run_path(str(ROOT / "scripts" / "vectors.py"))
    generator["main"]()
    assert set(generator["render"]()) == {path.name for path in VECTORS.glob("*.json")}
    # A stale file is noticed: another place, where all certificates are the same but one vector is not.
    for path in VECTORS.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "seeds.json").write_text((VECTORS / "seeds.json").read_text().replace("1", "2", 1))
    generator["main"].__globals__["VECTORS"] = tmp_path
    with pytest.raises(SystemExit, match="Stale in protos/vectors: seeds.json"):
        generator["main"]()
