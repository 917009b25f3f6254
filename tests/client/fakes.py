"""Parties that compute nothing: servicers over real mutual TLS on 127.0.0.1 that keep the shares they are sent.

All of them live in the test's process, so together they can add up what was shared, apply a function to it and answer
with fresh shares of the result.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch

from mpcinfer.config import PROTOCOL_VERSION, Cluster, Endpoint
from mpcinfer.ring import prg
from mpcinfer.ring.domain import Z64, Ring
from mpcinfer.ring.sharing import split
from mpcinfer.trust.commitment import answers_commitment, salt_commitment, upload_commitment
from mpcinfer.trust.facts import Facts, digest
from mpcinfer.trust.manifest import state
from mpcinfer.trust.receipt import SHARED
from mpcinfer.trust.signing import Signer
from mpcinfer.wire import channel, identity
from mpcinfer.wire.identity import Identity
from mpcinfer.wire.v1 import party_pb2, party_pb2_grpc, tensor_pb2

Function = Callable[[list[torch.Tensor]], list[torch.Tensor]]
WAIT = 10.0
SUBJECT = "jwt/corp/ann"  # whose the tokens are


def spec(name: str, *shape: int, frac_bits: int = 16, ring_bits: int = 64, limit: float = 2.0**30) -> Any:
    """A TensorSpec as a party sends it."""
    return tensor_pb2.TensorSpec(name=name, shape=shape, frac_bits=frac_bits, ring_bits=ring_bits, limit=limit)


def info(name: str, inputs: Iterable[Any], outputs: Iterable[Any], version: int = 1, **more: Any) -> Any:
    """A ModelInfo as a party sends it."""
    more = {"reveal": "logits", "owner": "owner/o", "deployment_id": bytes([version]) * 32, **more}
    return party_pb2.ModelInfo(name=name, version=version, inputs=inputs, outputs=outputs, **more)


def share_of(message: Any, ring: Ring = Z64) -> torch.Tensor:
    """The share that a Tensor message stands for."""
    shape = tuple(message.shape)
    if message.WhichOneof("content") == "seed":
        return prg.expand(message.seed, shape, ring)
    return torch.from_numpy(np.frombuffer(message.data, "<i8").astype(np.int64)).reshape(shape)


def total(shares: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum mod 2^64."""
    return torch.stack(list(shares)).sum(0)


def _token(context: Any) -> str:
    return next((value for name, value in context.invocation_metadata() if name == "mpcinfer-token"), "")


@dataclass
class FakeParty(party_pb2_grpc.PartyServiceServicer):  # type: ignore[misc]
    """One party; what it was sent is in `inferences`, `uploads` (header and bytes) and `removals`."""

    index: int
    world: FakeCluster
    status: dict[str, Any] = field(default_factory=dict)
    models: list[Any] = field(default_factory=list)
    inferences: list[Any] = field(default_factory=list)
    uploads: list[tuple[Any, list[bytes]]] = field(default_factory=list)
    removals: list[Any] = field(default_factory=list)
    tokens: list[tuple[str, str]] = field(default_factory=list)  # calls that came with a user's token
    # set when a call that does something has ended, be it because the caller left
    cancelled: threading.Event = field(default_factory=threading.Event)
    # called at the start of a call with the method's name; may raise or wait
    before: Callable[[str], None] = lambda method: None
    says: Callable[[], Iterable[bytes]] = lambda: ()  # the answers to Vocabulary

    def _begin(self, method: str, context: Any) -> None:
        identity.peer_of(context, self.world.cluster)
        if token := _token(context):
            self.tokens.append((method, token))
        if method not in ("Status", "Manifest", "ListModels") and not context.add_callback(self.cancelled.set):
            self.cancelled.set()  # it had ended before
        try:
            self.before(method)
        except Exception as error:
            channel.abort(context, error)

    def Status(self, request: Any, context: Any) -> Any:
        self._begin("Status", context)
        says = {
            "index": self.index,
            "parties": self.world.n,
            "protocol_version": PROTOCOL_VERSION,
            "cluster_digest": self.world.cluster.digest(),
            "state": "ready",
            "models": self.models,
            "requests_done": len(self.inferences),
        }
        return party_pb2.StatusResponse(**{**says, **self.status})

    def Manifest(self, request: Any, context: Any) -> Any:
        self._begin("Manifest", context)
        said = self.world.facts()
        signed = state(Signer(self.world.members[self.index]), said[self.index], digest(said), request.nonce)
        return party_pb2.ManifestResponse(statement=signed.message())

    def ListModels(self, request: Any, context: Any) -> Any:
        self._begin("ListModels", context)
        return party_pb2.ListModelsResponse(models=self.models)

    def Infer(self, request: Any, context: Any) -> Any:
        self.inferences.append(request)
        self._begin("Infer", context)
        outputs = self.world.evaluate(self.index, request)
        cost = tensor_pb2.PhaseCost(
            seconds=0.5 + self.index, rounds=8, bytes_sent=100 + self.index, bytes_from_dealer=1000 * self.index
        )
        caller = SUBJECT if _token(context) else identity.peer_of(context, self.world.cluster).role
        return party_pb2.InferResponse(
            outputs=outputs,
            version=request.version or 1,
            online=cost,
            offline=cost,
            receipt=self.world.receipt(self.index, request, caller, outputs),
        )

    def EndSession(self, request: Any, context: Any) -> Any:
        self._begin("EndSession", context)
        return party_pb2.EndSessionResponse()

    def Vocabulary(self, request: Any, context: Any) -> Any:
        self._begin("Vocabulary", context)
        for chunk in self.says():
            yield party_pb2.VocabularyResponse(chunk=chunk)

    def Deploy(self, request_iterator: Any, context: Any) -> Any:
        self._begin("Deploy", context)
        header = next(request_iterator).header
        chunks: list[bytes] = []
        self.uploads.append((header, chunks))
        for part in request_iterator:
            assert part.WhichOneof("part") == "chunk"
            chunks.append(part.chunk)
            if len(chunks) == 1:
                self._begin("chunk", context)
        return party_pb2.DeployResponse(
            name=header.name, version=self.world.version_at(self.index), deployment_id=b"\1" * 32
        )

    def RemoveModel(self, request: Any, context: Any) -> Any:
        self._begin("RemoveModel", context)
        self.removals.append(request)
        return party_pb2.RemoveModelResponse(removed=self.world.removed_at(self.index))


