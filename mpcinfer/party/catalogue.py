"""The models a party holds shares of: programs, holdings, plans, and which versions all parties have."""

from __future__ import annotations

import base64
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from mpcinfer.errors import GrantError, InputError, MpcInferError, NotFoundError, StoreError
from mpcinfer.graph.plan import Planner, constants, plan_masks
from mpcinfer.graph.program import Program
from mpcinfer.graph.sizes import BATCH, ROWS, solve
from mpcinfer.nn.sampling import Choice
from mpcinfer.party.grants import Granted, Grants
from mpcinfer.party.record import Deployment, WeightEntry
from mpcinfer.party.store import Store
from mpcinfer.protocol.tracing import Plan
from mpcinfer.protocol.types import Public, Shared, Weight
from mpcinfer.ring import prg
from mpcinfer.ring.domain import Z64
from mpcinfer.trust.grant import Grant, Terms
from mpcinfer.trust.signing import Signed

_log = logging.getLogger(__name__)
_MAX_PLANS = 64  # per model, one for each shape of inputs, and number of requests, seen lately


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
    step_seconds: float = 0.0  # of the last step that evaluated it, at party 0
    plans: dict[Any, tuple[Plan, bytes]] = field(default_factory=dict, repr=False)
    planner: Planner | None = field(default=None, repr=False)
    constants: dict[str, Public] | None = field(default=None, repr=False)
    granted: Granted | None = field(default=None, repr=False)
    problem: MpcInferError | None = None  # why there is no grant that holds

    @property
    def grant(self) -> Grant:
        """What the owner has granted; if nothing that holds, the error that says so."""
        if self.granted is None or self.problem is not None:
            raise type(self.problem or StoreError())(f"model {self.name!r} version {self.version}: {self.problem}")
        return self.granted.grant

    def visible(self, viewer: str) -> bool:
        """Whether this model exists for somebody: for its owner, and whoever is named in the grant that holds."""
        return viewer == self.owner or (self.granted is not None and self.granted.grant.terms.cover(viewer))

    @property
    def id(self) -> bytes:
        """The deployment id."""
        return self.deployment.id

    @property
    def version(self) -> int:
        """The version under its name."""
        return self.deployment.version

    @property
    def full_name(self) -> str:
        """The name that is this owner's only: owner/NAME's model m is NAME/m."""
        return f"{self.owner.partition('/')[2]}/{self.name}"

    def rows(self, shapes: Sequence[tuple[int, ...]]) -> int:
        """How many rows inputs of these shapes have, each of which may yield an answer."""
        declared = [(v.name, v.shape) for v in self.program.inputs]
        found = solve(self.program.sizes, declared, shapes)
        return next((n for size, n in zip(self.program.sizes, found, strict=True) if size.name in (BATCH, ROWS)), 1)

    def plan(self, shapes: Sequence[tuple[int, ...]], parties: int, count: int = 1) -> tuple[Plan, bytes]:
        """The plan for inputs of these shapes, of so many requests in one run, and its digest; traced once."""
        return self._planned((tuple(shapes), count), parties, lambda planner: planner.inference(shapes, count)[0])

    def step_plan(
        self, tokens: int, room: int, choice: Choice | None, before: int, parties: int, count: int = 1
    ) -> tuple[Plan, bytes]:
        """The plan of a step of a session, or of so many (see `Planner.step`), and its digest; traced once."""
        about = tokens, room, choice, before, count
        return self._planned(about, parties, lambda planner: planner.step(*about)[0])

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

    def forget(self) -> None:
        """What is secret of it leaves memory, and what was traced for it, whoever still refers to it."""
        self.renew()
        self.planner = None
        self.plans.clear()

    def renew(self) -> None:
        """Its shares are read from the disk again, and its weights' masks opened anew, before it is used again."""
        self.shares, self.weights, self.masked_in = None, {}, b""

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
    owner: str
    terms: Terms | None
    damaged: tuple[int | str, ...]  # if nobody's is, and none is missing, their generations differ
    missing: tuple[int | str, ...]

    def visible(self, viewer: str) -> bool:
        return viewer == self.owner or (self.terms is not None and self.terms.cover(viewer))

    def error(self) -> MpcInferError:
        what = f"model {self.name!r} version {self.version}"
        remedy = "remove it and deploy it again"
        if self.damaged:
            parties = " and ".join(map(str, self.damaged))
            return StoreError(f"{what}: the stored copy of party {parties} is damaged; {remedy}")
        if not self.missing:
            return StoreError(
                f"{what}: the parties' shares are of different generations; restore the newer, or {remedy}"
            )
        return NotFoundError(f"{what}: party {' and '.join(map(str, self.missing))} does not hold it; {remedy}")


