"""The models a party holds shares of: programs, holdings, plans, and which versions all parties have."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mpcinfer.errors import ForbiddenError, InputError, NotFoundError, StoreError
from mpcinfer.graph.plan import constants, plan_inference, plan_masks
from mpcinfer.graph.program import Parameter, Program
from mpcinfer.party.store import Deployment, Store, WeightEntry
from mpcinfer.protocol.tracing import Plan
from mpcinfer.protocol.types import Public, Shared, Weight
from mpcinfer.ring import prg
from mpcinfer.ring.domain import Z64

_log = logging.getLogger(__name__)
_MAX_PLANS = 32  # per model, one for each shape of inputs seen lately


@dataclass
class Model:
    """One deployment. `weights` are there once their masks are opened in this epoch."""

    deployment: Deployment
    program: Program
    name: str
    owner: str
    created: float
    shares: dict[str, Shared] | None = field(default=None, repr=False)
    weights: dict[str, Weight] = field(default_factory=dict, repr=False)
    masked_in: bytes = b""
    plans: dict[tuple[tuple[int, ...], ...], tuple[Plan, bytes]] = field(default_factory=dict, repr=False)

    @property
    def id(self) -> bytes:
        """The deployment id."""
        return self.deployment.id

    @property
    def version(self) -> int:
        """The version under its name."""
        return self.deployment.version

    def plan(self, shapes: Sequence[tuple[int, ...]], parties: int) -> tuple[Plan, bytes]:
        """The plan for inputs of these shapes, and its digest; traced once."""
        key = tuple(shapes)
        if key not in self.plans:
            plan, _, _ = plan_inference(self.program, shapes, parties=parties, deployment=self.id.hex())
            if len(self.plans) >= _MAX_PLANS:
                self.plans.pop(next(iter(self.plans)))
            self.plans[key] = plan, plan.digest()
        return self.plans[key]

    def mask_plan(self, parties: int) -> Plan:
        """The plan for opening the weights' masks."""
        return plan_masks(self.program, parties=parties, deployment=self.id.hex())[0]

    def holdings(self) -> dict[str, Shared | Weight | Public]:
        """What the interpreter needs."""
        return {**(self.shares or {}), **self.weights, **constants(self.program)}


class Catalogue:
    """The store's content, as models. Thread-safe."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._models: dict[bytes, Model] = {}
        self._absent: dict[bytes, str] = {}  # deployments some party lacks, and what to say about it
        self._lock = threading.RLock()
        for deployment in store.deployments():
            self._add(deployment)
        for name, error in store.damaged.items():
            _log.error("stored deployment %s cannot be used: %s", name[:8], error)

    def _add(self, deployment: Deployment) -> Model:
        meta = deployment.metadata
        model = Model(
            deployment,
            Program.from_bytes(str(meta["program"]).encode()),
            str(meta["name"]),
            str(meta["owner"]),
            float(meta["created"]),
        )
        self._models[deployment.id] = model
        return model

    def ids(self) -> list[bytes]:
        """All deployments this party holds."""
        with self._lock:
            return list(self._models)

    def agree(self, held: dict[int, set[bytes]]) -> None:
        """Take in what every other party holds; only what all hold is served."""
        with self._lock:
            self._absent = {
                i: f"party {peer} does not hold it" for i in self._models for peer, ids in held.items() if i not in ids
            }
            for i, why in self._absent.items():
                model = self._models[i]
                _log.warning("model %s version %d is not served: %s", model.name, model.version, why)

    def models(self) -> list[Model]:
        """The models all parties hold, by name and version."""
        with self._lock:
            served = [m for m in self._models.values() if m.id not in self._absent]
        return sorted(served, key=lambda m: (m.name, m.version))

    def find(self, name: str, version: int) -> Model:
        """The model of that name and version (0: the newest); NotFoundError says what there is."""
        with self._lock:
            found = [m for m in self._models.values() if m.name == name and version in (0, m.version)]
            served = [m for m in found if m.id not in self._absent]
            if served:
                return max(served, key=lambda m: m.version)
            if found:
                raise NotFoundError(f"model {name!r} is incomplete: {self._absent[found[0].id]}; deploy it again")
            if self._store.damaged:
                damaged = f" ({len(self._store.damaged)} stored deployments are damaged; see this party's log)"
            else:
                damaged = ""
            known = ", ".join(sorted({m.name for m in self._models.values()})) or "none"
            raise NotFoundError(f"no model {name!r}{f' version {version}' if version else ''}; deployed: {known}{damaged}")

    def matching(self, name: str, version: int) -> list[Model]:
        """All versions of a name (0), or one; NotFoundError if there is none. Incomplete ones count."""
        with self._lock:
            found = [m for m in self._models.values() if m.name == name and version in (0, m.version)]
        if not found:
            raise NotFoundError(f"no model {name!r}{f' version {version}' if version else ''}")
        return found

    def next_version(self, name: str, owner: str) -> int:
        """The version a new deployment gets, as far as this party knows; ForbiddenError if another owner has the name."""
        with self._lock:
            same = [m for m in self._models.values() if m.name == name]
            if any(m.owner != owner for m in same):
                raise ForbiddenError(f"the name {name!r} belongs to another owner; choose another name")
            return max((m.version for m in same), default=0) + 1

    def commit(self, request_id: bytes, deployment: bytes, version: int) -> Model:
        """Make a staged upload a deployment."""
        with self._lock:
            return self._add(self._store.commit(request_id, deployment, version))

    def remove(self, deployment: bytes) -> None:
        """Delete a deployment from the store and from memory."""
        with self._lock:
            self._models.pop(deployment, None)
            self._absent.pop(deployment, None)
            self._store.remove(deployment)

    def load(self, model: Model) -> dict[str, Shared]:
        """This party's shares of a model's parameters, from disk the first time."""
        if model.shares is None:
            shares = {}
            for entry, data in self._store.weights(model.id):
                shares[entry.name] = Shared(_tensor(entry, data), entry.frac_bits)
            model.shares = shares
        return model.shares


def _tensor(entry: WeightEntry, data: bytearray | None) -> torch.Tensor:
    if entry.seed is not None:
        return prg.expand(entry.seed, entry.shape, Z64)
    if data is None:
        raise StoreError(f"weight {entry.name} has neither a seed nor data; remove the model and deploy it again")
    if not data:
        return torch.empty(entry.shape, dtype=torch.int64)
    return torch.frombuffer(data, dtype=torch.int64).reshape(entry.shape)


def check_manifest(program: Program, weights: Sequence[WeightEntry]) -> None:
    """InputError unless the uploaded weights are exactly the program's parameters, in order."""

    def line(w: Parameter | WeightEntry) -> tuple[str, tuple[int, ...], int]:
        return w.name, tuple(w.shape), w.frac_bits

    if [line(p) for p in program.parameters] != [line(w) for w in weights]:
        raise InputError("the uploaded weights are not the program's parameters")
