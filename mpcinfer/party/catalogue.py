"""The models a party holds shares of: programs, holdings, plans, and which versions all parties have."""

from __future__ import annotations

import base64
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from mpcinfer.errors import ForbiddenError, InputError, MpcInferError, NotFoundError, StoreError
from mpcinfer.graph.plan import Planner, constants, plan_masks
from mpcinfer.graph.program import Parameter, Program
from mpcinfer.nn.sampling import Choice
from mpcinfer.party.record import Deployment, WeightEntry
from mpcinfer.party.store import Store
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
    vocabulary: bytes = field(default=b"", repr=False)
    shares: dict[str, Shared] | None = field(default=None, repr=False)
    weights: dict[str, Weight] = field(default_factory=dict, repr=False)
    masked_in: bytes = b""
    masking_in: bytes = b""
    plans: dict[Any, tuple[Plan, bytes]] = field(default_factory=dict, repr=False)
    planner: Planner | None = field(default=None, repr=False)
    constants: dict[str, Public] | None = field(default=None, repr=False)

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
        return self._planned(tuple(shapes), parties, lambda planner: planner.inference(shapes)[0])

    def step_plan(self, tokens: int, room: int, choice: Choice | None, before: int, parties: int) -> tuple[Plan, bytes]:
        """The plan of a step of a session (see `Planner.step`), and its digest; traced once."""
        key = tokens, room, choice, before
        return self._planned(key, parties, lambda planner: planner.step(tokens, room, choice, before)[0])

    def _planned(self, key: Any, parties: int, trace: Callable[[Planner], Plan]) -> tuple[Plan, bytes]:
        if self.planner is None:
            self.planner = Planner(self.program, parties=parties, deployment=self.id.hex())
        if key not in self.plans:
            plan = trace(self.planner)
            if len(self.plans) >= _MAX_PLANS:
                self.plans.pop(next(iter(self.plans)))
            self.plans[key] = plan, plan.digest()
        return self.plans[key]

    def mask_plan(self, parties: int) -> Plan:
        """The plan for opening the weights' masks."""
        return plan_masks(self.program, parties=parties, deployment=self.id.hex())[0]

    def holdings(self) -> dict[str, Shared | Weight | Public]:
        """What the interpreter needs."""
        if self.constants is None:
            self.constants = constants(self.program)
        return {**(self.shares or {}), **self.weights, **self.constants}


@dataclass(frozen=True)
class _Unserved:
    """A deployment that not all parties have whole."""

    name: str
    version: int
    damaged: tuple[int | str, ...]
    missing: tuple[int | str, ...]

    def error(self) -> MpcInferError:
        what = f"model {self.name!r} version {self.version}"
        remedy = "remove it and deploy it again"
        if self.damaged:
            parties = " and ".join(map(str, self.damaged))
            return StoreError(f"{what}: the stored copy of party {parties} is damaged; {remedy}")
        return NotFoundError(f"{what}: party {' and '.join(map(str, self.missing))} does not hold it; {remedy}")


