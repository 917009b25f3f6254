"""A proxy at a free port of this machine, served from a thread, in front of a fake writer."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

from mpcinfer.client.generation import Prompt, Settings
from mpcinfer.client.proxy.app import create_app, server
from mpcinfer.client.proxy.backend import Embedded, Text
from tests.client.proxy.writer import FakeGeneration, FakeWriter


@contextmanager
def serving(writer: FakeWriter, **options: Any) -> Iterator[str]:
    """The address of a proxy that runs meanwhile."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        port = listening.getsockname()[1]
        running = server(create_app(writer.backend(), **options), "127.0.0.1", port)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            end = time.monotonic() + 10
            while not running.started:
                assert time.monotonic() < end and thread.is_alive()
                time.sleep(0.01)
            yield f"http://127.0.0.1:{port}"
        finally:
            running.should_exit = True
            thread.join(15)
            assert not thread.is_alive()


class Slot(FakeWriter):
    """The writer behind a proxy that several tests share: each puts in its own."""

    current: FakeWriter

    def generate(self, name: str, prompt: Prompt, settings: Settings, *, timeout: float) -> FakeGeneration:
        return self.current.generate(name, prompt, settings, timeout=timeout)

    def embed(self, name: str, text: Text, timeout: float) -> Embedded:
        return self.current.embed(name, text, timeout)


@pytest.fixture(scope="module")
def slot() -> Iterator[tuple[Slot, str]]:
    """A proxy and its address."""
    made = Slot()
    with serving(made) as address:
        yield made, address


@pytest.fixture
def writer(slot: tuple[Slot, str]) -> FakeWriter:
    slot[0].current = FakeWriter()
    return slot[0].current


@pytest.fixture
def url(slot: tuple[Slot, str], writer: FakeWriter) -> str:
    return slot[1]


@pytest.fixture(scope="module")
def connected(slot: tuple[Slot, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{slot[1]}/v1", api_key="none", max_retries=0, timeout=20) as made:
        yield made


@pytest.fixture
def client(connected: openai.OpenAI, writer: FakeWriter) -> openai.OpenAI:
    return connected


@pytest.fixture(scope="module")
def raw(slot: tuple[Slot, str]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=slot[1], timeout=20) as made:
        yield made


@pytest.fixture
def http(raw: httpx.Client, writer: FakeWriter) -> httpx.Client:
    return raw
