"""Text to token ids and back, on the data owner's machine: no text leaves it, only shares of ids do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import tokenizers
import torch

from mpcinfer.client.locate import AnyPath
from mpcinfer.errors import InputError


class Tokenizer:
    """A model's tokenizer. Nothing is padded and nothing is cut off: a text's length in tokens is public."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, limit: int | None = None) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._limit = limit

    @classmethod
    def load(cls, path: AnyPath, limit: int | None = None) -> Self:
        """The tokenizer in a tokenizer.json, for texts of at most `limit` tokens. InputError if it can't be read."""
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)), limit)
        except Exception as error:  # the library raises nothing more specific
            raise InputError(f"{path} is missing or no tokenizer.json ({type(error).__name__})") from error

    def ids(self, text: str) -> torch.Tensor:
        """The ids of a text with the special tokens its model expects, int64 [length].

        InputError if there are none, or more than the limit.
        """
        found = self._tokenizer.encode(text).ids
        if not found:
            raise InputError("the text has no token")
        if self._limit is not None and len(found) > self._limit:
            raise InputError(f"the text has {len(found)} tokens and the model takes {self._limit}: shorten the text")
        return torch.tensor(found, dtype=torch.int64)

    def decode(self, ids: torch.Tensor | Sequence[int]) -> str:
        """The text of ids [length], without special tokens."""
        numbers = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        text: str = self._tokenizer.decode(numbers)
        return text