class Catalogue:
    """The store's content, as models. Thread-safe."""

    def __init__(self, store: Store, grants: Grants) -> None:
        self._store = store
        self._grants = grants
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
        try:
            model.granted = self._grants.stored(deployment, model.program)
            self._grants.check_parties(model.granted)
        except MpcInferError as error:
            model.problem = error
            _log.error("model %s version %d is not served: %s", model.name, model.version, error)
        self._models[deployment.id] = model
        return model

    def inventory(self) -> dict[str, Any]:
        """What the other parties need to know: by deployment id in hex, what is held, and what cannot be used."""
        with self._lock:
            return {
                "models": {m.id.hex(): _line(m, self._store.fresh(m.id)) for m in self._models.values()},
                "damaged": [*self._store.damaged, *(i.hex() for i in self._unreadable)],
            }

    def agree(self, index: int | str, others: Mapping[int | str, Mapping[str, Any]]) -> None:
        """Take in the inventories of all other parties and of the witnesses: only what all hold is served.

        A deploy that broke off while its parties were committing is settled: kept if all have committed it, removed
        if one has not, since then none can have told its owner that it is there. Of different grants the newest holds.
        """
        with self._lock:
            inventories = {index: self.inventory(), **others}
            self._unserved = {}
            known: dict[str, list[Any]] = {}
            for inventory in inventories.values():
                known |= inventory["models"]
            for i, (name, version, _, owner, *_) in known.items():
                damaged = [peer for peer, inv in inventories.items() if i in inv["damaged"]]
                missing = [peer for peer, inv in inventories.items() if i not in inv["models"] and peer not in damaged]
                confirmed = any(not inv["models"].get(i, (0, 0, True))[2] for inv in inventories.values())
                lines = [inv["models"][i] for inv in inventories.values() if i in inv["models"]]
                statements = [line[4] for line in lines]
                own = self._models.get(bytes.fromhex(i))
                if own is not None:
                    self._take_newest(own, statements)
                if not damaged and not missing and own is not None:
                    if own.deployment.pending:
                        self.confirm(own)
                    if self._one_generation(own, [(line[5], line[6]) for line in lines]):
                        continue
                if own is not None and own.deployment.pending and missing and not confirmed:
                    _log.warning("model %s version %d was not deployed everywhere; removing it", name, version)
                    self.remove(own.id)
                    continue
                terms = self._grants.terms(owner, statements)
                why = _Unserved(name, version, owner, terms, tuple(damaged), tuple(missing))
                self._unserved[bytes.fromhex(i)] = why
                _log.warning("%s", why.error())

    def models(self, viewer: str | None = None) -> list[Model]:
        """The models all parties hold, by name and version; only those that exist for the viewer, if one is given."""
        with self._lock:
            served = [m for m in self._models.values() if m.id not in self._unserved and not m.deployment.pending]
        shown = [m for m in served if viewer is None or m.visible(viewer)]
        return sorted(shown, key=lambda m: (m.name, m.owner, m.version))

    def find(self, name: str, version: int, viewer: str | None = None) -> Model:
        """The model of that name (`m`, or `alice/m` for that of owner/alice) and version (0: the newest).

        What does not exist for the viewer is answered like what does not exist. Owners mean their own, if they have
        one of that name. StoreError if a party's copy is damaged, InputError if several owners have such a model,
        NotFoundError otherwise; they say what there is and what to do.
        """
        served = self.models(viewer)
        found = [m for m in served if called(m, name) and version in (0, m.version)]
        found = [m for m in found if m.owner == viewer] or found
        owners = sorted({m.owner for m in found})
        if len(owners) > 1:
            names = " or ".join(f"{owner.partition('/')[2]}/{name}" for owner in owners)
            raise InputError(f"several owners have a model {name!r}; name it {names}")
        if found:
            return max(found, key=lambda m: m.version)
        with self._lock:
            broken = [u for u in self._unserved.values() if called(u, name) and version in (0, u.version)]
        broken = [u for u in broken if viewer is None or u.visible(viewer)]
        if broken:
            raise max(broken, key=lambda u: u.version).error()
        known = ", ".join(sorted({m.name for m in served})) or "none"
        raise NotFoundError(f"no model {name!r}{f' version {version}' if version else ''}; deployed: {known}")

    def matching(self, name: str, version: int, owner: str) -> list[bytes]:
        """The ids of all versions of an owner's name (0), or of one, as far as this party knows, served or not."""
        with self._lock:
            same = [m for m in self._models.values() if (m.name, m.owner) == (name, owner)]
            return [m.id for m in same if version in (0, m.version)]

    def foreign(self, deployment: bytes, owner: str) -> bool:
        """Whether this party knows a deployment as that of somebody else."""
        with self._lock:
            return deployment in self._models and self._models[deployment].owner != owner

    def refreshable(self, name: str, version: int, owner: str) -> list[Model]:
        """The versions (0: all) of a name (empty: of any) that are served, of an owner (empty: of any), by id.

        NotFoundError if there are none.
        """
        found = [m for m in self.models() if owner in ("", m.owner) and version in (0, m.version)]
        found = [m for m in found if not name or called(m, name)]
        if not found:
            raise NotFoundError(f"no model {name!r}{f' version {version}' if version else ''}")
        return sorted(found, key=lambda m: m.id)

    def stage_refresh(self, model: Model, generation: str, shares: Iterable[bytes]) -> bytes:
        """Put other shares of a model on the disk, which do not hold yet: the SHA-256 of all."""
        return self._store.refresh(model.id, generation, shares)

    def drop_refresh(self, model: Model) -> None:
        """Not all parties have staged theirs."""
        self._store.drop_fresh(model.id)

    def commit_refresh(self, model: Model) -> None:
        """All parties have staged theirs: they hold from now on."""
        with self._lock:
            model.deployment = self._store.take_fresh(model.id)
            model.renew()

    def _one_generation(self, model: Model, held: Sequence[tuple[str, str]]) -> bool:
        """Settle a refresh that broke off, from all parties' generations and those that wait to replace them.

        Who has committed knows that all have staged. Whether all have shares that belong together now.
        """
        current = sorted({generation for generation, _ in held})
        if len(current) == 1:
            self.drop_refresh(model)
            return True
        for generation in current:
            if all(generation == now or (waiting and generation == waiting) for now, waiting in held):
                if model.deployment.generation != generation:
                    self.commit_refresh(model)
                return True
        return False

    def next_version(self, name: str, owner: str) -> int:
        """The version a new deployment gets under its owner's name, as far as this party knows."""
        with self._lock:
            return max((m.version for m in self._models.values() if (m.name, m.owner) == (name, owner)), default=0) + 1

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
            with suppress(NotFoundError):  # first: what is on the disk stays known
                self._store.remove(deployment)
            self._grants.remove(deployment)
            if (model := self._models.pop(deployment, None)) is not None:
                model.forget()
            self._unserved.pop(deployment, None)
            self._unreadable.discard(deployment)

    def stage_grant(self, name: str, version: int, owner: str, signed: Signed) -> tuple[Model, Granted]:
        """Check what is to replace an owner's grant, and put it on the disk; it does not hold yet."""
        model = self.find(f"{owner.partition('/')[2]}/{name}", version, owner)
        granted = self._grants.verified(signed, owner, model.name, model.program)
        if model.granted is not None:
            model.granted.grant.check_successor(granted.grant)
        elif self._grants.newest(model.deployment, model.program, [signed.to_json()]) is None:
            raise GrantError(f"this grant is for another deployment of {name!r}; sign one for this deployment")
        self._grants.stage(model.id, signed)
        return model, granted

    def set_grant(self, model: Model, granted: Granted) -> None:
        """All parties have staged it: it holds from now on."""
        with self._lock:
            self._grants.commit(model.id)
            model.granted, model.problem = granted, None

    def _take_newest(self, model: Model, statements: list[Any]) -> None:
        """Of the grants that the parties hold, the newest that verifies."""
        newest = self._grants.newest(model.deployment, model.program, statements)
        if newest is None or (model.granted is not None and newest.order <= model.granted.order):
            return
        _log.warning("model %s version %d: another party holds a newer grant; taking it", model.name, model.version)
        self._grants.stage(model.id, newest.signed)
        self.set_grant(model, newest)

    def load(self, model: Model) -> dict[str, Shared]:
        """This party's shares of a model's parameters, from disk the first time."""
        if model.shares is None:
            shares = {}
            for entry, data in self._store.weights(model.id):
                shares[entry.name] = Shared(_tensor(entry, data), entry.frac_bits)
            model.shares = shares
        return model.shares


def called(model: Model | _Unserved, name: str) -> bool:
    """Whether somebody who says `name`, or `owner/name`, may mean this model."""
    owner, slash, own = name.rpartition("/")
    return model.name == own and (not slash or model.owner == f"owner/{owner}")


def _line(model: Model, fresh: str) -> list[Any]:
    """What the other parties are told of a model."""
    grant = model.granted.signed.to_json() if model.granted is not None else None
    return [model.name, model.version, model.deployment.pending, model.owner, grant, model.deployment.generation, fresh]


def _tensor(entry: WeightEntry, data: bytearray | None) -> torch.Tensor:
    if entry.seed is not None:
        return prg.expand(entry.seed, entry.shape, Z64)
    if data is None:
        raise StoreError(f"weight {entry.name} has neither a seed nor data; remove the model and deploy it again")
    flat = torch.frombuffer(data, dtype=torch.int64) if data else torch.empty(0, dtype=torch.int64)
    return flat.reshape(entry.shape)
