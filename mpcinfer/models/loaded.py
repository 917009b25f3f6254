"""What a model file turns into: a torch module, and what inputs it takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mpcinfer.errors import InputError
from mpcinfer.models.vocabulary import Vocabulary

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

_SPEC = re.compile(r"(\w+):(float|int)\[([0-9.,\s]*)\]")
_SIZE = re.compile(r"(\d+)(?:\.\.(\d+))?")


@dataclass(frozen=True)
class Sizes:
    """A free size: every number from `low` to `high`."""

    low: int
    high: int


@dataclass(frozen=True)
class InputSpec:
    """One input of a model: `dtype` is "float" or "int" (indices, such as token ids), `shape` sizes, fixed or free."""

    name: str
    dtype: str
    shape: tuple[int | Sizes, ...]


@dataclass(frozen=True)
class Loaded:
    """A model ready to be exported: one argument of the module's `forward` for each of `inputs`, in order.

    `kind` says what the file was, for people. `tokenizer` is the path of a tokenizer.json where the model has one.
    A language model that continues texts has a `context`, the most positions it takes (0 for all other models), is a
    `models.decoder.Decoder`, and has a `vocabulary` if its file says how texts become tokens.
    """

    module: nn.Module | ExportedProgram
    inputs: tuple[InputSpec, ...]
    kind: str
    tokenizer: Path | None = None
    labels: tuple[str, ...] = field(default=())
    vocabulary: Vocabulary | None = None
    context: int = 0

    def words(self) -> Vocabulary | None:
        """What turns text into the model's tokens: the vocabulary of a language model, the tokenizer of an encoder."""
        if self.vocabulary is not None or self.tokenizer is None:
            return self.vocabulary
        try:
            return Vocabulary(self.tokenizer.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{self.tokenizer} cannot be read ({type(error).__name__})") from error


def parse_inputs(specs: Sequence[str]) -> tuple[InputSpec, ...]:
    """Specifications such as "ids:int[1..256]" or "x:float[1,3,224,224]"; InputError saying what is wrong with one."""
    found = []
    for text in specs:
        match = _SPEC.fullmatch(text.strip())
        if match is None:
            raise InputError(f"{text!r} is not an input: write name:float[1,3,224,224] or name:int[1..256]")
        shape = tuple(_size(part, text) for part in match[3].split(",") if part.strip())
        found.append(InputSpec(match[1], match[2], shape))
    if len({spec.name for spec in found}) != len(found):
        raise InputError("two inputs have the same name")
    return tuple(found)


def _size(part: str, text: str) -> int | Sizes:
    match = _SIZE.fullmatch(part.strip())
    if match is None:
        raise InputError(f"{part.strip()!r} in {text!r} is not a size: write 8, or 1..256 for a range")
    low = int(match[1])
    if match[2] is None:
        return low
    high = int(match[2])
    if not 1 <= low < high:
        raise InputError(f"the range {part.strip()!r} in {text!r} must begin at 1 or more and end above that")
    return Sizes(low, high)
