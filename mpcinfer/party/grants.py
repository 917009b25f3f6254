"""The grants of a party's deployments, as their owners have signed them.

The first comes with the upload and lies in the deployment's own file; what replaces it lies in `grants/<id hex>.json`
beside the store. Both are public, and signed: what was edited does not verify, and is not served.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpcinfer.config import Cluster
from mpcinfer.errors import GrantError, IdentityError, MpcInferError, StoreError
from mpcinfer.graph.program import Program
from mpcinfer.party.record import Deployment, sync_directory, writing
from mpcinfer.trust.grant import Grant, Terms, open_grant
from mpcinfer.trust.signing import Signed

_MOST = 64 << 10  # bytes of one with its certificate: the parties tell each other all of them when they connect


@dataclass(frozen=True)
class Granted:
    """A grant that has been verified, and the statement it was in."""

    grant: Grant
    signed: Signed = field(repr=False)

    @property
    def order(self) -> tuple[int, bytes]:
        """The greatest holds; the same at all parties, whatever the owner has signed twice."""
        return self.grant.serial, self.signed.payload


def entry_point(program: Program) -> str:
    """What a model can be asked to do."""
    return "generate" if program.caches else "infer"


class Grants:
    """Verifies grants for one cluster, and keeps those that replace others."""

    def __init__(self, directory: Path, cluster: Cluster) -> None:
        """Make `directory` if it is missing."""
        self._directory = directory
        self._cluster = cluster
        with writing(directory):
            directory.mkdir(mode=0o700, exist_ok=True)

    def verified(
        self, signed: Signed, owner: str, name: str, program: Program, *, past: bool = False, elsewhere: bool = False
    ) -> Granted:
        """A grant of `owner` for this model; SignatureError, IdentityError or GrantError say what is wrong with it."""
        if not past and len(signed.payload) + len(signed.certificate) > _MOST:
            raise GrantError(f"a grant has at most {_MOST >> 10} KiB; name fewer clients, or groups of them")
        grant = open_grant(signed, self._cluster, owner, past=past, elsewhere=elsewhere)
        grant.check_target(name, program.digest(), program.reveal, entry_point(program))
        return Granted(grant, signed)

    def check_parties(self, granted: Granted) -> None:
        """GrantError unless it is for the parties of this cluster: nobody else may serve by it."""
        if not granted.grant.holds_for(self._cluster):
            raise GrantError(
                "it is granted to other parties: since then a party, a witness or a key was replaced. Its owner looks "
                "at who they are now, and grants it to them with `mpcinfer grant NAME --again`"
            )

    def stored(self, deployment: Deployment, program: Program) -> Granted:
        """The grant of a stored deployment, which may be for other parties than there are now; StoreError or GrantError
        if there is none that verifies.
        """
        meta, path = deployment.metadata, self._path(deployment.id)
        if "grant" not in meta and not path.exists():
            raise GrantError("it was deployed without a grant, by an older release; deploy it again")
        texts = [meta["grant"]] if "grant" in meta else []
        try:
            with suppress(FileNotFoundError):
                texts.append(json.loads(path.read_bytes()))
            owner, name = str(meta["owner"]), str(meta["name"])
            found = [
                self.verified(Signed.from_json(text), owner, name, program, past=True, elsewhere=True) for text in texts
            ]
            if len(found) > 1:
                found[0].grant.check_successor(found[1].grant)
        except (OSError, ValueError, RecursionError, IdentityError) as error:
            reason = str(error) if isinstance(error, MpcInferError) else "it cannot be read"
            raise StoreError(
                f"its stored grant ({path.name}) does not verify, {reason}: the grant that the other parties hold is "
                "taken when they connect, or the owner signs a new one with `mpcinfer grant`"
            ) from error
        return found[-1]

    def newest(self, deployment: Deployment, program: Program, statements: Iterable[Any]) -> Granted | None:
        """The one that holds, of statements (as JSON) that anybody may have made up."""
        meta, found = deployment.metadata, []
        for statement in statements:
            with suppress(IdentityError):
                signed = Signed.from_json(statement)
                found.append(self.verified(signed, str(meta["owner"]), str(meta["name"]), program, past=True))
        # all of one deployment have the commitment of the first one
        if "grant" in meta:
            with suppress(IdentityError):
                signed = Signed.from_json(meta["grant"])
                first = self.verified(signed, str(meta["owner"]), str(meta["name"]), program, past=True, elsewhere=True)
                found = [f for f in found if f.grant.model == first.grant.model]
        return max(found, key=lambda f: f.order, default=None)

    def terms(self, owner: str, statements: Iterable[Any]) -> Terms | None:
        """What an owner has granted for a deployment that this party does not hold."""
        found: list[Grant] = []
        for statement in statements:
            with suppress(IdentityError):
                found.append(open_grant(Signed.from_json(statement), self._cluster, owner, past=True))
        return max(found, key=lambda g: g.serial).terms if found else None

    def stage(self, deployment_id: bytes, signed: Signed) -> None:
        """Put a replacement on the disk, which `commit` makes the one that holds."""
        path = self._path(deployment_id, ".new")
        with writing(path), open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(json.dumps(signed.to_json()).encode())
            file.flush()
            os.fsync(file.fileno())

    def commit(self, deployment_id: bytes) -> None:
        """The staged grant holds from now on."""
        path = self._path(deployment_id)
        with writing(path):
            self._path(deployment_id, ".new").rename(path)
            sync_directory(path.parent)

    def remove(self, deployment_id: bytes) -> None:
        """The deployment is gone."""
        for suffix in (".json", ".new"):
            with writing(self._directory):
                self._path(deployment_id, suffix).unlink(missing_ok=True)

    def _path(self, deployment_id: bytes, suffix: str = ".json") -> Path:
        return self._directory / f"{deployment_id.hex()}{suffix}"
