"""Who may use a model: what an owner grants, looks up and takes back."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from mpcinfer.cli.options import CLUSTER, ClusterPath, IdentityPath, Json, ModelVersion
from mpcinfer.cli.output import print_json
from mpcinfer.errors import InputError

if TYPE_CHECKING:
    from mpcinfer.client.owner import ModelOwner
    from mpcinfer.trust.grant import Grant, Terms

Clients = Annotated[
    list[str] | None,
    typer.Option(
        "--client",
        help="Who may use it: a client's name, client/NAME, owner/NAME, jwt/ISSUER/SUBJECT, client/*, jwt/ISSUER/*; "
        "by default all clients of the cluster.",
        show_default=False,
    ),
]
Queries = Annotated[list[str] | None, typer.Option(help="A budget of each client, as 100/day or 20/hour.")]
Tokens = Annotated[list[str] | None, typer.Option(help="Of a language model: a budget of tokens, as 10000/hour.")]
Rate = Annotated[int, typer.Option(min=0, help="Queries a minute of each client; 0: any number.")]
Since = Annotated[str | None, typer.Option("--from", help="Not before: 2027-01-01 or 2027-01-01T12:00, UTC.")]
Until = Annotated[str | None, typer.Option(help="Not after: 2027-01-01 or 2027-01-01T12:00, UTC.")]


def terms(
    clients: Sequence[str] | None,
    queries: Sequence[str] | None,
    tokens: Sequence[str] | None,
    rate: int,
    since: str | None,
    until: str | None,
) -> Terms:
    """What the options say; InputError for what cannot be granted."""
    from mpcinfer.errors import GrantError
    from mpcinfer.trust.grant import EVERYBODY, QUERIES, TOKENS, Budget, Terms

    named = [c if "/" in c or c == EVERYBODY else f"client/{c}" for c in clients or (EVERYBODY,)]
    budgets = [
        Budget.parse(unit, text) for unit, texts in ((QUERIES, queries), (TOKENS, tokens)) for text in texts or ()
    ]
    try:
        return Terms(tuple(named), tuple(budgets), rate, _seconds(since), _seconds(until))
    except GrantError as error:
        raise InputError(str(error)) from error


def grant(
    name: Annotated[str, typer.Argument(help="The model.")],
    clients: Clients = None,
    queries: Queries = None,
    tokens: Tokens = None,
    rate: Rate = 0,
    since: Since = None,
    until: Until = None,
    everybody: Annotated[
        bool, typer.Option("--everybody", help="All clients of the cluster, without any limit.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="The same as before, for the parties as they are now: one was replaced.")
    ] = False,
    version: ModelVersion = 0,
    cluster: ClusterPath = CLUSTER,
    identity: IdentityPath = None,
    as_json: Json = False,
) -> None:
    """Replace who may use a model of yours, how often and until when; without options, show it.

    It takes the place of all that was granted before, at all parties, from the next request on. Of all versions, unless
    one is named.
    """
    from mpcinfer.client.owner import ModelOwner

    given = any((clients, queries, tokens, rate, since, until))
    if given and everybody:
        raise InputError("--everybody is without any limit: leave the other options out, or leave it out")
    if again and (given or everybody):
        raise InputError("--again changes nothing of what was granted: leave the other options out, or leave it out")
    granted = terms(clients, queries, tokens, rate, since, until)
    with ModelOwner.connect(cluster, identity) as owner:
        if given or everybody:
            owner.grant(name, granted, version)
        if again:
            owner.grant_again(name, version)
        _show(owner, name, version, as_json)


def revoke(
    name: Annotated[str, typer.Argument(help="The model.")],
    version: ModelVersion = 0,
    cluster: ClusterPath = CLUSTER,
    identity: IdentityPath = None,
    as_json: Json = False,
) -> None:
    """Nobody may use a model of yours any more, from the next request and the next token on; `grant` undoes it."""
    from mpcinfer.client.owner import ModelOwner

    with ModelOwner.connect(cluster, identity) as owner:
        owner.revoke(name, version)
        _show(owner, name, version, as_json)


def words(granted: Grant) -> str:
    """A grant in words."""
    return "revoked" if granted.revoked else granted.terms.words()


def _show(owner: ModelOwner, name: str, version: int, as_json: bool) -> None:
    grants = owner.grants(name, version)
    if as_json:
        print_json({"grants": [{"version": version, **asdict(found)} for version, found in sorted(grants.items())]})
        return
    for version, found in sorted(grants.items()):
        ours = "" if owner.serves(found) else "; to other parties, so that these do not serve it: see --again"
        print(f"{name} version {version}: {words(found)}; reveals {found.reveals}{ours}")


def _seconds(text: str | None) -> int:
    if text is None:
        return 0
    try:
        return int(datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC).timestamp())
    except ValueError as error:
        raise InputError(f"{text!r} is no date: write 2027-01-01 or 2027-01-01T12:00") from error
