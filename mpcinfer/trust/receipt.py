"""Receipts: what all parties sign about one answer, together. Public facts, and salted commitments to shares.

Each party signs what it was sent and has answered, and what it has seen; whoever holds the receipt sees that all of
them speak of the same request, model, run and opened values. With the salts, which only the client has, it also shows
which shares those were.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpcinfer.canonical import canonical
from mpcinfer.config import Cluster
from mpcinfer.errors import ConfigError, SignatureError, TamperingError
from mpcinfer.trust.chain import Head
from mpcinfer.trust.commitment import answers_commitment, salt_commitment, upload_commitment
from mpcinfer.trust.facts import digest
from mpcinfer.trust.pin import Earlier, Pin
from mpcinfer.trust.private import write_private
from mpcinfer.trust.signing import Signed, Statement, open_pinned, open_signed
from mpcinfer.wire.v1 import tensor_pb2

PURPOSE = "receipt"
FORMAT = 1

# What every party says for itself; all else must be the same at all of them.
OWN = frozenset(("party", "certificate", "salt", "request_shares", "answer_shares", "bytes_sent", "log", "time"))
SHARED = frozenset(
    ("format", "parties", "request", "action", "client", "asked", "model", "version", "deployment", "model_commitment")
) | frozenset(("manifest", "epoch", "tapes", "rounds", "openings", "answers", "transcript"))


@dataclass(frozen=True)
class Receipt:
    """What all parties have signed, checked by `verify`; `salts` only where it was asked to keep them.

    `shared` is what all say, `own` what each says for itself, by index.
    """

    statements: tuple[Signed, ...]
    shared: Mapping[str, Any]
    own: tuple[Mapping[str, Any], ...]
    salts: tuple[bytes, ...] = field(default=(), repr=False)

    @property
    def id(self) -> str:
        """The id of the request."""
        return str(self.shared["request"])

    def to_json(self, *, salts: bool = False) -> dict[str, Any]:
        """As it is written into a file. salts: with them, so that it can be shown later which shares it is about."""
        content: dict[str, Any] = {"format": FORMAT, "statements": [s.to_json() for s in self.statements]}
        return {**content, "salts": [s.hex() for s in self.salts]} if salts else content

    def to_bytes(self, *, salts: bool = False) -> bytes:
        """The content of its file."""
        return canonical(self.to_json(salts=salts)) + b"\n"

    def save(self, path: Path | str, *, salts: bool = False) -> None:
        """Write it into a file. ConfigError if that fails."""
        try:
            write_private(Path(path), self.to_bytes(salts=salts))
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error

    @staticmethod
    def load(path: Path | str, cluster: Cluster, pin: Pin | None = None) -> Receipt:
        """The receipt in a file, verified. SignatureError for a file that is not exactly as it was written.

        pin: if the parties that have signed are pinned in it, now or before, they are held to the keys that they had
        then; all others to those in the cluster file.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        try:
            content = json.loads(data)
            statements = [Signed.from_json(each) for each in content["statements"]]
            salts = [bytes.fromhex(each) for each in content.get("salts", ())]
            then = pin.find(json.loads(statements[0].payload)["manifest"]) if pin is not None and statements else None
            receipt = (
                Receipt.verify(statements, cluster, salts)
                if then is None
                else Receipt.verify_pinned(statements, then, salts)
            )
            if receipt.to_bytes(salts="salts" in content) != data:
                raise ValueError("not as it was written")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SignatureError(f"{path} is no receipt, or it was changed") from error
        return receipt

    @staticmethod
    def verify(statements: Sequence[Signed], cluster: Cluster, salts: Sequence[bytes] = ()) -> Receipt:
        """Check what all parties say: signatures and pins, and that they speak of one and the same thing.

        SignatureError if a statement is missing or does not hold, TamperingError if the parties do not agree.
        """
        return _checked(
            statements, salts, cluster.n, lambda i, signed: open_signed(signed, cluster, PURPOSE, past=True)
        )

    @staticmethod
    def verify_pinned(statements: Sequence[Signed], then: Earlier, salts: Sequence[bytes] = ()) -> Receipt:
        """The same by the keys of parties that are pinned, or were, whatever the cluster file says today.

        SignatureError also if a party signed it after others were pinned.
        """
        parties = [m.facts for m in then.members if m.facts.role.startswith("party/")]

        def opened(index: int, signed: Signed) -> Statement:
            facts = parties[index]
            return open_pinned(signed, facts.role, facts.key_pin, bytes.fromhex(facts.signing_key), PURPOSE)

        receipt = _checked(statements, salts, len(parties), opened)
        if receipt.shared["manifest"] != digest([m.facts for m in then.members]).hex():
            raise SignatureError("the receipt is of parties with another manifest than the one it is checked by")
        for index, own in enumerate(receipt.own):
            if own["time"] > then.until:
                raise SignatureError(
                    f"party {index} signed this with a key that was replaced before: nobody should have had it any more"
                )
        return receipt

    def check_shares(self, index: int, upload: bytes, answered: bytes, answers: int) -> None:
        """TamperingError unless these are the commitments that party `index` signed, after so many answers."""
        own = self.own[index]
        if not _same(upload, own["request_shares"]):
            raise TamperingError(f"party {index} signed for other shares of the request than it was sent")
        if not _same(answered, own["answer_shares"]) or self.shared["answers"] != answers:
            raise TamperingError(f"party {index} signed for other shares of the answer than it has sent")

    def check_request(self, index: int, inputs: Iterable[tensor_pb2.Tensor]) -> None:
        """TamperingError unless these are the shares that party `index` was sent. Needs the salts."""
        if not _same(upload_commitment(self._salt(index), inputs), self.own[index]["request_shares"]):
            raise TamperingError(f"party {index} signed for other shares of the request than these")

    def check_answers(self, index: int, answers: Sequence[Iterable[tensor_pb2.Tensor]]) -> None:
        """TamperingError unless these are the shares that party `index` has answered with. Needs the salts."""
        found = b""
        for outputs in answers:
            found = answers_commitment(self._salt(index), found, outputs)
        if not _same(found, self.own[index]["answer_shares"]) or self.shared["answers"] != len(answers):
            raise TamperingError(f"party {index} signed for other shares of the answer than these")

    def line(self, index: int) -> Head:
        """The line of a party's audit log that is about this request."""
        return Head.from_json(self.own[index]["log"])

    def _salt(self, index: int) -> bytes:
        if not self.salts:
            raise SignatureError("the receipt was saved without its salts: nobody can say which shares it is about")
        return self.salts[index]