class Catalogue:
    """The store's content, as models. Thread-safe."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._models: dict[bytes, Model] = {}
        self._unserved: dict[bytes, _Unserved] = {}  # what not all parties have whole, and what to say about it
        self._unreadable: set[bytes] = set()
        self._lock = threading.RLock()
        for deployment in store.deployments():
            try:
                self._add(deployment)
            except (MpcInferError, KeyError, ValueError, TypeError):
                self._unreadable.add(deployment.id)
                _log.error("stored deployment %s is not of a kind this version knows", deployment.id.hex()[:8])
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
            base64.b64decode(meta.get("vocabulary", "")),
        )
        self._models[deployment.id] = model
        return model

    def inventory(self) -> dict[str, Any]:
        """What the other parties need to know: by deployment id in hex, names and versions, and what cannot be used."""
        with self._lock:
            return {
                "models": {m.id.hex(): [m.name, m.version, m.deployment.pending] for m in self._models.values()},
                "damaged": [*self._store.damaged, *(i.hex() for i in self._unreadable)],
            }

    def agree(self, index: int | str, others: Mapping[int | str, Mapping[str, Any]]) -> None:
        """Take in the inventories of all other parties and of the witnesses: only what all hold is served.

        A deploy that broke off while its parties were committing is settled: kept if all have committed it, removed
        if one has not, since then none can have told its owner that it is there.
        """
        with self._lock:
            inventories = {index: self.inventory(), **others}
            self._unserved = {}
            known = {
                i: (name, version) for inv in inventories.values() for i, (name, version, _) in inv["models"].items()
            }
            for i, (name, version) in known.items():
                damaged = [peer for peer, inv in inventories.items() if i in inv["damaged"]]
                missing = [peer for peer, inv in inventories.items() if i not in inv["models"] and peer not in damaged]
                confirmed = any(not inv["models"].get(i, (0, 0, True))[2] for inv in inventories.values())
                own = self._models.get(bytes.fromhex(i))
                if not damaged and not missing:
                    if own is not None and own.deployment.pending:
                        self.confirm(own)
                    continue
                if own is not None and own.deployment.pending and missing and not confirmed:
                    _log.warning("model %s version %d was not deployed everywhere; removing it", name, version)
                    self.remove(own.id)
                    continue
                why = _Unserved(name, version, tuple(damaged), tuple(missing))
                self._unserved[bytes.fromhex(i)] = why
                _log.warning("%s", why.error())

    def models(self) -> list[Model]:
        """The models all parties hold, by name and version."""
        with self._lock:
            served = [m for m in self._models.values() if m.id not in self._unserved and not m.deployment.pending]
        return sorted(served, key=lambda m: (m.name, m.version))

    def find(self, name: str, version: int) -> Model:
        """The model of that name and version (0: the newest).

        StoreError if a party's copy is damaged, NotFoundError otherwise; they say what there is and what to do.
        """
        served = self.models()
        found = [m for m in served if m.name == name and version in (0, m.version)]
        if found:
            return max(found, key=lambda m: m.version)
        with self._lock:
            broken = [u for u in self._unserved.values() if u.name == name and version in (0, u.version)]
        if broken:
            raise max(broken, key=lambda u: u.version).error()
        known = ", ".join(sorted({m.name for m in served})) or "none"
        raise NotFoundError(f"no model {name!r}{f' version {version}' if version else ''}; deployed: {known}")

    def matching(self, name: str, version: int) -> list[bytes]:
        """The ids of all versions of a name (0), or of one, as far as this party knows, served or not."""
        with self._lock:
            return [m.id for m in self._models.values() if m.name == name and version in (0, m.version)]

    def next_version(self, name: str, owner: str) -> int:
        """The version a new deployment gets, as far as this party knows; ForbiddenError if another owns the name."""
        with self._lock:
            same = [m for m in self._models.values() if m.name == name]
            if any(m.owner != owner for m in same):
                raise ForbiddenError(f"the name {name!r} belongs to another owner; choose another name")
            return max((m.version for m in same), default=0) + 1

    def commit(self, request_id: bytes, deployment: bytes, version: int) -> Model:
        """Make a staged upload a deployment, pending until `confirm`."""
        with self._lock:
            return self._add(self._store.commit(request_id, deployment, version, pending=True))

    def confirm(self, model: Model) -> None:
        """All parties have committed this model: serve it."""
        with self._lock:
            model.deployment = self._store.confirm(model.id)

    def remove(self, deployment: bytes) -> None:
        """Delete a deployment, damaged or not, from the store and from memory; fine if there is none."""
        with self._lock:
            self._models.pop(deployment, None)
            self._unserved.pop(deployment, None)
            self._unreadable.discard(deployment)
            with suppress(NotFoundError):
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
