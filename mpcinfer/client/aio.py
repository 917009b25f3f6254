"""The data owner's side for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, Self, TypeVar

import torch

from mpcinfer.client.audit import Audit
from mpcinfer.client.cluster import CONNECT_TIMEOUT
from mpcinfer.client.data import GENERATE_TIMEOUT, Client
from mpcinfer.client.generation import Piece, Prompt, Settings
from mpcinfer.client.inputs import Array
from mpcinfer.client.locate import AnyPath
from mpcinfer.client.model import Model
from mpcinfer.client.outputs import Cost
from mpcinfer.client.status import PartyStatus
from mpcinfer.client.tokens import UserToken
from mpcinfer.config import Cluster
from mpcinfer.trust.receipt import Receipt
from mpcinfer.wire.identity import Identity

_MAX_CALLS = 64

_P = ParamSpec("_P")
_T = TypeVar("_T")


class AsyncClient:
    """`Client` for asyncio: the same calls, up to 64 of them at the same time, each in a thread of its own.

    Cancelling a call stops waiting for it; the parties finish the request and the answer is dropped.
    """

    def __init__(self, client: Client, threads: ThreadPoolExecutor) -> None:
        self._client = client
        self._threads = threads

    @classmethod
    async def connect(
        cls,
        cluster: AnyPath | Cluster,
        identity: AnyPath | Identity | None = None,
        *,
        token: UserToken | None = None,
        timeout: float = CONNECT_TIMEOUT,
        pin: AnyPath | None = None,
    ) -> Self:
        """Connect to all parties; see `Client.connect`. A `token` that is a function is called in other threads."""
        client = await asyncio.to_thread(Client.connect, cluster, identity, token=token, timeout=timeout, pin=pin)
        return cls(client, ThreadPoolExecutor(_MAX_CALLS, thread_name_prefix="mpcinfer"))

    @property
    def last_cost(self) -> Cost | None:
        """What the answer that came last cost; see `Client.last_cost`."""
        return self._client.last_cost

    @property
    def last_receipt(self) -> Receipt | None:
        """What all parties have signed about the last answer; see `Client.last_receipt`."""
        return self._client.last_receipt

    async def infer(
        self,
        name: str,
        *inputs: Array,
        version: int = 0,
        timeout: float = 60.0,
        audit: Audit | None = None,
        receipts: list[Receipt] | None = None,
    ) -> Any:
        """See `Client.infer`."""
        return await self._run(
            self._client.infer, name, *inputs, version=version, timeout=timeout, audit=audit, receipts=receipts
        )

    async def generate(
        self,
        name: str,
        prompt: Prompt | Sequence[int],
        settings: Settings | None = None,
        *,
        version: int = 0,
        timeout: float = GENERATE_TIMEOUT,
        audit: Audit | None = None,
        **changes: Any,
    ) -> AsyncIterator[Piece]:
        """The pieces of an answer as they arrive; see `Client.generate`. Leaving early ends it."""
        answer = await self._run(
            self._client.generate, name, prompt, settings, version=version, timeout=timeout, audit=audit, **changes
        )
        pieces = iter(answer)
        try:
            while (piece := await self._run(next, pieces, None)) is not None:
                yield piece
        finally:
            answer.cancel()

    async def embed(
        self, name: str, texts: Sequence[str], *, timeout: float = 60.0, receipts: list[Receipt] | None = None
    ) -> list[torch.Tensor]:
        """See `Client.embed`."""
        return await self._run(self._client.embed, name, texts, timeout=timeout, receipts=receipts)

    async def models(self) -> list[Model]:
        """See `Client.models`."""
        return await self._run(self._client.models)

    async def status(self) -> list[PartyStatus]:
        """See `Client.status`."""
        return await self._run(self._client.status)

    async def close(self) -> None:
        """Close the connection; calls in flight fail."""
        await asyncio.to_thread(self._client.close)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(call, *args, **kwargs))
