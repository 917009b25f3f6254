"""What the parties say about the models they hold, and whether they say the same."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mpcinfer.errors import AgreementError, ProtocolError
from mpcinfer.graph.sizes import BATCH, Size
from mpcinfer.trust.grant import Grant
from mpcinfer.wire.v1 import party_pb2, tensor_pb2, trust_pb2


@dataclass(frozen=True)
class TensorSpec:
    """What a model takes or gives: a shape (-k: its free size number k) and how its numbers are encoded.

    Absolute values must stay below `limit`; 0 means that only the encoding limits them. Without fraction bits they are
    indices from 0 up to but not including `limit`.
    """

    name: str
    shape: tuple[int, ...]
    frac_bits: int
    ring_bits: int
    limit: float


@dataclass(frozen=True)
class Model:
    """A deployed version of a model, as all parties describe it. `created` is in Unix seconds, by one party's clock."""

    name: str
    version: int
    deployment_id: str
    owner: str
    reveal: str
    parameters: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    created: float
    sizes: tuple[Size, ...] = (Size(BATCH),)
    context: int = 0  # of a language model: how many tokens a text and its answer may have
    vocabulary_digest: str = ""
    grant: Grant | None = None  # shown to the owner; as the parties say, `ModelOwner` verifies it

    @staticmethod
    def parse(info: party_pb2.ModelInfo) -> Model:
        """The model that one party describes."""
        return Model(
            name=info.name,
            version=info.version,
            deployment_id=info.deployment_id.hex(),
            owner=info.owner,
            reveal=info.reveal,
            parameters=info.parameters,
            inputs=_specs(info.inputs),
            outputs=_specs(info.outputs),
            created=info.created_unix_seconds,
            # a party of before there were others says nothing: the one there was is the batch
            sizes=tuple(Size(s.name, s.low, s.high) for s in info.sizes) or (Size(BATCH),),
            context=info.context,
            vocabulary_digest=info.vocabulary_digest.hex(),
            grant=_grant(info.grant),
        )

    @property
    def key(self) -> tuple[str, str, int]:
        """Name, owner and version."""
        return self.name, self.owner, self.version

    @property
    def full_name(self) -> str:
        """The name under which no other owner can have a model: NAME/m for owner/NAME's model m."""
        return f"{self.owner.partition('/')[2]}/{self.name}"


def _specs(messages: Iterable[tensor_pb2.TensorSpec]) -> tuple[TensorSpec, ...]:
    # In proto3 a number that was not set reads 0; of a ring that means 64 bits.
    return tuple(TensorSpec(m.name, tuple(m.shape), m.frac_bits, m.ring_bits or 64, m.limit) for m in messages)


def _grant(message: trust_pb2.Signed) -> Grant | None:
    if not message.payload:
        return None
    try:
        return Grant.of(json.loads(message.payload))
    except (ValueError, RecursionError) as error:
        raise ProtocolError("a party lists a model with a grant that is none") from error


def agreed(listings: Sequence[Sequence[Model]], name: str | None = None) -> list[Model]:
    """The models (only those called `name` or, in full, `owner/name`) that parties 0, 1, ... list, by name and version.

    AgreementError naming the first model that is not the same at all of them.
    """
    tables = [{m.key: m for m in listing if name in (None, m.name, m.full_name)} for listing in listings]
    for key in sorted(set().union(*tables)):
        held = [table.get(key) for table in tables]
        without = [index for index, model in enumerate(held) if model is None]
        if without or len({_identity(model) for model in held if model}) > 1:
            where = f"is missing at party/{without[0]}" if without else "is not the same at all parties"
            raise AgreementError(
                f"model {key[0]!r} version {key[2]} {where}; unless it is being deployed or removed right now, "
                "remove this version and deploy it again"
            )
    return [tables[0][key] for key in sorted(tables[0])]


def _identity(model: Model) -> object:
    """All that must be the same at all parties: each takes the time of creation from its own clock."""
    return replace(model, created=0.0)
