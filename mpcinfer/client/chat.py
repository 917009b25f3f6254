"""A conversation as a model's chat template writes it, with what messages spell like special tokens kept apart."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mpcinfer.client.generation import Message
from mpcinfer.errors import InputError
from mpcinfer.models.vocabulary import Vocabulary

_PRIVATE = range(0xF0000, 0xFFFFE)  # code points that Unicode leaves to everybody


class _Refused(Exception):
    """A template's own raise_exception."""


class _Generation(Extension):
    """{% generation %}, by which templates mark for training what the model wrote; here it means nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """What is between the marks."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def rendered(
    vocabulary: Vocabulary, messages: Sequence[Message], special: Collection[str]
) -> tuple[str, dict[str, str]]:
    """The text that asks for an answer, and what in it stands for what.

    In the messages the first character of whatever spells a token of `special` is replaced by one that occurs
    nowhere, before the template sees them: so the template can trim, cut and compare them, and what is a special token
    behind it is the template's own. The second result maps each such stand-in to its character, empty if there is
    none. InputError for what the template refuses or stumbles over.
    """
    texts = [text for message in messages for text in (*message.keys(), *message.values())]
    if not messages or not all(isinstance(text, str) for text in texts):
        raise InputError('a conversation is a list of messages such as {"role": "user", "content": "..."}')
    escape = _Escape(special, "".join(texts))
    escaped = [{key: escape(value) for key, value in message.items()} for message in messages]
    try:
        template = _environment().from_string(vocabulary.template)
        text = template.render(
            messages=escaped, add_generation_prompt=True, bos_token=vocabulary.bos, eos_token=vocabulary.eos
        )
    except _Refused as error:
        raise InputError(f"the model's chat template refuses the conversation: {error}") from error
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"the model's chat template is no template ({error.message})") from error
    except Exception as error:  # a template is a program: anything can go wrong in it
        raise InputError(f"the model's chat template failed on the conversation ({type(error).__name__})") from error
    return text, escape.used


def unescaped(text: str, escaped: Mapping[str, str], special: Collection[str]) -> Iterator[str]:
    """The pieces of a rendered text: special tokens, and what is between them, in its own spelling."""
    for piece in re.split(f"({_any(special)})", text):
        if piece:
            yield piece if piece in special else "".join(escaped.get(c, c) for c in piece)


class _Escape:
    """Replaces the first characters of special tokens in texts, each by one private character."""

    def __init__(self, special: Collection[str], texts: str) -> None:
        self._begins = re.compile(f"(?=({_any(special)}))") if special else None
        self._free = (chr(code) for code in _PRIVATE if chr(code) not in texts)
        self._stand_ins: dict[str, str] = {}

    @property
    def used(self) -> dict[str, str]:
        """What each private character stands for."""
        return {private: own for own, private in self._stand_ins.items()}

    def __call__(self, text: str) -> str:
        found = list(text)
        for match in self._begins.finditer(text) if self._begins else ():
            own = found[match.start()]
            if own not in self._stand_ins:
                self._stand_ins[own] = next(self._free)
            found[match.start()] = self._stand_ins[own]
        return "".join(found)


def _any(special: Collection[str]) -> str:
    """A pattern for any of them, the longest first."""
    return "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))


def _environment() -> ImmutableSandboxedEnvironment:
    """What chat templates are written for; they come with models, so they may look at nothing and change nothing."""

    def raise_exception(message: str) -> None:
        raise _Refused(message)

    def strftime_now(pattern: str) -> str:
        return datetime.datetime.now().strftime(pattern)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation], autoescape=False
    )
    found.filters["tojson"] = tojson  # jinja's own writes for HTML
    found.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return found
