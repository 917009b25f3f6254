"""What the proxy asks of a client: to write, to embed, to list the models, to say how the parties are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from mpcinfer.client.generation import Writer
from mpcinfer.client.model import Model
from mpcinfer.client.status import PartyStatus
from mpcinfer.config import Cluster
from mpcinfer.errors import UnsupportedError
from mpcinfer.trust.manifest import Manifest
from mpcinfer.trust.receipt import Receipt

# a text, or the ids of one
Text = str | Sequence[int]


@dataclass(frozen=True)
class Embedded:
    """The vector of a text, how many tokens the text has, and what the parties have signed about it."""

    vector: list[float] = field(repr=False)
    tokens: int
    receipts: list[Receipt]


# name, text, seconds
Embed = Callable[[str, Text, float], Embedded]


@dataclass(frozen=True)
class ModelCard:
    """A model as the proxy lists it; `created` in Unix seconds."""

    name: str
    owner: str
    created: int


@dataclass(frozen=True)
class PartyCard:
    """Who a party is, by the cluster file and its own signed word, and how it says it is doing."""

    role: str
    address: str
    pin: str
    state: str
    detail: str = ""
    operator: str = ""
    evidence: str = ""


@dataclass(frozen=True)
class Backend:
    """Everything behind the proxy. All of it may be called from several threads, and may block."""

    writer: Writer
    models: Callable[[], Sequence[ModelCard]]
    parties: Callable[[], Sequence[PartyCard]]
    embed: Embed
    timeout: float = 600.0  # seconds for one answer
    manifest: Callable[[], Manifest | None] = lambda: None  # as of the last connection: nobody is asked


class TextClient(Writer, Protocol):
    """The part of `mpcinfer.client.data.Client` that deals with text."""

    def embed(
        self, name: str, texts: Sequence[str], *, timeout: float, receipts: list[Receipt] | None = None
    ) -> list[torch.Tensor]:
        """A vector per text; `receipts` is given what the parties sign."""
        ...

    def infer(self, name: str, *inputs: torch.Tensor, timeout: float, receipts: list[Receipt] | None = None) -> Any:
        """The output for inputs that are numbers already; `receipts` is given what the parties sign."""
        ...

    def count_tokens(self, name: str, text: str) -> int:
        """How many tokens a text has."""
        ...

    def models(self) -> list[Model]:
        """The deployed models."""
        ...

    def status(self) -> list[PartyStatus]:
        """How each party is doing."""
        ...

    @property
    def manifest(self) -> Manifest:
        """Who the parties are, as they have signed it for the last connection."""
        ...

    def close(self) -> None:
        """End the connection."""
        ...


def of_client(client: TextClient, cluster: Cluster, *, timeout: float = 600.0) -> Backend:
    """The backend that a connected client is."""

    def models() -> list[ModelCard]:
        newest = {model.name: model for model in client.models()}  # in the order of versions
        # those that write first, then those that embed; the others know no text
        known = sorted((m for m in newest.values() if m.context or m.vocabulary_digest), key=lambda m: not m.context)
        return [ModelCard(m.name, m.owner, int(m.created)) for m in known]

    def parties() -> list[PartyCard]:
        pins = {endpoint.role: endpoint.key_pin for endpoint in cluster.holders}
        return [
            PartyCard(s.role, s.address, pins.get(s.role, ""), s.state, s.detail, s.operator, s.evidence)
            for s in client.status()
        ]

    def embed(name: str, text: Text, seconds: float) -> Embedded:
        receipts: list[Receipt] = []
        if isinstance(text, str):
            (vector,) = client.embed(name, [text], timeout=seconds, receipts=receipts)
            return Embedded(vector.flatten().tolist(), client.count_tokens(name, text), receipts)
        output = client.infer(name, torch.tensor(list(text), dtype=torch.int64), timeout=seconds, receipts=receipts)
        if not isinstance(output, torch.Tensor) or output.numel() != output.shape[-1]:
            raise UnsupportedError(f"model {name!r} does not give one vector for a list of tokens")
        return Embedded(output.flatten().tolist(), len(text), receipts)

    return Backend(client, models, parties, embed, timeout, lambda: client.manifest)
