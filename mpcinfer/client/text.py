"""Text to token ids and back, on the data owner's machine: no text leaves it, only shares of ids do."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Self

import tokenizers
import torch

from mpcinfer.client.chat import rendered, unescaped
from mpcinfer.client.generation import Message
from mpcinfer.client.locate import AnyPath
from mpcinfer.errors import ContextLengthError, InputError
from mpcinfer.models.vocabulary import Vocabulary

_INCOMPLETE = "\ufffd"  # what stands for bytes that are no character yet


class Tokenizer:
    """A model's tokenizer. Nothing is padded and nothing is cut off: a text's length in tokens is public."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, limit: int | None = None, vocabulary: Vocabulary | None = None
    ) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        # the library has a mode, not an argument, for what spells special tokens, and answers share a tokenizer
        self._one_at_a_time = threading.Lock()
        self._limit = limit
        self._vocabulary = vocabulary
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in added.items() if token.special}

    @classmethod
    def load(cls, path: AnyPath, limit: int | None = None) -> Self:
        """The tokenizer in a tokenizer.json, for texts of at most `limit` tokens. InputError if it can't be read."""
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)), limit)
        except Exception as error:  # the library raises nothing more specific
            raise InputError(f"{path} is missing or no tokenizer.json ({type(error).__name__})") from error

    @classmethod
    def of(cls, vocabulary: Vocabulary, limit: int | None = None) -> Self:
        """The tokenizer of a language model, which may know its chat template. InputError if it can't be read."""
        try:
            return cls(tokenizers.Tokenizer.from_str(vocabulary.tokenizer), limit, vocabulary)
        except Exception as error:  # the library raises nothing more specific
            raise InputError(f"the model's vocabulary has no usable tokenizer ({type(error).__name__})") from error

    def ids(self, text: str) -> torch.Tensor:
        """The ids of a text with the special tokens its model expects, int64 [length].

        Special tokens that the text spells out are taken for such. InputError if there are none, or more than the
        limit.
        """
        return self._checked(self._encoded(text))

    def chat(self, messages: Sequence[Message]) -> torch.Tensor:
        """The ids of a conversation as the model's chat template writes it, ready for an answer; int64 [length].

        Special tokens come from the template alone. What a message spells like one, such as "<|im_end|>", is encoded
        as the characters that it consists of, so no message can pretend to be another's. Raises InputError without a
        template, for messages that it refuses, and for a conversation of more tokens than the limit.
        """
        if self._vocabulary is None or not self._vocabulary.template:
            raise InputError("the model has no chat template: give a text to continue instead of messages")
        text, escaped = rendered(self._vocabulary, messages, self._special)
        if not escaped:  # the template writes its own beginning-of-sequence token if the model wants one
            return self._checked(self._encoded(text, whole=False))
        found: list[int] = []
        for piece in unescaped(text, escaped, self._special):
            special = piece in self._special
            found += [self._special[piece]] if special else self._encoded(piece, whole=False, literal=True)
        return self._checked(found)

    def _encoded(self, text: str, *, whole: bool = True, literal: bool = False) -> list[int]:
        """Its ids. whole: with the special tokens that a text has around it. literal: nothing in it is one."""
        with self._one_at_a_time:
            self._tokenizer.encode_special_tokens = literal
            return list(self._tokenizer.encode(text, add_special_tokens=whole).ids)

    def _checked(self, found: list[int]) -> torch.Tensor:
        if not found:
            raise InputError("the text has no token")
        if self._limit is not None and len(found) > self._limit:
            raise ContextLengthError(
                f"the text has {len(found)} tokens and the model takes {self._limit}: shorten the text"
            )
        return torch.tensor(found, dtype=torch.int64)

    def decode(self, ids: torch.Tensor | Sequence[int]) -> str:
        """The text of ids [length], without special tokens."""
        numbers = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        text: str = self._tokenizer.decode(numbers)
        return text


class Detokenizer:
    """Text of tokens that come one by one: what `feed` and at last `flush` return is in all what `decode` returns."""

    def __init__(self, tokenizer: Tokenizer, before: torch.Tensor | Sequence[int] = ()) -> None:
        """before: the ids that the text continues, if a space at its beginning matters."""
        self._tokenizer = tokenizer
        self._ids: list[int] = before.tolist() if isinstance(before, torch.Tensor) else list(before)
        self._known = len(self._ids)  # how many of them the text returned so far covers

    def feed(self, token: int) -> str:
        """The text that is complete now; "" while a character lacks bytes, and for a special token."""
        self._ids.append(token)
        return self._grown(final=False)

    def flush(self) -> str:
        """The rest, when no token follows: bytes that are no character become replacement characters."""
        return self._grown(final=True)

    def _grown(self, final: bool) -> str:
        old = self._tokenizer.decode(self._ids[: self._known])
        new = self._tokenizer.decode(self._ids)
        if new.endswith(_INCOMPLETE) and not final:
            return ""
        if new != old:  # the tokens returned last are enough to see what goes before a next one, such as a space
            del self._ids[: self._known]
        self._known = len(self._ids)
        return new[len(old) :]


class StopTexts:
    """Finds in a text that comes in pieces the first of several others; holds back what may be its beginning."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """What may be shown now, and whether a stop text is complete: then nothing more may."""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:  # the one that is complete first, in whatever pieces it came
            safe, self._held = self._held[: min(found)[1]], ""
            return safe, True
        most = max(map(len, self._stops), default=1) - 1
        begins = (n for n in range(min(most, len(self._held)), 0, -1) if self._begins(self._held[-n:]))
        kept = next(begins, 0)
        safe, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return safe, False

    def _begins(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)

    def flush(self) -> str:
        """What was held back, when no text follows."""
        held, self._held = self._held, ""
        return held
