"""What a client holds the parties to: their receipt must be of this request, and of the shares that came and went."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from mpcinfer.client.model import Model
from mpcinfer.config import Cluster
from mpcinfer.errors import SignatureError, TamperingError
from mpcinfer.trust.commitment import answers_commitment, upload_commitment
from mpcinfer.trust.receipt import Receipt
from mpcinfer.trust.signing import Signed
from mpcinfer.wire.v1 import tensor_pb2


class Proven(Protocol):
    """Whatever has a receipt, once there is one."""

    @property
    def receipt(self) -> Receipt | None:
        """What all parties have signed."""
        ...


class Proof:
    """Of one request. `check` is given its answers, one after the other."""

    def __init__(
        self,
        cluster: Cluster,
        role: str,
        model: Model,
        requests: Sequence[Any],
        shares: Sequence[Sequence[tensor_pb2.Tensor]],
        manifest: Callable[[], bytes],
    ) -> None:
        """role: whose the requests are; empty for those that come with a token.

        requests: as they are sent, by party, each with its salt; shares: the tensors in them. manifest: the digest of
        what the parties have signed of themselves for the connection.
        """
        self._cluster, self._role = cluster, role
        self._salts = [request.salt for request in requests]
        self._uploads = [upload_commitment(salt, each) for salt, each in zip(self._salts, shares, strict=True)]
        self._answered = [b""] * len(requests)
        self._count = 0
        self._manifest = manifest
        self._expected = {
            "request": requests[0].request_id.hex(),
            "model": model.name,
            "version": model.version,
            "deployment": model.deployment_id,
        }

    def check(self, answers: Sequence[Any]) -> Receipt:
        """The receipt that came with these answers, one of each party.

        SignatureError if one is missing or does not hold, TamperingError if it is of anything else.
        """
        for index, answer in enumerate(answers):
            if not answer.HasField("receipt"):
                raise SignatureError(f"party/{index} has sent no receipt with its answer: nothing shows whose it is")
        statements = [Signed.of(answer.receipt) for answer in answers]
        receipt = Receipt.verify(statements, self._cluster, self._salts)
        expected = {**self._expected, "manifest": self._manifest().hex()}
        different = [name for name, value in expected.items() if receipt.shared[name] != value]
        if not (
            receipt.shared["client"] == self._role or (not self._role and receipt.shared["client"].startswith("jwt/"))
        ):
            different.append("client")
        if different:
            raise TamperingError(f"the parties' receipt is of something else: {', '.join(different)} differ")
        self._count += 1
        for index, answer in enumerate(answers):
            salt, before = self._salts[index], self._answered[index]
            self._answered[index] = answers_commitment(salt, before, answer.outputs)
            receipt.check_shares(index, self._uploads[index], self._answered[index], self._count)
        return receipt
