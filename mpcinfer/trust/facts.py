"""What a party says of itself that stays the same from one connection to the next, and the digest of its code."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import mpcinfer
from mpcinfer.canonical import canonical
from mpcinfer.config import PROTOCOL_VERSION, Cluster
from mpcinfer.errors import ManifestError
from mpcinfer.trust.signing import Signer, Statement

_LONGEST = 300


@dataclass(frozen=True)
class Facts:
    """One party's; digests and keys in hexadecimal, pins as in the cluster file. `code` is empty if it is not said."""

    role: str
    operator: str
    cluster: str
    key_pin: str
    signing_key: str
    package: str
    code: str
    protocol: int
    dealer: str
    evidence: str

    @staticmethod
    def of(signer: Signer, cluster: Cluster, *, operator: str, evidence: str) -> Facts:
        """What the party that signs with `signer` says. With evidence "none" it says nothing of its code."""
        return Facts(
            role=signer.role,
            operator=operator,
            cluster=cluster.digest().hex(),
            key_pin=cluster.endpoint(signer.role).key_pin,
            signing_key=signer.key.hex(),
            package=mpcinfer.__version__,
            code="" if evidence == "none" else code_digest(),
            protocol=PROTOCOL_VERSION,
            dealer=cluster.dealer.key_pin,
            evidence=evidence,
        )

    def to_json(self) -> dict[str, Any]:
        """As it is signed and written into files."""
        return asdict(self)

    @staticmethod
    def from_json(data: object) -> Facts:
        """The inverse of `to_json`; ManifestError for anything else."""
        kinds = {item.name: int if item.name == "protocol" else str for item in fields(Facts)}
        if not isinstance(data, dict) or data.keys() != kinds.keys():
            raise ManifestError("a party's facts are incomplete, or of another release; install the same everywhere")
        for name, value in data.items():
            if type(value) is not kinds[name] or (isinstance(value, str) and not _plain(value)):
                raise ManifestError(f"a party's {name} is not what it can be; its operator has to look")
        return Facts(**data)

    def check(self, said: Statement, cluster: Cluster) -> Facts:
        """These facts, if they can be those of the role that has signed them; otherwise ManifestError."""
        true = {
            "role": said.role,
            "key_pin": said.pin,
            "signing_key": said.key.hex(),
            "cluster": cluster.digest().hex(),
            "protocol": PROTOCOL_VERSION,
            "dealer": cluster.dealer.key_pin,
        }
        wrong = [name for name, value in true.items() if getattr(self, name) != value]
        if wrong:
            raise ManifestError(
                f"{said.role} signs that its {', '.join(wrong)} is another than the cluster file and its connection "
                "say; it works with another cluster file or release, or lies"
            )
        return self


def digest(parties: Sequence[Facts]) -> bytes:
    """Of the facts of all parties and then witnesses, by index: what each of them signs."""
    return hashlib.sha256(canonical([facts.to_json() for facts in parties])).digest()


@cache
def code_digest() -> str:
    """SHA-256, in hexadecimal, over the names and contents of this package's files as they are at the first call."""
    root = Path(mpcinfer.__file__).parent
    files = sorted(file for file in root.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    listed = [[f.relative_to(root).as_posix(), hashlib.sha256(f.read_bytes()).hexdigest()] for f in files]
    return hashlib.sha256(canonical(listed)).hexdigest()


def _plain(text: str) -> bool:
    """It is printed to terminals and pages: no line breaks, nothing that steers them."""
    return len(text) <= _LONGEST and text.isprintable()
