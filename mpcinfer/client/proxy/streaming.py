"""From threads to the event loop: answers are iterated over in threads, what comes is taken from one queue.

Whoever asked may leave at any time, also before the first token; then the answers are cancelled at once.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mpcinfer.client.generation import Generation, Piece
from mpcinfer.client.proxy.backend import Backend
from mpcinfer.client.proxy.metrics import Clock, Meter
from mpcinfer.client.proxy.requests import Writing
from mpcinfer.errors import AbortedError, BusyError
from mpcinfer.trust.receipt import Receipt

_T = TypeVar("_T")


class CallerGone(Exception):
    """Nobody waits for the answer any more."""


class Gate:
    """How many requests may be at work at the same time."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._limit = limit

    def enter(self) -> None:
        """BusyError if there are too many. Called from the event loop only, as is `leave`."""
        if not self._free:
            raise BusyError(f"{self._limit} requests are being answered; try again later")
        self._free -= 1

    def leave(self) -> None:
        """One is done."""
        self._free += 1


@dataclass(frozen=True)
class Event:
    """Something about answer `index`: it began (no piece, no end), a piece came, or it has ended."""

    index: int
    generation: Generation
    piece: Piece | None = None
    ended: bool = False


class Answers:
    """All answers to one request, `n` for each prompt, each written by a thread of its own.

    The first answer to a prompt begins at once; the others when its first token is there, so that they find the work
    on the prompt done.
    """

    def __init__(
        self,
        backend: Backend,
        meter: Meter,
        gate: Gate,
        request: Writing,
        keep: Callable[[list[Receipt]], None] = lambda receipts: None,
    ) -> None:
        """keep: called with the receipts of all answers when these have ended."""
        gate.enter()
        self._keep = keep
        self._gate: Gate | None = gate
        self._backend, self._meter, self._request = backend, meter, request
        self._clock = Clock()
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event | BaseException] = asyncio.Queue()
        self._seen: deque[Event] = deque()
        self._lock = threading.Lock()
        self._running: dict[int, Generation] = {}
        self._cancelled = False
        self._waiting: set[int] = set()  # prompts whose first answer has no token yet
        for prompt in range(len(request.prompts)):
            self._waiting.add(prompt)
            self._start(prompt * request.n)

    @property
    def count(self) -> int:
        """How many answers there will be."""
        return len(self._request.prompts) * self._request.n

    async def settle(self, *, early: bool = False) -> None:
        """Wait until there is something to show: a first token, or (early) that writing began. Raises what went wrong.

        As long as nothing has been sent, an error can still be told by its status.
        """
        while not self._seen or not (early or self._seen[-1].piece or self._seen[-1].ended):
            self._seen.append(await self._next())

    async def events(self) -> AsyncGenerator[Event, None]:
        """Everything that happens until the last answer has ended; the first error ends all."""
        try:
            ended = 0
            while ended < self.count:
                event = self._seen.popleft() if self._seen else await self._next()
                ended += event.ended
                yield event
        finally:
            self.close()

    def close(self) -> None:
        """Cancel what still runs. Never waits."""
        with self._lock:
            self._cancelled = True
            running = [g for g in self._running.values() if g.finish is None]
            receipts = [g.receipt for _, g in sorted(self._running.items()) if g.receipt is not None]
        self._keep(receipts)
        for generation in running:
            threading.Thread(target=generation.cancel, name="cancel", daemon=True).start()
        if self._gate is not None:
            self._gate.leave()
            self._gate = None

    async def _next(self) -> Event:
        event = await self._queue.get()
        if isinstance(event, BaseException):
            raise event
        prompt, which = divmod(event.index, self._request.n)
        if which == 0 and prompt in self._waiting and (event.piece or event.ended):
            self._waiting.remove(prompt)
            for other in range(1, self._request.n):
                self._start(event.index + other)
        return event

    def _start(self, index: int) -> None:
        threading.Thread(target=self._write, args=(index,), name=f"answer-{index}", daemon=True).start()

    def _write(self, index: int) -> None:
        """The work of one thread."""
        try:
            request = self._request
            prompt = request.prompts[index // request.n]
            generation = self._backend.writer.generate(
                request.model, prompt, request.settings, timeout=self._backend.timeout
            )
            with self._lock:
                self._running[index] = generation
                cancelled = self._cancelled
            if cancelled:  # before there was anything to cancel
                generation.cancel()
                return
            self._meter.began(generation)
            self._put(Event(index, generation))
            first = True
            for piece in generation:
                self._meter.piece(piece, self._clock() if first else None)
                first = False
                self._put(Event(index, generation, piece))
            if generation.finish == "cancelled":
                raise AbortedError("the answer was cancelled")
            self._put(Event(index, generation, ended=True))
        except BaseException as error:
            self._put(error)

    def _put(self, event: Event | BaseException) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)
        except RuntimeError:  # the loop is closed: the proxy is stopping
            self._cancelled = True


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of `work`, which is cancelled (CallerGone) if the caller hangs up before it is done."""

    async def hang_up() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(hang_up())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise CallerGone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(Response):
    """Server-sent events, each sent as soon as there is one."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], close: Callable[[], None], headers: Mapping[str, str] | None = None
    ) -> None:
        """close: called at the end, however it comes, even if not one event was asked for."""
        self._events, self._close = events, close
        super().__init__(headers={**(headers or {}), "Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send(send))
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
