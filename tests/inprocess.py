"""Parties and a dealer in one process, talking over loopback as separate processes do: for tests that look inside."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import grpc
import torch

from mpcinfer.client import certs
from mpcinfer.config import Cluster, Limits, Node
from mpcinfer.config.issuer import Issuer
from mpcinfer.dealer.dealing import Dealer
from mpcinfer.dealer.server import build
from mpcinfer.errors import MpcInferError
from mpcinfer.graph.program import Program
from mpcinfer.party.server import Party
from mpcinfer.ring.codec import FixedPoint
from mpcinfer.ring.domain import Z64
from mpcinfer.ring.sharing import combine, split
from mpcinfer.trust.grant import Grant, Terms
from mpcinfer.trust.signing import Signer
from mpcinfer.wire import channel
from mpcinfer.wire.identity import Identity
from mpcinfer.wire.server import Server
from mpcinfer.wire.v1 import party_pb2, party_pb2_grpc, tensor_pb2

LIMITS = Limits(step_timeout_s=60, connect_timeout_s=10, stop_grace_s=5, max_waiting_requests=8)
READY = 60.0
EVERYBODY = Terms()
PEOPLE = ("owner/alice", "owner/eve", "client/bob", "client/carol")


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on, below those the system gives to outgoing connections."""
    found: list[int] = []
    while len(found) < count:
        port = 20000 + secrets.randbelow(12000)
        with socket.socket() as probe:
            if port not in found and probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
    return found


def wait_for(condition: Callable[[], object], timeout: float = READY) -> None:
    """Return once `condition()` is true; AssertionError if it is not in time."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.01)


def mlp(sizes: Sequence[int] = (4, 3, 2)) -> Program:
    """Linear layers with ReLU between them, weights and biases secret, as `capture` would describe them."""
    last = len(sizes) - 2
    declared = [
        item
        for i, (rows, columns) in enumerate(zip(sizes, sizes[1:], strict=False))
        for item in (
            {"name": f"w{i}", "shape": [rows, columns], "frac_bits": 16, "weight": True},
            {"name": f"b{i}", "shape": [columns], "frac_bits": 16, "weight": False},
        )
    ]
    nodes: list[Any] = []
    for i in range(last + 1):
        x = f"relu{i - 1}" if i else "x"
        nodes.append([f"linear{i}", "mpc.linear", [{"$": x}, {"$": f"w{i}"}, {"$": f"b{i}"}], {}, str(2 * i)])
        if i < last:
            nodes.append([f"relu{i}", "aten.relu.default", [{"$": f"linear{i}"}], {}, str(2 * i + 1)])
    result = f"linear{last}"
    return Program.from_bytes(
        json.dumps(
            {
                "format": 3,
                "frac_bits": 16,
                "inputs": [{"name": "x", "shape": [-1, sizes[0]], "frac_bits": 16, "limit": 0.0, "proven": False}],
                "parameters": declared,
                "constants": [],
                "nodes": nodes,
                "results": [result],
                "outputs": [{"name": result, "shape": [-1, sizes[-1]], "frac_bits": 16}],
                "reveal": "logits",
                "sizes": [{"name": "batch", "low": 1, "high": 0}],
                "caches": [],
            }
        ).encode()
    )


def random_weights(program: Program, seed: int = 0) -> dict[str, torch.Tensor]:
    """Encoded weights, small."""
    generator = torch.Generator().manual_seed(seed)
    return {
        p.name: FixedPoint(p.frac_bits).encode(torch.randn(p.shape, generator=generator)) for p in program.parameters
    }


def plain(weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What the model says without any protocol."""
    layers = len(weights) // 2
    for i in range(layers):
        x = x.double() @ (weights[f"w{i}"].double() / 65536) + weights[f"b{i}"].double() / 65536
        x = x.relu() if i < layers - 1 else x
    return x


