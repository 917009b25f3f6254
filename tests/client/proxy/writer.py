"""A Writer that needs no parties: it answers by rule, a word at a time, with shares that are real noise."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpcinfer.client.generation import Finish, Piece, Prompt, Settings, StepCost
from mpcinfer.client.proxy.backend import Backend, Embedded, ModelCard, PartyCard, Text
from mpcinfer.errors import ContextLengthError, NotFoundError
from mpcinfer.trust.receipt import Receipt

CONTEXT = 1000  # tokens, here words


@dataclass
class FakeGeneration:
    """An answer of words, at most one per `delay` seconds."""

    words: list[str]
    settings: Settings
    delay: float
    model: str
    prompt_tokens: int
    cached_tokens: int
    sent: tuple[bytes, ...]
    before: Callable[[int], None]
    id: str = "fake"
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None
    receipt: Receipt | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    cancelled_at: float = 0.0

    def __iter__(self) -> Iterator[Piece]:
        for number, word in enumerate(self.words[: self.settings.max_new_tokens]):
            self.before(number)
            if self.cancelled.wait(self.delay):
                self.finish = "cancelled"
                return
            self.tokens.append(number)
            if any(stop in word for stop in self.settings.stop):
                self.finish = "stop"
                yield self._piece("", number)
                return
            self.text += word
            yield self._piece(word, number)
        self.finish = "stop" if len(self.words) <= self.settings.max_new_tokens else "length"

    def _piece(self, text: str, token: int) -> Piece:
        return Piece(text, token, StepCost(0.25, 0.5, 40, 120_000, 340_000), noise(len(self.sent), 8))

    def cancel(self) -> None:
        self.cancelled_at = self.cancelled_at or time.monotonic()
        self.cancelled.set()


def noise(parties: int, size: int) -> tuple[bytes, ...]:
    """Shares."""
    return tuple(secrets.token_bytes(size) for _ in range(parties))


@dataclass
class FakeWriter:
    """Repeats what it is told, in capitals. `begun` has what was written; `before(number)` is called before a token."""

    parties: int = 2
    delay: float = 0.0
    answer: str = ""
    before: Callable[[int], None] = lambda number: None
    sign: Callable[[Text], list[Any]] = lambda text: []  # what stands in for receipts of embeddings
    before_begin: Callable[[], None] = lambda: None
    begun: list[FakeGeneration] = field(default_factory=list)
    asked: list[tuple[Prompt, Settings, float]] = field(default_factory=list)

    def generate(self, name: str, prompt: Prompt, settings: Settings, *, timeout: float) -> FakeGeneration:
        self.before_begin()
        if name != "tiny":
            raise NotFoundError("no such model is deployed here")
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        self.asked.append((prompt, settings, timeout))
        whole = text if isinstance(prompt, str) else " ".join(message["content"] for message in prompt)
        count = len(whole.split())
        if count > CONTEXT:
            raise ContextLengthError(f"the prompt has {count} tokens, the model takes {CONTEXT}")
        words = [f" {word}" if i else word for i, word in enumerate((self.answer or text.upper()).split())]
        cached = count if any(prompt == earlier for earlier, _, _ in self.asked[:-1]) else 0
        generation = FakeGeneration(
            words, settings, self.delay, name, count, cached, noise(self.parties, 8 * count), self.before
        )
        self.begun.append(generation)
        return generation

    def embed(self, name: str, text: Text, timeout: float) -> Embedded:
        """The number of words and of letters, or the ids."""
        if name != "encoder":
            raise NotFoundError("no such model is deployed here")
        if isinstance(text, str):
            vector = [float(len(text.split())), float(len(text))]
            return Embedded(vector, len(text.split()), self.sign(text))
        return Embedded([float(i) for i in text], len(text), self.sign(text))

    def backend(self) -> Backend:
        """All that the proxy needs."""
        models = [ModelCard("tiny", "owner/o", 1_700_000_000), ModelCard("encoder", "owner/o", 1_700_000_001)]
        parties = [
            PartyCard(f"party/{i}", f"10.20.0.{i + 10}:7100", "sha256:" + f"{i + 10:x}" * 64, "ready")
            for i in range(self.parties)
        ]
        return Backend(self, lambda: models, lambda: parties, self.embed, 60.0)


def words(count: int) -> Sequence[str]:
    """A long text."""
    return ["word"] * count
