"""Test vectors of the wire contract (docs/protocol.md), computed by this package: what scripts/vectors runs.

Integers of 64 bits are written as strings, because JSON readers of other languages take numbers for doubles. Real
numbers are JSON numbers that read back as exactly the double that was meant. Bytes are hex.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from mpcinfer.client.certs import write_cluster_file
from mpcinfer.config import Cluster
from mpcinfer.errors import RangeError
from mpcinfer.ring import prg
from mpcinfer.ring.codec import FixedPoint
from mpcinfer.ring.domain import Z64
from mpcinfer.wire import identity
from mpcinfer.wire.v1 import party_pb2, tensor_pb2

VECTORS = Path(__file__).parents[1] / "protos" / "vectors"
CERTIFICATES = ("ca", "party-0", "party-1", "dealer")  # made once: a signature is never the same twice
Json = dict[str, Any]


def seed_of(label: str) -> bytes:
    """32 bytes that nobody chose."""
    return hashlib.sha256(f"mpcinfer vector: {label}".encode()).digest()


def strings(x: torch.Tensor) -> list[str]:
    """The entries of an int64 tensor, row-major."""
    return [str(v) for v in x.reshape(-1).tolist()]


def fixed_point() -> Json:
    """Encoding and decoding, with halves, signs and the limit."""
    cases = []
    for frac_bits in (8, 16, 24):
        codec, ulp = FixedPoint(frac_bits), 2.0**-frac_bits
        values = [0.0, -0.0, 1.0, -1.0, 0.1, -0.1, math.pi, -math.pi, 1 / 3, 1234.5678, ulp, -ulp]
        values += [sign * half * ulp for half in (0.25, 0.5, 0.75, 1.5, 2.5, 3.5) for sign in (1, -1)]
        values += [sign * large for large in (codec.limit - 1, math.nextafter(codec.limit, 0)) for sign in (1, -1)]
        encoded = codec.encode(torch.tensor(values, dtype=torch.float64))
        refused = []
        for value in (codec.limit, -codec.limit, 1e300, math.inf, -math.inf, math.nan):
            try:
                codec.encode(torch.tensor(value, dtype=torch.float64))
            except RangeError:
                refused.append(str(value))
        cases.append(
            {
                "frac_bits": frac_bits,
                "limit": codec.limit,
                "values": [
                    {"value": v, "encoded": e, "decoded": d}
                    for v, e, d in zip(values, strings(encoded), codec.decode(encoded).tolist(), strict=True)
                ],
                "refused": refused,
            }
        )
    return {
        "what": "value -> encoded: the integer nearest to value * 2^frac_bits, halves to even; decoded: encoded / "
        "2^frac_bits. What is refused must not be sent.",
        "cases": cases,
    }


def seeds() -> Json:
    """Expansion of seeds; the first is the example of NIST SP 800-38A, F.5.1, the second's counter overflows."""
    chosen = {
        "NIST SP 800-38A F.5.1": bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3cf0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"),
        "the counter block wraps around": seed_of("wrap")[:16] + b"\xff" * 16,
        "odd number of elements": seed_of("odd"),
    }
    cases = []
    for note, seed in chosen.items():
        share = prg.expand(seed, (7,) if note.startswith("odd") else (8,), Z64)
        content = {"note": note, "seed": seed.hex(), "key": seed[:16].hex(), "counter_block": seed[16:].hex()}
        cases.append({**content, "key_stream": bytes(Z64.pack(share)).hex(), "share": strings(share)})
    return {
        "what": "seed -> share: AES-128 key and first counter block (big-endian, +1 per block) give a key stream; each "
        "8 bytes of it are one int64, little-endian.",
        "cases": cases,
    }


def share(x: torch.Tensor, parties: int, label: str) -> tuple[list[bytes], torch.Tensor]:
    """`ring.sharing.split` with seeds that are always the same."""
    chosen = [seed_of(f"{label} {i}") for i in range(parties - 1)]
    last = x
    for seed in chosen:
        last = Z64.sub(last, prg.expand(seed, tuple(x.shape), Z64))
    return chosen, last


def messages(x: torch.Tensor, frac_bits: int, parties: int, label: str) -> list[tensor_pb2.Tensor]:
    """The shares of x as they travel."""
    chosen, last = share(x, parties, label)
    form = {"shape": x.shape, "frac_bits": frac_bits, "ring_bits": 64}
    return [
        *(tensor_pb2.Tensor(seed=seed, **form) for seed in chosen),
        tensor_pb2.Tensor(data=bytes(Z64.pack(last)), **form),
    ]


def sharing() -> Json:
    """A tensor shared among 2 and among 3 parties, and the messages that carry the shares."""
    values = [[1.5, -2.25, 0.0], [-0.0000152587890625, 1000.125, -1073741823.0]]
    x = FixedPoint(16).encode(torch.tensor(values, dtype=torch.float64))
    cases = []
    for parties in (2, 3):
        chosen, last = share(x, parties, f"sharing {parties}")
        shares = [*(prg.expand(seed, tuple(x.shape), Z64) for seed in chosen), last]
        cases.append(
            {
                "parties": parties,
                "seeds": [seed.hex() for seed in chosen],
                "shares": [strings(s) for s in shares],
                "tensors": [
                    m.SerializeToString(deterministic=True).hex()
                    for m in messages(x, 16, parties, f"sharing {parties}")
                ],
            }
        )
    return {
        "what": "The shares add up to `encoded` mod 2^64, read as two's complement. `tensors`: serialized "
        "mpcinfer.v1.Tensor; all parties but the last get a seed, the last one gets `data`.",
        "values": values,
        "shape": list(x.shape),
        "frac_bits": 16,
        "encoded": strings(x),
        "cases": cases,
    }