class Keys:
    """Certificates, a cluster file, and what each process would be started with."""

    def __init__(self, directory: Path, parties: int, limits: Limits = LIMITS, witnesses: Sequence[int] = ()) -> None:
        self.directory = directory
        certs.init_ca(directory, "local")
        roles = [*(f"party/{i}" for i in range(parties)), "dealer", *(f"witness/{i}" for i in witnesses)]
        for role in (*roles, *PEOPLE):
            self.issue(role)
        entries = [
            (f"127.0.0.1:{port}", self.path(role, "pem"))
            for port, role in zip(free_ports(len(roles)), roles, strict=True)
        ]
        certs.write_cluster_file(
            directory / "cluster.toml",
            "local",
            directory / "ca.pem",
            parties=entries[:parties],
            dealer=entries[parties],
            witnesses=dict(zip(witnesses, entries[parties + 1 :], strict=True)),
        )
        self.cluster = Cluster.load(directory / "cluster.toml")
        self.limits = limits
        self.issuers: tuple[Issuer, ...] = ()

    def issue(self, role: str, stem: str | None = None) -> Identity:
        """A new key and certificate for a role, in files named after it (or `stem`, in a directory of that name)."""
        where = self.directory / stem if stem else self.directory
        _, request = certs.request(where, "local", role)
        certs.sign(self.directory, request, role, where / f"{certs.file_stem(role)}.pem")
        return Identity.load(where / f"{certs.file_stem(role)}.key", where / f"{certs.file_stem(role)}.pem")

    def path(self, role: str, suffix: str) -> Path:
        """Where something of a role is."""
        return self.directory / f"{certs.file_stem(role)}.{suffix}"

    def identity(self, role: str) -> Identity:
        """Somebody's key and certificate."""
        return Identity.load(self.path(role, "key"), self.path(role, "pem"))

    def node(self, role: str, cluster: Cluster | None = None) -> Node:
        """What a party or the dealer is started with."""
        is_party = role != "dealer"
        return Node(
            cluster=cluster or self.cluster,
            role=role,
            key_path=self.path(role, "key"),
            certificate_path=self.path(role, "pem"),
            listen=self.cluster.endpoint(role).address,
            store=self.path(role, "store") if is_party else None,
            store_key=self.path(role, "store.key") if is_party else None,
            limits=self.limits,
            issuers=self.issuers if is_party else (),
        )