def _checked(
    statements: Sequence[Signed], salts: Sequence[bytes], parties: int, opened: Callable[[int, Signed], Statement]
) -> Receipt:
    """The receipt that these statements make, each of which `opened` checks to be that of the party with its index."""
    if len(statements) != parties or len(salts) not in (0, parties):
        raise SignatureError(f"a receipt of this cluster has {parties} statements, one of each party")
    contents = [_content(index, opened(index, signed), signed, parties) for index, signed in enumerate(statements)]
    for index, (content, salt) in enumerate(zip(contents, salts, strict=False)):
        if not _same(salt_commitment(salt), content["salt"]):
            raise SignatureError(f"the salt of party {index} is not the one that the receipt is about")
    shared = [{key: value for key, value in content.items() if key not in OWN} for content in contents]
    for index, other in enumerate(shared):
        different = sorted(key for key in other if other[key] != shared[0][key])
        if different:
            raise TamperingError(f"parties 0 and {index} signed different receipts: {', '.join(different)} differ")
    own = tuple({key: content[key] for key in OWN} for content in contents)
    return Receipt(tuple(statements), shared[0], own, tuple(salts))


def _content(index: int, statement: Statement, signed: Signed, parties: int) -> dict[str, Any]:
    """What party `index` says."""
    content = statement.content
    if statement.role != f"party/{index}" or content.get("party") != index:
        raise SignatureError(f"{statement.role} signed where party/{index} should have")
    if set(content) != OWN | SHARED or content["format"] != FORMAT or content["parties"] != parties:
        raise SignatureError(f"what party {index} signed is no receipt of this format")
    # else bytes around the certificate in its file could be changed unnoticed
    if content["certificate"] != hashlib.sha256(signed.certificate).hexdigest():
        raise SignatureError(f"the certificate of party {index} is not the one it signed with")
    return content


def _same(commitment: bytes, signed: Any) -> bool:
    return isinstance(signed, str) and hmac.compare_digest(commitment.hex().encode(), signed.encode())
