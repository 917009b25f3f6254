"""What a dealer holds of one session: keys, plans, tapes that not all have named, and the masks that outlive a tape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mpcinfer.errors import AgreementError, InputError, NotFoundError
from mpcinfer.protocol.cache import CacheUse, RowStore, text_count
from mpcinfer.protocol.correlation import free_values
from mpcinfer.protocol.session import KeyChain, TapeKeys
from mpcinfer.protocol.tracing import Plan

_MAX_PLANS = 256  # a party tells again what was forgotten
Caches = dict[str, RowStore]  # one text's


@dataclass
class NamedTape:
    """A tape that not all parties have named yet: the plan, who has named it, and whether it is of no use any more."""

    digest: bytes
    named: set[int] = field(default_factory=set)
    burnt: bool = False
    # Once all have named the plan: the keys of all parties, and the masks of each text's caches and of the deployment's
    # weights. The session may forget these before the last party's part is begun: the first may have its own, and tell
    # that the text has ended.
    keys: list[TapeKeys] = field(default_factory=list, repr=False)
    caches: list[Caches] = field(default_factory=list, repr=False)
    fixed: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)


@dataclass
class Session:
    """The nonces of all, and one key per party that only that party and the dealer have."""

    nonce: bytes
    nonces: dict[int, bytes] = field(default_factory=dict)
    # by party: what both ends sent of the key exchange, and what it yielded
    public: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    secrets: dict[int, bytes] = field(default_factory=dict, repr=False)
    keys: list[KeyChain] = field(default_factory=list, repr=False)
    plans: dict[bytes, Plan] = field(default_factory=dict)
    tapes: dict[bytes, NamedTape] = field(default_factory=dict)
    spent: set[bytes] = field(default_factory=set)  # dealt or burnt: never again
    # masks B of weights by (deployment, weight): kept for the products that refer to them
    fixed: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict, repr=False)
    # masks of caches by slot and cache
    slots: dict[bytes, Caches] = field(default_factory=dict, repr=False)
    witnesses: set[int] = field(default_factory=set)  # the parties whose witnesses have joined
    corrected: dict[bytes, bytes] = field(default_factory=dict)  # by tape: what the last party's witness will ask for
    ended: bool = False

    def plan(self, digest: bytes, told: bytes) -> Plan:
        """The plan with this digest, which a party tells or has told; NotFoundError if nobody has, or long ago."""
        plan = Plan.from_bytes(told) if told else self.plans.pop(digest, None)
        if plan is None:
            raise NotFoundError("the dealer does not know this plan (any more); tell it")
        if told and plan.digest() != digest:
            raise InputError("the plan does not have the digest it was announced with")
        self.plans.pop(digest, None)
        self.plans[digest] = plan  # at the end: the front is what was not used for longest
        if len(self.plans) > _MAX_PLANS:
            self.plans.pop(next(iter(self.plans)))
        return plan

    def check_rows(self, plan: Plan, use: CacheUse | None) -> None:
        """The plan's products are of rows that the dealer has, and what it appends comes next and once a run."""
        growing = [item.cache for _, item in plan.entries if item.growing]  # type: ignore[attr-defined]
        used = {item.cache for _, item in plan.entries if hasattr(item, "cache")}
        if not used:
            return
        if use is None:
            raise InputError("a plan for caches without saying whose they are")
        if len(set(growing)) < len(growing):
            raise InputError("a plan appends to a cache once")
        texts = {text_count(item) for _, item in plan.entries} - {None} if use.beside else {1}
        if len({each.slot for each in use.all}) < len(use.all) or texts != {len(use.all)}:
            raise InputError("a plan for another number of texts than it is to be of, or for one of them twice")
        for each in use.all:
            caches = self.slots.get(each.slot, {})
            if any((caches[name].count if name in caches else 0) != each.count for name in used):
                raise AgreementError("the dealer has another number of rows of a cache than the parties")

    def keep_masks(self, keys: list[TapeKeys], plan: Plan, use: CacheUse | None) -> list[Caches]:
        """Keep the masks that outlive a tape: those of all texts' caches, in their order."""
        slots = [] if use is None else [self.slots.setdefault(each.slot, {}) for each in use.all]
        for name, item in plan.entries:
            if not item.kept:
                continue
            (value,) = free_values(item, name, [key.kept for key in keys]).values()
            if item.lasting:
                self.fixed[plan.deployment, item.operand] = value
            if item.growing:
                for caches, rows in zip(slots, value if len(slots) > 1 else [value], strict=True):
                    caches.setdefault(item.operand, RowStore()).append(rows)
        return slots

    def fixed_of(self, deployment: str) -> dict[str, torch.Tensor]:
        """The masks of a deployment's weights."""
        return {weight: mask for (owner, weight), mask in self.fixed.items() if owner == deployment}

    def forget(self, slots: Sequence[bytes], deployment: str) -> None:
        """Drop masks. What all parties have asked for before is dealt with them all the same."""
        for slot in slots:
            self.slots.pop(slot, None)
        for weight in self.fixed_of(deployment) if deployment else ():
            del self.fixed[deployment, weight]