class InProcess:
    """A running cluster whose parts can be looked at; a context manager."""

    def __init__(self, directory: Path, parties: int, limits: Limits = LIMITS, witnesses: Sequence[int] = ()) -> None:
        """witnesses: of which parties."""
        self.keys = Keys(directory, parties, limits, witnesses)
        self.n = parties
        self.parties: dict[int, Party] = {}
        self.witnesses: dict[int, Party] = {}
        self.dealer: Dealer | None = None
        self._dealer_server: Server | None = None
        self._callers: list[Caller] = []

    def __enter__(self) -> Self:
        try:
            self.start_dealer()
            for i in range(self.n):
                self.start_party(i)
            for endpoint in self.keys.cluster.witnesses:
                self.start_witness(endpoint.index)
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start_dealer(self) -> Dealer:
        """A new dealer at the dealer's address."""
        self.dealer, self._dealer_server = build(self.keys.node("dealer"))
        self._dealer_server.start()
        self._dealer_server.set_serving(True)
        return self.dealer

    def stop_dealer(self) -> None:
        """As if it were killed: what it knows is gone, its calls break."""
        if self._dealer_server is not None:
            self._dealer_server._server.stop(0).wait(10)
            self._dealer_server = self.dealer = None

    def start_party(self, index: int) -> Party:
        """A new party at its address, on its store."""
        self.parties[index] = Party(self.keys.node(f"party/{index}"))
        self.parties[index].start()
        return self.parties[index]

    def start_witness(self, index: int) -> Party:
        """A witness of that party at its address, on its store."""
        self.witnesses[index] = Party(self.keys.node(f"witness/{index}"))
        self.witnesses[index].start()
        return self.witnesses[index]

    @property
    def holders(self) -> list[Party]:
        """All parties and witnesses."""
        return [*self.parties.values(), *self.witnesses.values()]

    def crash(self, index: int, then: Callable[[], None] = lambda: None) -> None:
        """As if the party were killed: its connections break, only its store remains.

        then: what lets a lane go on that a test holds; the rest of what it does reaches nobody.
        """
        party = self.parties.pop(index)
        party.lane._stopping.set()
        epoch = party.lane._epoch
        if epoch is not None:
            epoch.close()
        then()
        party.server._server.stop(0).wait(10)
        party.inbox.close(MpcInferError("killed"))
        party.lane._thread.join(20)
        assert not party.lane._thread.is_alive()
        party.former.close()
        party.audit.close()
        lock, party.store._lock_file = party.store._lock_file, None
        assert lock is not None
        os.close(lock)
        party.ledger.close()

    def wait_ready(self, timeout: float = READY) -> None:
        """Wait until all parties are connected."""
        wait_for(lambda: all(p.lane.state == "ready" for p in self.holders), timeout)

    def new_epoch(self) -> Callable[[], None]:
        """Call before something that ends the epoch; the result waits until all parties are ready in a new one."""
        before = {p.role: p.former.current and p.former.current.id for p in self.holders}

        def wait() -> None:
            def renewed(party: Party) -> bool:
                epoch = party.former.current
                return party.lane.state == "ready" and epoch is not None and epoch.id != before.get(party.role)

            wait_for(lambda: all(renewed(p) for p in self.holders))

        return wait

    def caller(self, role: str = "owner/alice") -> Caller:
        """Somebody who calls all parties."""
        self._callers.append(Caller(self.keys.cluster, self.keys.identity(role)))
        return self._callers[-1]

    def files(self) -> list[str]:
        """Everything at rest: what a request that failed must not add to."""
        stores = [self.keys.path(f"party/{i}", "store") for i in range(self.n)]
        return sorted(
            str(f.relative_to(self.keys.directory))
            for s in stores
            for f in s.rglob("*")
            if f.suffix != "" and f.is_file()
        )

    def stop(self) -> None:
        """Stop everything."""
        for caller in self._callers:
            caller.close()
        with ThreadPoolExecutor(2 * self.n) as pool:
            list(pool.map(lambda party: party.stop(), self.holders))
        self.parties.clear()
        self.witnesses.clear()
        self.stop_dealer()


