"""Grants: what a model's owner has signed about who may use a deployment, for what, how often and until when.

A grant names everything that it holds for: the program, the weights (by a salted commitment), the cluster and the keys
of its parties. Shown for anything else it is worth nothing. The one with the highest serial replaces all before it.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from mpcinfer.config import Cluster
from mpcinfer.errors import GrantError, InputError
from mpcinfer.trust.signing import Signed, Signer, open_signed

PURPOSE = "grant"
QUERIES, TOKENS = "queries", "tokens"
EVERYBODY = "*"
PERIODS = {"minute": 60, "hour": 3600, "day": 86400, "week": 7 * 86400, "year": 366 * 86400}

_FORMAT = 1
_MOST = 1 << 53  # of any number: what JSON readers everywhere take exactly
_MOST_LISTED = 1000
_NAME = r"[a-z0-9](?:[a-z0-9-]{0,48}[a-z0-9])?"
_CLIENT = re.compile(rf"\*|client/\*|(?:client|owner)/{_NAME}|jwt/{_NAME}/(?:\*|[!-)+-~]{{1,255}})")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_WORD = re.compile(r"[a-z-]{1,32}")
_HEX = re.compile(r"(?:[0-9a-f]{2}){1,32}")
_PIN = re.compile(r"sha256:[0-9a-f]{64}")
_RATE = re.compile(r"([0-9]{1,15})/([0-9]{0,9})(minute|hour|day|week|year|s)")


def check_model_name(name: str) -> str:
    """Return `name` if a model can be called so; otherwise InputError."""
    if not _MODEL.fullmatch(name):
        raise InputError(
            "a model's name is 1 to 64 letters, digits, dots, dashes and underscores, a letter or digit first"
        )
    return name


@dataclass(frozen=True)
class Budget:
    """So many queries or tokens for each client in each period, a number of whole minutes up to 366 days.

    Periods are counted from 1970, so that a day begins at 0:00 UTC.
    """

    unit: str
    amount: int
    seconds: int

    def __post_init__(self) -> None:
        if self.unit not in (QUERIES, TOKENS) or not 0 <= self.amount <= _MOST:
            raise GrantError("a budget is a number of queries or of tokens, 0 or more")
        if not 60 <= self.seconds <= PERIODS["year"] or self.seconds % 60:
            raise GrantError("a budget's period is a number of whole minutes, up to 366 days")

    @staticmethod
    def parse(unit: str, text: str) -> Budget:
        """`100/day`, `50/2hour` or `10/90s`-like text; InputError if it is none."""
        match = _RATE.fullmatch(text.strip())
        if match is None:
            raise InputError(f"{text!r} is no budget: write 100/day, 1000/hour, 5/minute or 200/2week")
        period = int(match[2] or 1) * (1 if match[3] == "s" else PERIODS[match[3]])
        try:
            return Budget(unit, int(match[1]), period)
        except GrantError as error:
            raise InputError(f"{text!r}: {error}") from error

    def __str__(self) -> str:
        whole = [(name, self.seconds // size) for name, size in PERIODS.items() if self.seconds % size == 0]
        name, count = whole[-1]
        return f"{self.amount} {self.unit} per {name if count == 1 else f'{count} {name}s'}"


@dataclass(frozen=True)
class Terms:
    """Who may use a model, how often and when. By default: all clients of the cluster, without a limit.

    clients: roles (`client/alice`, `owner/bob`, `jwt/ISSUER/SUBJECT`), `client/*`, `jwt/ISSUER/*`, or `*` for all of
    these but owners. Each client has the budgets for itself. rate: queries a minute of each, 0 for any number.
    not_before, not_after: in Unix seconds, 0 for none. The owner may use his model whenever the grant holds.
    """

    clients: tuple[str, ...] = (EVERYBODY,)
    budgets: tuple[Budget, ...] = ()
    rate: int = 0
    not_before: int = 0
    not_after: int = 0

    def __post_init__(self) -> None:
        for client in self.clients:
            if not isinstance(client, str) or not _CLIENT.fullmatch(client):
                raise GrantError(f"{client!r} is no client: name client/NAME, owner/NAME, jwt/ISSUER/SUBJECT or '*'")
        if not 0 <= self.rate <= _MOST or not 0 <= self.not_before <= _MOST or not 0 <= self.not_after <= _MOST:
            raise GrantError("rate and times of a grant are whole numbers, 0 or more")
        if self.not_after and self.not_after <= self.not_before:
            raise GrantError("the grant would end before it begins")

    def cover(self, role: str) -> bool:
        """Whether a client is among those meant."""
        everybody = role.startswith(("client/", "jwt/"))
        return any(
            c == role or (everybody and c == EVERYBODY) or (c.endswith("/*") and role.startswith(c[:-1]))
            for c in self.clients
        )

    def limits(self) -> tuple[Budget, ...]:
        """All budgets, the rate included."""
        return (*self.budgets, Budget(QUERIES, self.rate, 60)) if self.rate else self.budgets

    def words(self) -> str:
        """What is granted, in words."""
        who = "all clients of the cluster" if EVERYBODY in self.clients else ", ".join(self.clients) or "nobody"
        limits = [f"{budget} each" for budget in self.limits()] or ["no budget"]
        times = [f"from {_date(self.not_before)}"] if self.not_before else []
        times += [f"until {_date(self.not_after)}" if self.not_after else "no expiry"]
        return "; ".join([who, *limits, *times])


@dataclass(frozen=True)
class Grant:
    """See the module. `model` is the owner's commitment to the weights, `nonce` what he makes its salt from."""

    serial: int
    name: str
    program: str
    model: str
    nonce: str
    cluster: str
    parties: tuple[str, ...]
    entry_points: tuple[str, ...]
    reveals: str
    terms: Terms = Terms()
    revoked: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.serial <= _MOST:
            raise GrantError("a grant's serial is a number from 1")
        hexes = (self.program, self.model, self.nonce, self.cluster)
        if not _MODEL.fullmatch(self.name) or not all(map(_HEX.fullmatch, hexes)):
            raise GrantError("a grant names the model, its program, its weights and the cluster")
        if not self.parties or not all(map(_PIN.fullmatch, self.parties)):
            raise GrantError("a grant names the keys of all parties")
        if not self.entry_points or not all(map(_WORD.fullmatch, (*self.entry_points, self.reveals))):
            raise GrantError("a grant names entry points, and what is revealed")

    def sign(self, signer: Signer) -> Signed:
        """As the owner's statement."""
        content = {item.name: getattr(self, item.name) for item in fields(self)}
        terms = {item.name: getattr(self.terms, item.name) for item in fields(self.terms)}
        terms["budgets"] = [[b.unit, b.amount, b.seconds] for b in self.terms.budgets]
        return signer.sign(PURPOSE, {**content, "terms": terms, "format": _FORMAT})

    @staticmethod
    def first(name: str, *, program: bytes, entry_point: str, reveals: str, cluster: Cluster, terms: Terms) -> Grant:
        """The grant for a model that is about to be deployed; without the commitment, which takes the weights."""
        grant = Grant(
            serial=1,
            name=check_model_name(name),
            program=program.hex(),
            model="00",
            nonce=secrets.token_hex(16),
            cluster=_parties(cluster)[0],
            parties=_parties(cluster)[1],
            entry_points=(entry_point,),
            reveals=reveals,
            terms=terms,
        )
        grant.check_target(name, program, reveals, entry_point)
        return grant

    def salt(self, signer: Signer) -> bytes:
        """What the owner's commitment is salted with: only he has it, and shows it to whom he likes."""
        return signer.secret(f"model salt {self.nonce}")

    @staticmethod
    def of(content: Any) -> Grant:
        """The grant in a statement's content; GrantError for anything that is none."""
        if isinstance(content, Mapping) and content.get("format") != _FORMAT:
            raise GrantError("a grant of another format; have owner and parties run the same release")
        values = _values(content, Grant, format=int)
        terms = _values(values["terms"], Terms)
        budgets = [_list(b, str | int) for b in _list(terms["budgets"], list)]
        if any([type(item) for item in b] != [str, int, int] for b in budgets):
            raise GrantError("a grant's budgets are lists of a unit, an amount and seconds")
        del values["format"]
        values |= {name: _list(values[name], str) for name in ("parties", "entry_points")}
        terms |= {"clients": _list(terms["clients"], str), "budgets": tuple(Budget(*b) for b in budgets)}
        return Grant(**{**values, "terms": Terms(**terms)})

    def holds_for(self, cluster: Cluster) -> bool:
        """Whether it is for the parties of this cluster, by the keys that they have in its file."""
        return (self.cluster, self.parties) == _parties(cluster)

    def replaced(self, **changes: Any) -> Grant:
        """The next grant for the same deployment, with other terms or revoked."""
        return replace(self, serial=self.serial + 1, **changes)

    def given_to(self, cluster: Cluster) -> Grant:
        """The same for the parties of this cluster, as they are now."""
        named, parties = _parties(cluster)
        return replace(self, cluster=named, parties=parties)

    def check_target(self, name: str, program: bytes, reveals: str, entry_point: str) -> None:
        """GrantError unless it is for this model."""
        if (self.name, self.program, self.reveals) != (name, program.hex(), reveals):
            raise GrantError(f"this grant is for another model than {name!r}; sign one for it")
        if self.entry_points != (entry_point,):
            raise GrantError(f"model {name!r} can be asked to {entry_point}, and the grant is for something else")
        if entry_point != "generate" and any(b.unit == TOKENS for b in self.terms.budgets):
            raise GrantError(f"model {name!r} writes no tokens that could be counted; give it a budget of queries")

    def check_successor(self, later: Grant) -> None:
        """GrantError unless `later` may replace this one: for the same deployment, and newer."""
        if any(getattr(self, n) != getattr(later, n) for n in ("name", "program", "model", "nonce", "entry_points")):
            raise GrantError(f"this grant is for another deployment of {self.name!r}; sign one for this deployment")
        if later.serial <= self.serial:
            raise GrantError(
                f"this grant has serial {later.serial}, and one with serial {self.serial} holds; an older one cannot "
                "come back: sign a new one"
            )