def request_response() -> Json:
    """One inference: what each of two parties is sent, what each answers, and what the answers mean."""
    inputs = torch.tensor([[0.5, -0.25, 3.0]], dtype=torch.float64)
    outputs = torch.tensor([[2.5, -1.75]], dtype=torch.float64)
    index = torch.tensor([0])
    request_id = seed_of("request id")[:16]
    codec = FixedPoint(16)
    requests = [
        party_pb2.InferRequest(request_id=request_id, model="mlp", version=3, inputs=[tensor])
        for tensor in messages(codec.encode(inputs), 16, 2, "input")
    ]
    # A party answers with data, never with a seed: here the shares of what the seeds stand for.
    answers = []
    logits, best = share(codec.encode(outputs), 2, "output"), share(index, 2, "index")
    for i in range(2):
        tensors = []
        for (chosen, last), shape, frac_bits in ((logits, outputs.shape, 16), (best, index.shape, 0)):
            own = last if i else prg.expand(chosen[0], tuple(shape), Z64)
            tensors.append(tensor_pb2.Tensor(shape=shape, frac_bits=frac_bits, ring_bits=64, data=bytes(Z64.pack(own))))
        answers.append(party_pb2.InferResponse(outputs=tensors, version=3))
    return {
        "what": "mpcinfer.v1.PartyService/Infer at two parties. An output with frac_bits 0 holds integers (a class).",
        "request_id": request_id.hex(),
        "model": "mlp",
        "version": 3,
        "input": inputs.tolist(),
        "requests": [m.SerializeToString(deterministic=True).hex() for m in requests],
        "responses": [m.SerializeToString(deterministic=True).hex() for m in answers],
        "outputs": [
            {"frac_bits": 16, "shape": list(outputs.shape), "values": outputs.tolist()},
            {"frac_bits": 0, "shape": list(index.shape), "values": index.tolist()},
        ],
    }


def identities() -> Json:
    """Certificates: role, DNS name and pin of each, and the digest of the cluster file that pins them."""
    members = []
    for stem in CERTIFICATES[1:]:
        pem = (VECTORS / f"{stem}.pem").read_bytes()
        cluster, role = identity.claimed_role(pem)
        members.append(
            {
                "certificate": f"{stem}.pem",
                "uri": identity.role_uri(cluster, role),
                "dns_name": identity.dns_name(role),
                "key": identity.key_pin(pem),
            }
        )
    return {
        "what": "`key`: SHA-256 of the certificate's SubjectPublicKeyInfo (DER). `digest`: of cluster.toml, as "
        "Status.cluster_digest carries it.",
        "members": members,
        "cluster_file": "cluster.toml",
        "digest": Cluster.load(VECTORS / "cluster.toml").digest().hex(),
    }


def make_certificates() -> None:
    """Certificates to read, not to use: their keys are forgotten at once."""
    key, ca = identity.create_ca("vectors")
    (VECTORS / "ca.pem").write_bytes(ca)
    for stem in CERTIFICATES[1:]:
        role = stem.replace("-", "/")
        _, request = identity.create_request("vectors", role)
        (VECTORS / f"{stem}.pem").write_bytes(identity.sign_request(key, ca, request, role=role, days=3650))
    write_cluster_file(
        VECTORS / "cluster.toml",
        "vectors",
        VECTORS / "ca.pem",
        parties=[(f"party-{i}.example:7100", VECTORS / f"party-{i}.pem") for i in range(2)],
        dealer=("dealer.example:7100", VECTORS / "dealer.pem"),
    )


def render() -> dict[str, str]:
    """The content of every JSON file in protos/vectors/."""
    files = {
        "fixed_point": fixed_point(),
        "seeds": seeds(),
        "sharing": sharing(),
        "infer": request_response(),
        "identities": identities(),
    }
    return {f"{name}.json": json.dumps(content, indent=1, allow_nan=False) + "\n" for name, content in files.items()}


def main() -> None:
    """Write or check the files."""
    parser = argparse.ArgumentParser(description="Write the test vectors of the wire contract.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if they are stale")
    check = parser.parse_args().check
    if not check and not (VECTORS / "cluster.toml").exists():
        VECTORS.mkdir(exist_ok=True)
        make_certificates()
    stale = []
    for name, content in render().items():
        path = VECTORS / name
        if check:
            stale += [name] if not path.exists() or path.read_text() != content else []
        else:
            path.write_text(content)
    if stale:
        sys.exit(f"Stale in protos/vectors: {', '.join(stale)}. Run scripts/vectors if the change is meant.")


if __name__ == "__main__":
    main()
