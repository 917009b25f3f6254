"""Who may do what, by the owner's grant and what was used already. Every party decides for itself.

A request is looked at twice: when it arrives, so that what has no chance costs nothing, and in its step, before any
correlation is spent, where the parties vote and the use is counted. A party that is not asked has a say in neither.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mpcinfer.errors import BudgetError, GrantError
from mpcinfer.party.catalogue import Model
from mpcinfer.party.ledger import Account, Ledger
from mpcinfer.trust.grant import QUERIES


class Admission:
    """What one request is about to use."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._used: list[tuple[Account, int, int, int]] = []

    def charge(self, model: Model, caller: str, queries: int, tokens: int = 0) -> None:
        """Count a use, if the grant allows it; GrantError or BudgetError otherwise. On the disk once this returns."""
        used = self._policy.charge(model, caller, queries, tokens)
        if used is not None:
            self._used.append(used)

    def give_back(self) -> None:
        """It has come to nothing."""
        for account, minute, queries, tokens in self._used:
            self._policy.ledger.add(account, minute, -queries, -tokens)
        self._used.clear()


class Policy:
    """One party's decisions. Thread-safe."""

    def __init__(self, ledger: Ledger, clock: Callable[[], float] = time.time) -> None:
        """clock: this party's own, in Unix seconds; each counts periods by its own."""
        self.ledger = ledger
        self._clock = clock
        self._lock = threading.Lock()

    def check(self, model: Model, caller: str, queries: int, tokens: int = 0) -> None:
        """GrantError or BudgetError if a request cannot be served; nothing is counted."""
        self._check(model, caller, queries, tokens, int(self._clock()))

    def charge(self, model: Model, caller: str, queries: int, tokens: int) -> tuple[Account, int, int, int] | None:
        """`check` and count at once: what was counted, if anything is."""
        with self._lock:
            now = int(self._clock())
            self._check(model, caller, queries, tokens, now)
            if caller == model.owner:
                return None
            used = Account(model.owner, model.name, caller), now // 60, queries, tokens
            self.ledger.add(*used)
            return used

    @contextmanager
    def admission(self) -> Iterator[Admission]:
        """While inside, the parties agree on a request: what was counted is given back if they do not."""
        admission = Admission(self)
        try:
            yield admission
        except BaseException:
            admission.give_back()
            raise

    def _check(self, model: Model, caller: str, queries: int, tokens: int, now: int) -> None:
        grant, what = model.grant, f"model {model.name!r} version {model.version}"
        if grant.revoked:
            raise GrantError(f"{what} has been revoked by its owner; ask him for another grant")
        if now < grant.terms.not_before:
            raise GrantError(f"the grant of {what} begins in {grant.terms.not_before - now} s; wait, or ask its owner")
        if grant.terms.not_after and now >= grant.terms.not_after:
            raise GrantError(f"the grant of {what} has expired; ask its owner to sign a new one")
        if caller == model.owner:
            return
        if not grant.terms.cover(caller):
            raise GrantError(f"{what} is not granted to {caller}; ask its owner")
        account = Account(model.owner, model.name, caller)
        for budget in grant.terms.limits():
            begin = now - now % budget.seconds
            wanted = queries if budget.unit == QUERIES else tokens
            if not wanted:
                continue
            spent = self.ledger.used(account, begin // 60)[0 if budget.unit == QUERIES else 1]
            if spent + wanted > budget.amount:
                raise BudgetError(
                    f"{caller} has {max(0, budget.amount - spent)} left of {budget} for model {model.name!r}, and this "
                    f"takes {wanted}; the next period begins in {begin + budget.seconds - now} s"
                )
