"""The commands that write: generate, chat and embed, with a client that needs no parties; and the proxy's own."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from mpcinfer.client.data import Client
from mpcinfer.client.generation import Settings
from mpcinfer.errors import NotFoundError, UnavailableError
from tests.cli.conftest import Shell
from tests.client.fakes import FakeCluster
from tests.client.proxy.writer import FakeWriter

pytestmark = pytest.mark.timeout(60)


class FakeClient(FakeWriter):
    """A client whose answers are made here."""

    def embed(self, name: str, texts: Sequence[str], *, timeout: float, **_: Any) -> list[torch.Tensor]:  # type: ignore[override]
        if name != "encoder":
            raise NotFoundError("no such model")
        return [torch.tensor([1.5, float(len(text))]) for text in texts]

    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """Interrupts arrive even where the tests were started in the background, by a shell that has them ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    made = FakeClient()
    monkeypatch.setattr(Client, "connect", lambda *_, **__: made)
    return made


def pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


# --- generate --------------------------------------------------------------------------------------------------------


def test_generate(shell: Shell, client: FakeClient) -> None:
    done = shell("generate", "tiny", "once upon a time")
    assert (done.code, done.out) == (0, "ONCE UPON A TIME\n")
    assert "4 tokens in" in done.err and "160 rounds" in done.err and "480 kB sent per party" in done.err
    assert client.asked == [("once upon a time", Settings(), 600.0)]


def test_generate_as_json(shell: Shell, client: FakeClient) -> None:
    options = ("--max-new-tokens", 3, "--temperature", 0.5, "--top-k", 9, "--repetition-penalty", 1.1, "--stop", "TI")
    done = shell("generate", "tiny", "once upon a time", *options, "--timeout", 5, "--json")
    assert done.code == 0 and done.err == ""
    assert (done.json["text"], done.json["finish"], done.json["tokens"]) == ("ONCE UPON A", "length", [0, 1, 2])
    assert (done.json["prompt_tokens"], done.json["rounds"], done.json["bytes_sent_per_party"]) == (4, 120, 360_000)
    assert client.asked[0][1:] == (Settings(3, 0.5, 9, 1.1, ("TI",)), 5.0)


def test_generate_from_a_pipe(shell: Shell, client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, "once\nupon")
    assert shell("generate", "tiny", "-").out == "ONCE UPON\n"
    assert client.asked[0][0] == "once\nupon"
    assert shell("generate", "tiny", "").code == 2
    done = shell("generate", "other", "x", "--json")
    assert done.code == 1 and done.json["error"]["type"] == "NotFoundError"


def test_what_is_written_does_not_steer_the_terminal(shell: Shell, client: FakeClient) -> None:
    client.answer = "a\x1b[31mred\x07 \x9bé日本"
    assert shell("generate", "tiny", "x").out == "a[31mred é日本\n"


def test_an_interrupt_stops_the_answer(shell: Shell, client: FakeClient) -> None:
    client.delay = 0.01

    def interrupt(number: int) -> None:
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
            assert client.begun[-1].cancelled.wait(2)

    client.before = interrupt
    done = shell("generate", "tiny", "once upon a time")
    assert (done.code, done.out) == (130, "ONCE UPON\n") and done.err.startswith("[stopped] [2 tokens")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- chat ------------------------------------------------------------------------------------------------------------


def test_chat(shell: Shell, client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, "hello there\n\n/help\nand now\n/quit\nnever\n")
    done = shell("chat", "tiny", "--system", "be kind", "--max-new-tokens", 7)
    assert (done.code, done.out) == (0, "HELLO THERE\nAND NOW\n")
    assert done.err.count("tokens/s") == 2 and "/quit" in done.err
    assert client.asked[1][:2] == (
        [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "hello there"},
            {"role": "assistant", "content": "HELLO THERE"},
            {"role": "user", "content": "and now"},
        ],
        Settings(max_new_tokens=7),
    )


