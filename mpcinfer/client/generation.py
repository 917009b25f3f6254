"""Text that a language model writes under encryption: what is asked for, and the pieces that arrive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from mpcinfer.trust.receipt import Receipt

Message = Mapping[str, str]  # {"role": "user", "content": "..."}
Prompt = str | Sequence[Message]
Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Settings:
    """How the next token is chosen, and when to stop.

    temperature 0 is greedy; top_k 0 means all tokens; repetition_penalty as in Keskar et al. 2019, 1 for none.
    stop: texts that end the answer and are not part of it.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class StepCost:
    """What one step (a chunk of the prompt, or a token) cost, as the parties counted it."""

    seconds_online: float
    seconds_offline: float
    rounds: int
    bytes_sent_per_party: int
    bytes_sent_by_dealer: int


@dataclass(frozen=True)
class Piece:
    """What came with one token. `text` may be empty: a character can take several tokens, a stop text is held back.

    received: for each party the bytes of its share of this token, which are noise.
    """

    text: str = field(repr=False)
    token: int = field(repr=False)
    cost: StepCost
    received: tuple[bytes, ...] = field(repr=False)


class Generation(Protocol):
    """An answer being written: iterate over it; leaving early or `cancel` ends it at the parties too.

    prompt_tokens, and `sent` (for each party the bytes of the share of the prompt that it was sent), are there from
    the beginning; `text`, `tokens` and `finish` (None while it is written) grow, and `receipt` is of as
    much as is written.
    """

    id: str
    model: str
    prompt_tokens: int
    cached_tokens: int
    sent: tuple[bytes, ...]
    text: str
    tokens: list[int]
    finish: Finish | None
    receipt: Receipt | None

    def __iter__(self) -> Iterator[Piece]:
        """The pieces as they arrive; raises the typed errors of `mpcinfer.errors`."""
        ...

    def cancel(self) -> None:
        """Stop; fine from another thread, and when it has ended already."""
        ...


class Writer(Protocol):
    """What a proxy or a chat needs of a client: `mpcinfer.client.data.Client` is one."""

    def generate(self, name: str, prompt: Prompt, settings: Settings, *, timeout: float) -> Generation:
        """Begin to write. Raises ContextLengthError for a prompt too long, NotFoundError for an unknown model."""
        ...