class Caller:
    """An owner or client at the level of messages, so that each party can be sent something else.

    Messages and answers are those of all parties, and then of all witnesses.
    """

    def __init__(self, cluster: Cluster, identity: Identity) -> None:
        self.n = cluster.n
        self.cluster = cluster
        self.signer = Signer(identity)
        self._watched = [endpoint.index for endpoint in cluster.witnesses]
        self._channels = [channel.connect(e, cluster, identity, timeout=20) for e in cluster.holders]
        self.stubs: list[Any] = [party_pb2_grpc.PartyServiceStub(c) for c in self._channels]

    def close(self) -> None:
        """Hang up."""
        for opened in self._channels:
            opened.close()

    def at_all(self, method: str, requests: Sequence[Any], timeout: float | None = 60) -> list[Any]:
        """One call to each party at the same time: its answer, or our error. A request None is not sent."""

        def one(index: int) -> Any:
            if requests[index] is None:
                return None
            try:
                return getattr(self.stubs[index], method)(requests[index], timeout=timeout)
            except grpc.RpcError as error:
                return channel.from_rpc_error(error, f"party/{index}")

        with ThreadPoolExecutor(len(self.stubs)) as pool:
            return list(pool.map(one, range(len(self.stubs))))

    def grant(self, program: Program, name: str = "m", terms: Terms = EVERYBODY) -> Grant:
        """A first grant for a model."""
        kind = "generate" if program.caches else "infer"
        return Grant.first(
            name,
            program=program.digest(),
            entry_point=kind,
            reveals=program.reveal,
            cluster=self.cluster,
            terms=terms,
        )

    def deploys(
        self,
        program: Program,
        weights: Mapping[str, torch.Tensor],
        name: str = "m",
        grant: Grant | None = None,
    ) -> list[list[party_pb2.DeployRequest]]:
        """The messages of an upload, by party."""
        signed = (grant or self.grant(program, name)).sign(self.signer).message()
        shares = {p.name: split(weights[p.name], Z64, self.n) for p in program.parameters}
        request = secrets.token_bytes(16)
        uploads = []
        for i in range(self.n):
            last = i == self.n - 1
            data = b"".join(bytes(Z64.pack(shares[p.name][1])) for p in program.parameters) if last else b""
            header = party_pb2.DeployHeader(
                request_id=request,
                name=name,
                grant=signed,
                program=program.to_bytes(),
                size=len(data),
                digest=hashlib.sha256(data).digest(),
                salt=secrets.token_bytes(32),
                weights=[
                    party_pb2.WeightShare(
                        name=p.name,
                        shape=p.shape,
                        frac_bits=p.frac_bits,
                        seed=b"" if last else shares[p.name][0][i],
                    )
                    for p in program.parameters
                ],
            )
            chunks = [data[at : at + (1 << 20)] for at in range(0, len(data), 1 << 20)]
            uploads.append(
                [party_pb2.DeployRequest(header=header), *(party_pb2.DeployRequest(chunk=c) for c in chunks)]
            )
        return uploads + [copy.deepcopy(uploads[i]) for i in self._watched]

    def deploy(
        self,
        program: Program,
        weights: Mapping[str, torch.Tensor],
        name: str = "m",
        timeout: float = 60,
        grant: Grant | None = None,
    ) -> list[Any]:
        """Deploy at all parties; their answers or errors."""
        return self.at_all("Deploy", [iter(u) for u in self.deploys(program, weights, name, grant)], timeout)

    def set_grant(self, grant: Grant, version: int = 0, timeout: float = 60) -> list[Any]:
        """Replace a grant at all parties; their answers or errors."""
        request = party_pb2.SetGrantRequest(
            request_id=secrets.token_bytes(16),
            name=grant.name,
            version=version,
            grant=grant.sign(self.signer).message(),
        )
        return self.at_all("SetGrant", [request] * len(self.stubs), timeout)

    def inferences(self, x: torch.Tensor, name: str = "m", version: int = 0) -> list[party_pb2.InferRequest]:
        """The messages of a request, by party."""
        seeds, last = split(FixedPoint(16).encode(x), Z64, self.n)
        request = secrets.token_bytes(16)
        contents = [*({"seed": s} for s in seeds), {"data": bytes(Z64.pack(last))}]
        requests = [
            party_pb2.InferRequest(
                request_id=request,
                model=name,
                version=version,
                inputs=[tensor_pb2.Tensor(shape=x.shape, frac_bits=16, ring_bits=64, **content)],
                salt=secrets.token_bytes(32),
            )
            for content in contents
        ]
        return requests + [copy.deepcopy(requests[i]) for i in self._watched]

    def infer(self, x: torch.Tensor, name: str = "m", version: int = 0, timeout: float = 60) -> list[Any]:
        """Ask all parties; their answers or errors."""
        return self.at_all("Infer", self.inferences(x, name, version), timeout)


def reveal(answers: Sequence[Any]) -> torch.Tensor:
    """The output behind the parties' answers; raises the first error among them."""
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    outputs = [a.outputs[0] for a in answers if a.outputs]
    return combine([Z64.unpack(o.data, tuple(o.shape)) for o in outputs], Z64).double() / 65536


def kinds(answers: Sequence[Any]) -> list[str]:
    """The classes of the answers."""
    return [type(a).__name__ for a in answers]
