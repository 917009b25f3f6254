"""What objects that hold a prompt or an answer say of themselves: nothing of either."""

from __future__ import annotations

from typing import Any

import pytest

from mpcinfer.client.generation import Piece, Settings, StepCost
from mpcinfer.client.model import Model
from mpcinfer.client.proxy.requests import Embedding, Writing
from mpcinfer.client.writing import Answer, Known, Memory

WORD, TOKEN = "sphinx", 987654321
MODEL = Model("m", 1, "00" * 32, "owner/alice", "tokens", 1, (), (), 0.0)


def remembering() -> Memory:
    memory = Memory()
    memory.add(Known(MODEL, b"i" * 16, (TOKEN,)))
    return memory


def answer() -> Answer:
    """One that was never begun."""
    found = object.__new__(Answer)
    found.text, found.tokens, found._prompt = WORD, [TOKEN], [TOKEN]
    return found


@pytest.mark.parametrize(
    "thing",
    [
        Settings(stop=(WORD,)),
        Piece(WORD, TOKEN, StepCost(0.0, 0.0, 0, 0, 0), (WORD.encode(),)),
        Known(MODEL, b"i" * 16, (TOKEN,)),
        remembering(),
        answer(),
        Writing("m", (WORD, [{"role": "user", "content": WORD}]), Settings(), echo=(("user", WORD),)),
        Embedding("m", (WORD, [TOKEN]), base64=False),
    ],
    ids=lambda x: type(x).__name__,
)
def test_no_content(thing: Any) -> None:
    for text in (repr(thing), str(thing), f"{[thing]}"):
        assert WORD not in text and str(TOKEN) not in text