def open_grant(signed: Signed, cluster: Cluster, owner: str, *, past: bool = False, elsewhere: bool = False) -> Grant:
    """The grant, if `owner` has signed it for this cluster.

    SignatureError or IdentityError for what is forged or altered, GrantError for what he has not granted here.
    past: whether his certificate may have expired since: for grants that were accepted before. elsewhere: whether it
    may be for other parties, as those were whose keys have been replaced since: to look at, not to serve by.
    """
    statement = open_signed(signed, cluster, PURPOSE, past=past)
    if statement.role != owner:
        raise GrantError(f"this grant was signed by {statement.role}, and the model is {owner}'s")
    grant = Grant.of(statement.content)
    if not elsewhere and not grant.holds_for(cluster):
        raise GrantError("this grant is for another set of parties; sign one for this cluster")
    return grant


def _parties(cluster: Cluster) -> tuple[str, tuple[str, ...]]:
    """Whom a grant names: the cluster file's digest, and the keys of all who hold shares."""
    return cluster.digest().hex(), tuple(holder.key_pin for holder in cluster.holders)


class Commitment:
    """The owner's commitment to weights: tells nobody anything without the salt, and with it which weights they are."""

    def __init__(self, salt: bytes) -> None:
        self._digest = hmac.new(salt, digestmod=hashlib.sha256)

    def add(self, name: str, weight: memoryview) -> None:
        """The next weight, in the order of the program: its encoded numbers, int64 little-endian."""
        for part in (name.encode(), weight):
            self._digest.update(len(part).to_bytes(8, "big"))
            self._digest.update(part)

    def hex(self) -> str:
        """What a grant says."""
        return self._digest.hexdigest()


def _values(content: Any, kind: type, **more: type) -> dict[str, Any]:
    """The fields of a dataclass as JSON has them, their types checked."""
    types = {"int": int, "str": str, "bool": bool, "Terms": dict} | {str(t): t for t in more.values()}
    expected = {item.name: types.get(str(item.type), list) for item in fields(kind)} | more
    if not isinstance(content, dict) or content.keys() != expected.keys():
        raise GrantError("this is no grant: fields are missing, or unknown")
    for name, value in content.items():
        if type(value) is not expected[name]:
            raise GrantError(f"this is no grant: {name!r} is of another type")
    return dict(content)


def _list(values: Any, kind: Any) -> tuple[Any, ...]:
    if not isinstance(values, list) or len(values) > _MOST_LISTED or not all(isinstance(v, kind) for v in values):
        raise GrantError(f"this is no grant: a list in it is too long (more than {_MOST_LISTED}) or holds other things")
    return tuple(values)


def _date(seconds: int) -> str:
    try:
        return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M} UTC"
    except (OverflowError, ValueError):
        return f"{seconds} s after 1970"
