"""The proxy as an ASGI application, and the server that runs it."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from importlib import resources
from typing import Any, NoReturn, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from mpcinfer.client.proxy import requests, shapes
from mpcinfer.client.proxy.backend import Backend, Embedded, PartyCard
from mpcinfer.client.proxy.body import ParameterError
from mpcinfer.client.proxy.failures import refusal
from mpcinfer.client.proxy.guard import Guard, is_loopback
from mpcinfer.client.proxy.metrics import Meter
from mpcinfer.client.proxy.responses import Responses
from mpcinfer.client.proxy.shapes import Completions
from mpcinfer.client.proxy.streaming import Answers, CallerGone, EventStream, Gate, unless_gone
from mpcinfer.errors import ConfigError, NotFoundError
from mpcinfer.trust.receipt import Receipt

MAX_BODY = 4 << 20
MAX_AT_ONCE = 32
_FRESH = 2.0  # seconds that the parties' states are good for
_GRACE = 2  # seconds for requests in flight when the proxy stops
_MIN_TOKEN = 16
_T = TypeVar("_T")
_RECEIPTS = 4096  # that are kept, and those of the newest answer


class Proxy:
    """The endpoints."""

    def __init__(self, backend: Backend, *, max_body: int = MAX_BODY, max_at_once: int = MAX_AT_ONCE) -> None:
        self.meter = Meter()
        self._backend = backend
        self._gate = Gate(max_at_once)
        self._embedding = ThreadPoolExecutor(max_at_once, "embedding")
        self._max_body = max_body
        self._asking = asyncio.Lock()
        self._cards: Sequence[PartyCard] = ()
        self._stale = 0.0
        self._receipts: OrderedDict[str, list[Receipt]] = OrderedDict()
        self._page = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    def routes(self) -> list[Route]:
        """Where each endpoint is."""
        get = {
            "/": self._show_page,
            "/healthz": self._health,
            "/metrics": self._metrics,
            "/api/parties": self._parties,
            "/v1/models": self._models,
            "/v1/models/{id:path}": self._model,
            "/v1/receipts/{id}": self._receipt,
        }
        post = {
            "/v1/chat/completions": self._chat,
            "/v1/completions": self._complete,
            "/v1/responses": self._respond,
            "/v1/embeddings": self._embed,
        }
        return [
            *(Route(path, _answering(handler), methods=["GET"]) for path, handler in get.items()),
            *(Route(path, _answering(handler), methods=["POST"]) for path, handler in post.items()),
        ]

    # --- writing -------------------------------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        wanted = requests.chat(await self._body(request))
        shares = wanted.stream and request.headers.get("x-mpcinfer-shares") == "1"
        return await self._write(request, wanted, Completions(wanted, chat=True, shares=shares), early=shares)

    async def _complete(self, request: Request) -> Response:
        wanted = requests.completion(await self._body(request))
        return await self._write(request, wanted, Completions(wanted, chat=False))

    async def _respond(self, request: Request) -> Response:
        wanted = requests.response(await self._body(request))
        return await self._write(request, wanted, Responses(wanted))

    async def _write(
        self, request: Request, wanted: requests.Writing, shape: Completions | Responses, *, early: bool = False
    ) -> Response:
        answers = Answers(self._backend, self.meter, self._gate, wanted, lambda found: self._keep(shape.id, found))
        where = _where(shape.id)
        try:
            if not wanted.stream:
                return JSONResponse(await unless_gone(request.receive, shape.whole(answers)), headers=where)
            await unless_gone(request.receive, answers.settle(early=early))
        except BaseException:
            answers.close()
            raise
        return EventStream(shape.stream(answers), answers.close, where)

    def _keep(self, id_: str, receipts: list[Receipt]) -> None:
        """What the parties have signed about the answers to a request, until there are newer ones."""
        if receipts:
            self._receipts[id_] = receipts
        while sum(map(len, self._receipts.values())) > _RECEIPTS and len(self._receipts) > 1:
            self._receipts.popitem(last=False)

    async def _embed(self, request: Request) -> Response:
        wanted = requests.embedding(await self._body(request))
        self._gate.enter()
        gone, loop = threading.Event(), asyncio.get_running_loop()
        work = self._embedding.submit(self._embedded, wanted, gone)

        def leave(_: Future[list[Embedded]]) -> None:
            with suppress(RuntimeError):  # of a loop that is closed
                loop.call_soon_threadsafe(self._gate.leave)

        work.add_done_callback(leave)  # not when the caller goes: a thread is still busy
        try:
            found = await unless_gone(request.receive, _result(work))
        finally:
            gone.set()
        id_ = shapes.new_id("embd-")
        self._keep(id_, [receipt for each in found for receipt in each.receipts])
        vectors, tokens = [each.vector for each in found], sum(each.tokens for each in found)
        content = shapes.embeddings(wanted.model, vectors, tokens, as_base64=wanted.base64)
        return JSONResponse(content, headers=_where(id_))

    def _embedded(self, wanted: requests.Embedding, gone: threading.Event) -> list[Embedded]:
        found: list[Embedded] = []
        for text in wanted.texts:
            if gone.is_set():
                break
            each = self._backend.embed(wanted.model, text, self._backend.timeout)
            self.meter.embedded(each.tokens)
            found.append(each)
        return found

    # --- looking -------------------------------------------------------------------------------------------------

    async def _models(self, request: Request) -> Response:
        cards = await asyncio.to_thread(self._backend.models)
        return JSONResponse({"object": "list", "data": [shapes.model_object(card) for card in cards]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["id"]
        for card in await asyncio.to_thread(self._backend.models):
            if card.name == name:
                return JSONResponse(shapes.model_object(card))
        raise NotFoundError("no model of this name is deployed; GET /v1/models lists those that are")

    async def _receipt(self, request: Request) -> Response:
        found = self._receipts.get(request.path_params["id"])
        if found is None:
            raise NotFoundError(f"no receipt of this id: the last {_RECEIPTS} answers' are kept, once they end")
        which = request.query_params.get("index", "0")
        if not (which.isascii() and which.isdecimal() and int(which) < len(found)):
            raise NotFoundError(f"index names one of the answers to this request, from 0 to {len(found) - 1}")
        return Response(found[int(which)].to_bytes(), media_type="application/json")

    async def _parties(self, request: Request) -> Response:
        """Who the parties are, for the page. However many pages ask, the parties are asked once in a while."""
        async with self._asking:
            if time.monotonic() >= self._stale:
                self._cards = await asyncio.to_thread(self._backend.parties)
                self._stale = time.monotonic() + _FRESH
        return JSONResponse({"parties": [asdict(card) for card in self._cards]})

    async def _health(self, request: Request) -> Response:
        manifest = self._backend.manifest()
        members = [] if manifest is None else manifest.members
        parties = [{"role": m.facts.role, "operator": m.facts.operator, "evidence": m.evidence} for m in members]
        return JSONResponse({"status": "ok", "pinned": manifest is not None and manifest.pinned, "parties": parties})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.meter.text(), media_type="text/plain; version=0.0.4")

    async def _show_page(self, request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return HTMLResponse(self._page.replace("{{nonce}}", nonce), headers={"Content-Security-Policy": policy})

    async def _body(self, request: Request) -> Any:
        """The JSON of a request; what is too large is read to its end, or the caller would not hear the answer."""
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size <= self._max_body:
                chunks.append(chunk)
            elif size > 16 * self._max_body:
                break
        if size > self._max_body:
            raise HTTPException(413, f"the body is larger than {self._max_body >> 10} KiB")
        try:
            return json.loads(b"".join(chunks), parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            raise ParameterError("the body is no JSON") from None


async def _result(work: Future[_T]) -> _T:
    return await asyncio.wrap_future(work)


def _where(id_: str) -> dict[str, str]:
    """The header that says where the receipts of an answer are."""
    return {"X-Mpcinfer-Receipt": f"/v1/receipts/{id_}"}


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError("NaN and Infinity are no JSON")


def _answering(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request)
        except CallerGone:
            raise
        except Exception as error:
            return refusal(error)

    return endpoint


async def _unrouted(request: Request, error: Exception) -> Response:
    """Paths and methods that there are not."""
    return refusal(error)


def create_app(
    backend: Backend,
    *,
    host: str = "127.0.0.1",
    token: str | None = None,
    max_body: int = MAX_BODY,
    max_at_once: int = MAX_AT_ONCE,
) -> ASGIApp:
    """The application for a server that listens at `host`. ConfigError if others could reach it and no token is set."""
    loopback = is_loopback(host)
    if not loopback and token is None:
        raise ConfigError(f"others can reach {host}: write a token to a file and give it with --token-file")
    if token is not None and (len(token) < _MIN_TOKEN or not token.isascii() or not token.isprintable()):
        raise ConfigError(f"a token has {_MIN_TOKEN} characters or more, all of them printable ASCII")
    proxy = Proxy(backend, max_body=max_body, max_at_once=max_at_once)
    inner = Starlette(routes=proxy.routes(), exception_handlers={HTTPException: _unrouted})
    inner.router.redirect_slashes = False  # a redirect would repeat the Host header
    return Guard(inner, proxy.meter, loopback=loopback, token=token)


def server(app: ASGIApp, host: str, port: int) -> uvicorn.Server:
    """A server for the application. It logs nothing about requests: the application does, without their contents."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=_GRACE,
    )
    logging.getLogger("uvicorn.access").disabled = True  # it would write down whole paths, whoever listens to it
    return uvicorn.Server(config)