def test_a_piped_chat_ends_with_its_input_or_an_error(
    shell: Shell, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe(monkeypatch, "hello")
    assert shell("chat", "tiny").out == "HELLO\n"

    def fail(number: int) -> None:
        raise UnavailableError("party/1 is gone")

    client.before = fail
    pipe(monkeypatch, "hello\nmore\n")
    done = shell("chat", "tiny")
    assert done.code == 3 and "party/1 is gone" in done.err and len(client.begun) == 2


def test_at_a_terminal_an_error_does_not_end_the_chat(
    shell: Shell, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def fail(number: int) -> None:
        client.before = lambda number: None
        raise UnavailableError("party/1 is gone")

    client.before = fail
    monkeypatch.setattr(sys, "stdin", Terminal("hello\nagain\n"))
    done = shell("chat", "tiny")
    assert done.code == 0 and "AGAIN" in done.out and "error: party/1 is gone" in done.err
    assert client.asked[1][0] == [{"role": "user", "content": "again"}], "what failed is no part of the conversation"


def test_interrupts_in_a_chat(shell: Shell, client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one stops the answer and the chat goes on; a second one during the same answer leaves."""
    client.delay = 0.01

    def interrupt(number: int) -> None:
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
            assert client.begun[-1].cancelled.wait(2)
            if len(client.begun) == 2:
                os.kill(os.getpid(), signal.SIGINT)

    client.before = interrupt
    pipe(monkeypatch, "one two three\nfour five six\nnever\n")
    done = shell("chat", "tiny")
    assert done.code == 130 and done.out == "ONE\nFOUR\n" and "[stopped]" in done.err
    assert client.asked[1][0][1] == {"role": "assistant", "content": "ONE"}


# --- embed -----------------------------------------------------------------------------------------------------------


def test_embed(shell: Shell, client: FakeClient) -> None:
    assert shell("embed", "encoder", "a", "abc").out == "1.500000 1.000000\n1.500000 3.000000\n"
    assert shell("embed", "encoder", "a", "--json").json == {"embeddings": [[1.5, 1.0]]}
    assert shell("embed", "other", "a").code == 1


# --- proxy -----------------------------------------------------------------------------------------------------------


def test_the_proxy_says_what_is_wrong(shell: Shell, world: FakeCluster, tmp_path: Path) -> None:
    done = shell("proxy", "--host", "0.0.0.0", "--port", 0)
    assert done.code == 2 and "--token-file" in done.err
    token = tmp_path / "token"
    token.write_text("correct-horse-battery\n")
    token.chmod(0o644)
    done = shell("proxy", "--token-file", token)
    assert done.code == 2 and "chmod 600" in done.err and "horse" not in done.err
    assert shell("proxy", "--token-file", tmp_path / "none").code == 2
    token.chmod(0o600)
    token.write_text("short")
    assert "16 characters" in shell("proxy", "--token-file", token).err
    token.chmod(0o604)
    done = shell("proxy", "--user-token-file", token)
    assert done.code == 2 and "chmod 600" in done.err
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert "cannot listen" in shell("proxy", "--port", other.getsockname()[1]).err


def test_the_proxy_runs_until_it_is_told_to_stop(world: FakeCluster, tmp_path: Path) -> None:
    """As its own process, in front of fake parties."""
    token = tmp_path / "token"
    token.write_text("correct-horse-battery\n")
    token.chmod(0o600)
    user = tmp_path / "user"
    user.touch(0o600)
    user.write_text("first.users-token\n")
    command = [sys.executable, "-m", "mpcinfer", "proxy", "--port", "0"]
    command += ["--token-file", str(token), "--user-token-file", str(user)]
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("MPCINFER_CLUSTER", None)
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[0]
            headers = {"Authorization": "Bearer correct-horse-battery"}
            with httpx.Client(base_url=url, headers=headers, timeout=20) as http:
                assert [m["id"] for m in http.get("/v1/models").json()["data"]] == ["same"]
                user.write_text("second.users-token\n")
                assert http.get("/v1/models").status_code == 200
                states = [(p["role"], p["state"]) for p in http.get("/api/parties").json()["parties"]]
                assert states == [("party/0", "ready"), ("party/1", "ready")]
                assert "same" not in http.get("/metrics").text
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 130
    lines = [line.split(": ", 1)[1] for line in err.splitlines()]
    assert [line.split(" ")[:3] for line in lines] == [
        ["GET", "/v1/models", "200"],
        ["GET", "/v1/models", "200"],
        ["GET", "/api/parties", "200"],
        ["GET", "/metrics", "200"],
    ]
    assert json.dumps(lines).count("horse") == 0 and json.dumps(lines).count("users-token") == 0
    for party in world.parties:  # each call shows the token as it is in its file then
        assert party.tokens == [("ListModels", "first.users-token"), ("ListModels", "second.users-token")]
