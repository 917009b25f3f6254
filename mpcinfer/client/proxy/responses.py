"""OpenAI's /v1/responses: one message of text in an object, or as a series of typed events."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from mpcinfer.client.generation import Generation
from mpcinfer.client.proxy.failures import problem
from mpcinfer.client.proxy.requests import Writing
from mpcinfer.client.proxy.shapes import Json, Tally, new_id, sse
from mpcinfer.client.proxy.streaming import Answers


class Responses:
    """The body, or the events, of one response."""

    def __init__(self, request: Writing) -> None:
        self._request = request
        self._tally = Tally(request)
        self.id, self._item = new_id("resp_"), new_id("msg_")
        self._created = int(time.time())
        self._number = 0

    async def whole(self, answers: Answers) -> Json:
        """The answer at once."""
        async for event in answers.events():
            self._tally.add(event)
        return self._body(self._tally.generations[0])

    async def stream(self, answers: Answers) -> AsyncGenerator[bytes, None]:
        """The events as the answer is written."""
        at = {"item_id": self._item, "output_index": 0, "content_index": 0}
        opened = {**self._message("", "in_progress"), "content": []}
        try:
            yield self._event("response.created", response=self._body(None))
            yield self._event("response.in_progress", response=self._body(None))
            yield self._event("response.output_item.added", output_index=0, item=opened)
            yield self._event("response.content_part.added", **at, part=_part(""))
            async with aclosing(answers.events()) as events:
                async for event in events:
                    self._tally.add(event)
                    if event.piece is not None and event.piece.text:
                        yield self._event("response.output_text.delta", **at, delta=event.piece.text, logprobs=[])
            generation = self._tally.generations[0]
            text, body = generation.text, self._body(generation)
            yield self._event("response.output_text.done", **at, text=text, logprobs=[])
            yield self._event("response.content_part.done", **at, part=_part(text))
            yield self._event("response.output_item.done", output_index=0, item=body["output"][0])
            yield self._event(f"response.{body['status']}", response=body)
        except Exception as error:
            said = problem(error)[1]
            # the official event has the fields at its top; clients raise on those that have an `error`
            about = {key: said[key] for key in ("code", "message", "param")}
            yield self._event("error", **about, error=said)

    def _event(self, kind: str, **content: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return sse({"type": kind, "sequence_number": number, **content}, kind)

    def _message(self, text: str, status: str) -> Json:
        return {
            "id": self._item,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": [_part(text)],
        }

    def _body(self, generation: Generation | None) -> Json:
        """The response: while it is written (None), or finished."""
        status, output, usage = "in_progress", [], None
        if generation is not None:
            status = "completed" if generation.finish == "stop" else "incomplete"
            output = [self._message(generation.text, status)]
            prompt, cached, written = self._tally.counts()
            usage = {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
                "output_tokens": written,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + written,
            }
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self._request.model,
            "output": output,
            "usage": usage,
            **dict(self._request.echo),
            "temperature": self._request.settings.temperature,
            "top_p": 1.0,
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "text": {"format": {"type": "text"}},
            "truncation": "disabled",
            "previous_response_id": None,
            "background": False,
            "store": False,
        }


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
