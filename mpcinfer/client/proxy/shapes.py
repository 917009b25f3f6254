"""What OpenAI's API answers: bodies and the events of streams, made of answers of ours."""

from __future__ import annotations

import base64
import json
import secrets
import struct
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any

from mpcinfer.client.generation import Generation
from mpcinfer.client.proxy.backend import ModelCard
from mpcinfer.client.proxy.failures import problem
from mpcinfer.client.proxy.requests import Writing
from mpcinfer.client.proxy.streaming import Answers, Event

Json = dict[str, Any]

SHOWN = 512  # bytes of a share that a page is shown
_DONE = b"data: [DONE]\n\n"


def new_id(prefix: str) -> str:
    """An id as OpenAI has them."""
    return prefix + secrets.token_hex(16)


def model_object(card: ModelCard) -> Json:
    """An entry of /v1/models."""
    return {"id": card.name, "object": "model", "created": card.created, "owned_by": card.owner}


def embeddings(model: str, vectors: Iterable[Sequence[float]], tokens: int, *, as_base64: bool) -> Json:
    """The answer of /v1/embeddings."""

    def written(vector: Sequence[float]) -> Any:
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if as_base64 else list(vector)

    data = [{"object": "embedding", "index": i, "embedding": written(v)} for i, v in enumerate(vectors)]
    return {
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


class Tally:
    """Which answers there are, and the tokens they took: each prompt counts once."""

    def __init__(self, request: Writing) -> None:
        self._n = request.n
        self.generations: dict[int, Generation] = {}

    def add(self, event: Event) -> None:
        """Note an event."""
        self.generations[event.index] = event.generation

    def counts(self) -> tuple[int, int, int]:
        """Tokens of prompts, of these the cached ones, tokens written."""
        firsts = [g for index, g in self.generations.items() if index % self._n == 0]
        return (
            sum(g.prompt_tokens for g in firsts),
            sum(g.cached_tokens for g in firsts),
            sum(len(g.tokens) for g in self.generations.values()),
        )

    def usage(self) -> Json:
        """As in chat completions."""
        prompt, cached, written = self.counts()
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class Completions:
    """Bodies and chunks of /v1/chat/completions, or (chat=False) of /v1/completions."""

    def __init__(self, request: Writing, *, chat: bool, shares: bool = False) -> None:
        self._request, self._chat, self._shares = request, chat, shares
        self._tally = Tally(request)
        self.id = new_id("chatcmpl-" if chat else "cmpl-")
        self._head = {
            "id": self.id,
            "created": int(time.time()),
            "model": request.model,
        }

    async def whole(self, answers: Answers) -> Json:
        """All answers at once."""
        async for event in answers.events():
            self._tally.add(event)
        kind = "chat.completion" if self._chat else "text_completion"
        choices = [self._choice(index, g) for index, g in sorted(self._tally.generations.items())]
        return {**self._head, "object": kind, "choices": choices, "usage": self._tally.usage()}

    async def stream(self, answers: Answers) -> AsyncGenerator[bytes, None]:
        """The answers as they are written."""
        try:
            async with aclosing(answers.events()) as events:
                async for event in events:
                    self._tally.add(event)
                    for chunk in self._chunks(event):
                        yield sse(chunk)
            if self._request.include_usage:
                yield sse(self._chunk([], self._tally.usage()))
            yield _DONE
        except Exception as error:
            yield sse({"error": problem(error)[1]}, "error")

    def _choice(self, index: int, generation: Generation) -> Json:
        body: Json = {"text": generation.text}
        if self._chat:
            body = {"message": {"role": "assistant", "content": generation.text, "refusal": None}}
        return {"index": index, **body, "logprobs": None, "finish_reason": generation.finish}

    def _chunks(self, event: Event) -> Iterable[Json]:
        shares = self._shares and not event.ended
        if event.ended:
            yield self._part(event.index, "", event.generation.finish)
        elif event.piece is None:
            if self._chat or shares:
                chunk = self._part(event.index, "", None, role=True)
                yield {**chunk, "mpcinfer": sent(event.generation)} if shares else chunk
        elif event.piece.text or shares:
            chunk = self._part(event.index, event.piece.text, None)
            yield {**chunk, "mpcinfer": received(event)} if shares else chunk

    def _part(self, index: int, text: str, finish: str | None, *, role: bool = False) -> Json:
        body: Json = {"text": text}
        if self._chat:
            delta = {"role": "assistant", "content": ""} if role else {"content": text} if text else {}
            body = {"delta": delta}
        return self._chunk([{"index": index, **body, "logprobs": None, "finish_reason": finish}])

    def _chunk(self, choices: list[Json], usage: Json | None = None) -> Json:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        more = {"usage": usage} if self._request.include_usage else {}
        return {**self._head, "object": kind, "choices": choices, **more}


def sent(generation: Generation) -> Json:
    """For the page: the shares of the prompt as they were sent, one for each party."""
    return {
        "prompt_tokens": generation.prompt_tokens,
        "cached_tokens": generation.cached_tokens,
        "sent": [_shown(share) for share in generation.sent],
    }


def received(event: Event) -> Json:
    """For the page: the shares of a token as they came, one from each party, and what it cost."""
    assert event.piece is not None
    cost = event.piece.cost
    return {
        "received": [_shown(share) for share in event.piece.received],
        "seconds": cost.seconds_online,
        "seconds_offline": cost.seconds_offline,
        "rounds": cost.rounds,
        "bytes_sent_per_party": cost.bytes_sent_per_party,
        "bytes_sent_by_dealer": cost.bytes_sent_by_dealer,
    }


def _shown(share: bytes) -> Json:
    return {"bytes": len(share), "hex": share[:SHOWN].hex()}


def sse(content: Json, event: str | None = None) -> bytes:
    """One server-sent event."""
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {json.dumps(content, separators=(',', ':'))}\n\n".encode()
