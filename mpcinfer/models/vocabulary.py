"""What a language model's clients need beside its shares, and is public: tokenizer, chat template, ends of answers."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass

from mpcinfer.errors import InputError

MAX_BYTES = 64 << 20  # of the JSON


@dataclass(frozen=True)
class Vocabulary:
    """A model's text side.

    tokenizer: the content of a tokenizer.json. template: a Jinja chat template, "" if the model knows no chat.
    bos, eos: the texts of these tokens, "" if there is none. stop: ids that end an answer.
    """

    tokenizer: str
    template: str = ""
    bos: str = ""
    eos: str = ""
    stop: tuple[int, ...] = ()

    def to_bytes(self) -> bytes:
        """Deflated JSON with one spelling."""
        return zlib.compress(json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode(), 9)

    @staticmethod
    def from_bytes(data: bytes) -> Vocabulary:
        """The inverse; InputError for anything else."""
        try:
            inflate = zlib.decompressobj()
            raw = json.loads(inflate.decompress(data, MAX_BYTES))
            if not inflate.eof or set(raw) != {"tokenizer", "template", "bos", "eos", "stop"}:
                raise ValueError("too large, or other fields")
            found = Vocabulary(**raw | {"stop": tuple(raw["stop"])})
            texts = (found.tokenizer, found.template, found.bos, found.eos)
            if not all(type(text) is str for text in texts) or not all(type(i) is int for i in found.stop):
                raise TypeError("not a vocabulary")
        except (ValueError, TypeError, zlib.error, RecursionError) as error:
            raise InputError("this is not a model's vocabulary") from error
        return found