class FakeCluster:
    """n fake parties, listening. `function` maps the encoded inputs to the encoded outputs."""

    def __init__(self, n: int, function: Function = lambda inputs: inputs) -> None:
        self.n = n
        self.function = function
        self.version_at: Callable[[int], int] = lambda index: 1
        self.removed_at: Callable[[int], int] = lambda index: 2
        self.tamper: Callable[[int, list[Any]], list[Any]] = lambda index, outputs: outputs
        self._meeting = threading.Condition()
        self._requests: dict[bytes, dict[int, Any]] = {}
        self._answers: dict[bytes, list[list[Any]]] = {}
        self.operators = [f"operator of party/{i}" for i in range(n)]
        self.ca_key, self.ca = identity.create_ca("local")
        self.members = [self.issue(role) for role in [*(f"party/{i}" for i in range(n)), "dealer"]]
        self.parties = [FakeParty(i, self) for i in range(n)]
        self.servers: list[grpc.Server] = []
        ports = [self._serve(i, 0) for i in range(n)]
        endpoints = [
            Endpoint(who.role, f"127.0.0.1:{port}", identity.key_pin(who.cert_pem))
            for who, port in zip(self.members, [*ports, 1], strict=True)
        ]
        self.cluster = Cluster("local", self.ca, tuple(endpoints[:-1]), endpoints[-1])

    def issue(self, role: str) -> Identity:
        """A key and certificate of this cluster."""
        key, csr = identity.create_request("local", role)
        return Identity(role, "local", key, identity.sign_request(self.ca_key, self.ca, csr, role=role))

    def write(self, directory: Path, *roles: str) -> Path:
        """Write the cluster file, and key pairs for `roles`, into a directory: the cluster file's path."""
        (directory / "ca.pem").write_bytes(self.ca)
        lines = ['name = "local"', 'ca = "ca.pem"']
        for endpoint in (*self.cluster.parties, self.cluster.dealer):
            lines.append("[dealer]" if endpoint.role == "dealer" else "[[party]]")
            lines += [f'address = "{endpoint.address}"', f'key = "{endpoint.key_pin}"']
        (directory / "cluster.toml").write_text("\n".join(lines))
        for role in roles:
            self.write_pair(directory / role.replace("/", "-"), self.issue(role))
        return directory / "cluster.toml"

    @staticmethod
    def write_pair(stem: Path, who: Identity) -> None:
        """Write a key pair to stem.key and stem.pem."""
        key = Path(f"{stem}.key")
        key.touch(mode=0o600)
        key.write_bytes(who.key_pem)
        Path(f"{stem}.pem").write_bytes(who.cert_pem)

    def deploy(self, *models: Any) -> None:
        """Make all parties list exactly these models."""
        for party in self.parties:
            party.models = list(models)

    def stop_party(self, index: int) -> None:
        """Take a party off the network."""
        self.servers[index].stop(None).wait()

    def start_party(self, index: int) -> None:
        """Bring it back where it was."""
        self._serve(index, int(self.cluster.parties[index].address.rpartition(":")[2]))

    def close(self) -> None:
        """Stop all."""
        for stopping in [server.stop(None) for server in self.servers]:
            stopping.wait()

    def _serve(self, index: int, port: int) -> int:
        server = grpc.server(futures.ThreadPoolExecutor(32), options=channel.server_options())
        party_pb2_grpc.add_PartyServiceServicer_to_server(self.parties[index], server)
        who = self.members[index]
        credentials = grpc.ssl_server_credentials([(who.key_pem, who.cert_pem)], self.ca, require_client_auth=True)
        bound = channel.bind(server, f"127.0.0.1:{port}", credentials)
        server.start()
        self.servers[index : index + 1] = [server]
        return bound

    def secrets(self, position: int) -> list[torch.Tensor]:
        """The encoded inputs of the inference number `position`, added up from what the parties were sent."""
        requests = [party.inferences[position] for party in self.parties]
        return [total([share_of(x) for x in shares]) for shares in zip(*(r.inputs for r in requests), strict=True)]

    def evaluate(self, index: int, request: Any) -> list[Any]:
        """Wait until all parties have the request; this party's shares of the function's value."""
        key = request.request_id
        with self._meeting:
            held = self._requests.setdefault(key, {})
            held[index] = request
            if len(held) == self.n:
                self._answers[key] = self._compute([held[i] for i in range(self.n)])
                self._meeting.notify_all()
            assert self._meeting.wait_for(lambda: key in self._answers, WAIT)
            return self.tamper(index, self._answers[key][index])

    def facts(self) -> list[Facts]:
        """What the parties say of themselves."""
        members = zip(self.members, self.operators, strict=False)
        return [Facts.of(Signer(m), self.cluster, operator=o, evidence="code-digest") for m, o in members]

    def receipt(self, index: int, request: Any, caller: str, outputs: list[Any]) -> Any:
        """What a party signs about its answer."""
        model = self._asked(request)
        who = self.members[index]
        shared = dict.fromkeys(SHARED, "") | {
            "format": 1,
            "parties": self.n,
            "request": request.request_id.hex(),
            "client": caller,
            "model": model.name,
            "version": model.version,
            "deployment": model.deployment_id.hex(),
            "action": "infer",
            "rounds": 8,
            "openings": {"Relu": 4},
            "answers": 1,
            "manifest": digest(self.facts()).hex(),
        }
        own = {
            "party": index,
            "certificate": hashlib.sha256(who.cert_pem).hexdigest(),
            "salt": salt_commitment(request.salt).hex(),
            "request_shares": upload_commitment(request.salt, request.inputs).hex(),
            "answer_shares": answers_commitment(request.salt, b"", outputs).hex(),
            "bytes_sent": 0,
            "log": [0, "0" * 64],
            "time": 0.0,
        }
        return Signer(who).sign("receipt", shared | own).message()

    def _asked(self, request: Any) -> Any:
        return next(
            m
            for m in self.parties[0].models
            if (f"{m.owner.partition('/')[2]}/{m.name}", m.version) == (request.model, request.version)
        )

    def _compute(self, requests: list[Any]) -> list[list[Any]]:
        model = self._asked(requests[0])
        inputs = [total([share_of(x) for x in shares]) for shares in zip(*(r.inputs for r in requests), strict=True)]
        answers: list[list[Any]] = [[] for _ in range(self.n)]
        for declared, value in zip(model.outputs, self.function(inputs), strict=True):
            ring = Ring(declared.ring_bits)
            seeds, last = split(value, ring, self.n)
            shares = [*(prg.expand(seed, tuple(value.shape), ring) for seed in seeds), last]
            form = {"frac_bits": declared.frac_bits, "ring_bits": declared.ring_bits}
            for answer, share in zip(answers, shares, strict=True):
                data = share.contiguous().numpy().tobytes()
                answer.append(tensor_pb2.Tensor(shape=value.shape, data=data, **form))
        return answers


def running(n: int, function: Function = lambda inputs: inputs) -> Iterator[FakeCluster]:
    """For fixtures: a fake cluster, closed afterwards."""
    world = FakeCluster(n, function)
    yield world
    world.close()
