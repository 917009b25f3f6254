"""The proxy over plain HTTP: who is let in, how bodies are limited, how callers leave, what is counted and logged."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from mpcinfer.client.proxy.app import MAX_BODY, Proxy, create_app
from mpcinfer.client.proxy.guard import is_loopback, route
from mpcinfer.errors import ConfigError
from tests.client.proxy.conftest import serving
from tests.client.proxy.writer import FakeWriter, words
from tests.scanner import Needles

pytestmark = pytest.mark.timeout(30)

TOKEN = "correct-horse-battery"
CANARY = "xylophone-quartz-7341-canary"  # long enough for the scanner's runs of 16 bytes
CHAT = "/v1/chat/completions"


def chat(text: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], **more}


def problem(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# --- who is let in ---------------------------------------------------------------------------------------------------


def test_a_token(writer: FakeWriter) -> None:
    with serving(FakeWriter(), token=TOKEN) as url, httpx.Client(base_url=url) as http:
        for header in ("", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer tökén"):
            headers = {"Authorization": header.encode()} if header else {}
            for answer in (http.get("/v1/models", headers=headers), http.post(CHAT, json=chat(), headers=headers)):
                assert answer.status_code == 401 and problem(answer)["code"] == "invalid_api_key"
                assert answer.headers["WWW-Authenticate"] == "Bearer" and TOKEN not in answer.text
            assert http.get("/metrics", headers=headers).status_code == 401
            assert http.get("/api/parties", headers=headers).status_code == 401
        allowed = {"Authorization": f"Bearer {TOKEN}"}
        assert http.post(CHAT, json=chat(), headers=allowed).status_code == 200
        assert http.get("/healthz").status_code == 200 and http.get("/").status_code == 200


def test_whoever_can_be_reached_needs_a_token() -> None:
    for host in ("0.0.0.0", "::", "10.0.0.5", "proxy.example"):
        with pytest.raises(ConfigError, match="--token-file"):
            create_app(FakeWriter().backend(), host=host)
        create_app(FakeWriter().backend(), host=host, token=TOKEN)
    for weak in ("short", "with a newline\n and more", "ü" * 20):
        with pytest.raises(ConfigError, match="16 characters"):
            create_app(FakeWriter().backend(), token=weak)
    assert [is_loopback(h) for h in ("127.0.0.1", "127.8.0.1", "::1", "localhost", "1.2.3.4")] == [True] * 4 + [False]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:99", "[::1]", "[::1]:8321"])
def test_names_of_this_machine(http: httpx.Client, host: str) -> None:
    assert http.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8321", "localhost.evil.example", "127.0.0.1.nip.io", ""]
)
def test_other_names_are_refused(http: httpx.Client, writer: FakeWriter, host: str) -> None:
    """DNS rebinding: the page's own name resolves to this machine."""
    for answer in (
        http.get("/v1/models", headers={"Host": host}),
        http.get("/", headers={"Host": host}),
        http.post(CHAT, json=chat(), headers={"Host": host}),
    ):
        assert answer.status_code == 403 and problem(answer)["type"] == "permission_error"
    assert not writer.asked


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://localhost"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_other_pages_are_refused(http: httpx.Client, writer: FakeWriter, headers: dict[str, str]) -> None:
    assert http.post(CHAT, json=chat(), headers=headers).status_code == 403 and not writer.asked
    assert http.options(CHAT, headers=headers).status_code == 403


def test_the_own_page_is_let_in(http: httpx.Client, url: str) -> None:
    answer = http.post(CHAT, json=chat(), headers={"Origin": url, "Sec-Fetch-Site": "same-origin"})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"


def test_forms_are_refused(http: httpx.Client, writer: FakeWriter) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = http.post(CHAT, content=json.dumps(chat()), headers={"Content-Type": kind})
        assert answer.status_code == 415 and "JSON" in problem(answer)["message"]
    assert not writer.asked


# --- bodies and paths ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b"nonsense", b'{"n": NaN}', b"\xff", b"[" * 100_000, b"[]", b'"text"'])
def test_what_is_no_json_object(http: httpx.Client, content: bytes) -> None:
    answer = http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and problem(answer)["type"] == "invalid_request_error"


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_are_limited(http: httpx.Client, writer: FakeWriter, chunked: bool) -> None:
    content = json.dumps(chat("x" * MAX_BODY)).encode()
    pieces: Any = (content[i : i + 65536] for i in range(0, len(content), 65536)) if chunked else content
    answer = http.post(CHAT, content=pieces, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413 and "4096 KiB" in problem(answer)["message"] and not writer.asked


def test_paths_and_methods_that_there_are_not(http: httpx.Client) -> None:
    for path in ("/v1/none", "/v1/models/", "/v1/chat/completions/", "/docs"):
        assert http.get(path).status_code == 404 and problem(http.get(path))["message"]
    answer = http.get(CHAT)
    assert answer.status_code == 405 and problem(answer) and answer.headers["Allow"] == "POST"
    assert http.get("/healthz").json() == {"status": "ok", "pinned": False, "parties": []}


def test_names_of_fields_are_not_repeated_blindly(http: httpx.Client) -> None:
    answer = http.post(CHAT, json=chat(**{"<script>": 1}))
    assert answer.status_code == 400 and "script" not in answer.text
    assert problem(http.post(CHAT, json=chat(mirostat=1)))["param"] == "mirostat"


# --- leaving ---------------------------------------------------------------------------------------------------------


def soon(condition: Callable[[], object], seconds: float = 5) -> None:
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it took more than {seconds:g} s"
        time.sleep(0.005)


def test_leaving_in_the_middle_of_a_stream(url: str, writer: FakeWriter) -> None:
    writer.delay, writer.answer = 0.05, " ".join(words(500))
    with httpx.Client(base_url=url) as http:
        with http.stream("POST", CHAT, json=chat(stream=True, n=2, max_tokens=500)) as answer:
            lines = answer.iter_lines()
            for _ in range(12):
                next(lines)
            assert not writer.begun[0].cancelled.is_set()
    soon(lambda: len(writer.begun) == 2 and all(g.cancelled.is_set() for g in writer.begun), 1)
    soon(lambda: all(g.finish == "cancelled" for g in writer.begun))


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_before_the_first_token(url: str, writer: FakeWriter, stream: bool) -> None:
    writer.delay = 20
    with httpx.Client(base_url=url, timeout=0.3) as http, pytest.raises(httpx.ReadTimeout):
        http.post(CHAT, json=chat(stream=stream))
    soon(lambda: writer.begun[0].cancelled.is_set())


def test_leaving_before_it_began(url: str, writer: FakeWriter) -> None:
    began = threading.Event()
    writer.before_begin = lambda: began.wait(10) and None
    writer.delay = 20
    with httpx.Client(base_url=url, timeout=0.3) as http, pytest.raises(httpx.ReadTimeout):
        http.post(CHAT, json=chat())
    began.set()
    soon(lambda: writer.begun and writer.begun[0].cancelled.is_set())


def test_too_many_at_once() -> None:
    writer = FakeWriter(delay=20)
    with serving(writer, max_at_once=1) as url, httpx.Client(base_url=url, timeout=0.5) as http:
        with pytest.raises(httpx.ReadTimeout):
            http.post(CHAT, json=chat())
        soon(lambda: writer.begun[0].cancelled.is_set())
        writer.delay = 0
        assert http.post(CHAT, json=chat()).status_code == 200, "whoever left makes room"
        writer.delay = 20
        with http.stream("POST", CHAT, json=chat(stream=True), headers={"X-MPCInfer-Shares": "1"}):
            refused = httpx.post(f"{url}{CHAT}", json=chat())
        assert refused.status_code == 429 and problem(refused)["code"] == "rate_limit_exceeded"


def test_who_leaves_while_texts_are_embedded_makes_room_once_no_thread_is_busy() -> None:
    writer, begun, goes_on = FakeWriter(), list[str](), threading.Event()
    real = writer.embed

    def embed(name: str, text: Any, timeout: float) -> Any:
        begun.append(text)
        assert goes_on.wait(20)
        return real(name, text, timeout)

    writer.embed = embed  # type: ignore[method-assign]
    content = {"model": "encoder", "input": ["a", "b"]}
    with serving(writer, max_at_once=1) as url, httpx.Client(base_url=url, timeout=0.5) as http:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/embeddings", json=content)
        soon(lambda: begun == ["a"])
        assert httpx.post(f"{url}/v1/embeddings", json=content, timeout=20).status_code == 429
        goes_on.set()
        soon(lambda: httpx.post(f"{url}/v1/embeddings", json=content, timeout=20).status_code == 200)
    assert begun == ["a", "a", "b"]  # nothing more was done for whoever had gone


def test_a_proxy_that_stops_ends_its_answers() -> None:
    writer = FakeWriter(delay=0.05, answer=" ".join(words(10_000)))
    with ExitStack() as stack:
        http = stack.enter_context(httpx.Client())
        with serving(writer) as url:
            asked = http.stream("POST", f"{url}{CHAT}", json=chat(stream=True, max_tokens=10_000))
            next(stack.enter_context(asked).iter_lines())
            start = time.monotonic()
        assert time.monotonic() - start < 10 and writer.begun[0].cancelled.wait(1)


# --- what the page gets ----------------------------------------------------------------------------------------------


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]


def test_shares_are_for_those_who_ask(http: httpx.Client, writer: FakeWriter) -> None:
    plain = http.post(CHAT, json=chat("a b", stream=True))
    assert "mpcinfer" not in plain.text
    chunks = events(http.post(CHAT, json=chat("a b", stream=True), headers={"X-MPCInfer-Shares": "1"}))
    told = [chunk["mpcinfer"] for chunk in chunks if "mpcinfer" in chunk]
    assert told[0]["sent"] == [{"bytes": len(share), "hex": share.hex()} for share in writer.begun[1].sent]
    assert (told[0]["prompt_tokens"], told[0]["cached_tokens"]) == (2, 2) and len(told) == 3
    for token in told[1:]:
        assert len({share["hex"] for share in token["received"]}) == 2
        assert {share["bytes"] for share in token["received"]} == {8}
        assert (token["rounds"], token["bytes_sent_per_party"]) == (40, 120_000)


def test_parties(http: httpx.Client) -> None:
    first, second = http.get("/api/parties").json()["parties"]
    assert (first["role"], first["address"], first["state"]) == ("party/0", "10.20.0.10:7100", "ready")
    assert first["pin"].startswith("sha256:") and first["pin"] != second["pin"]


def test_the_page_has_a_strict_policy(http: httpx.Client) -> None:
    answers = [http.get("/"), http.get("/")]
    policies = [answer.headers["Content-Security-Policy"] for answer in answers]
    assert policies[0] != policies[1] and "default-src 'none'" in policies[0] and "unsafe" not in policies[0]
    (nonce,) = set(re.findall(r"'nonce-([\w-]+)'", policies[0]))
    page = answers[0].text
    assert page.count(f'nonce="{nonce}"') == 2 and "{{" not in page
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(|https?://(?!www\.w3\.org/)", page)
    assert not re.search(r"\son\w+=|\sstyle=", page), "the policy forbids handlers and styles in attributes"


# --- what is counted and logged --------------------------------------------------------------------------------------


def test_nothing_that_was_said_is_counted_or_logged(
    http: httpx.Client, writer: FakeWriter, caplog: pytest.LogCaptureFixture
) -> None:
    needles = Needles()
    for spelling in (CANARY, CANARY.upper()):
        needles.add_raw("what was said", spelling.encode())
    assert needles.in_text(f"a line with {CANARY}") and not needles.in_text("a line without")
    caplog.set_level(logging.DEBUG)

    def fail(number: int) -> None:
        raise ZeroDivisionError(CANARY)

    said = chat(f"tell {CANARY} nobody")
    for stream in (False, True):
        assert CANARY.upper() in http.post(CHAT, json={**said, "stream": stream}).text
    assert http.post("/v1/responses", json={"model": "tiny", "input": CANARY}).status_code == 200
    assert http.post("/v1/completions", json={"model": "tiny", "prompt": CANARY}).status_code == 200
    assert http.post("/v1/embeddings", json={"model": "encoder", "input": CANARY}).status_code == 200
    assert http.post(CHAT, json={**said, "seed": CANARY, CANARY: CANARY}).status_code == 400
    assert http.post(CHAT, content=CANARY, headers={"Content-Type": "application/json"}).status_code == 400
    assert http.get(f"/v1/models/{CANARY}").status_code == 404
    assert http.get(f"/{CANARY}?q={CANARY}").status_code == 404
    assert http.request(CANARY.upper().replace("-", "")[:16], "/").status_code == 405
    writer.before = fail
    assert http.post(CHAT, json=said).status_code == 500
    metrics = http.get("/metrics")

    def access() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.name == "mpcinfer.client.proxy.guard"]

    soon(lambda: len(access()) >= 12)  # a line is written when its answer has been sent
    lines = access()
    assert len(lines) == 12 and all(re.fullmatch(r"[A-Z]+ \S+ \d{3} \d+\.\d{3} s", line) for line in lines)
    assert any("ZeroDivisionError at " in r.getMessage() for r in caplog.records)
    # httpx is the caller, and asyncio's debug lines are not the proxy's
    ours = [r for r in caplog.records if not r.name.startswith(("httpx", "httpcore", "asyncio"))]
    logged = "\n".join(f"{record.getMessage()} {record.exc_text} {record.args}" for record in ours)
    assert needles.in_text(logged) == Counter() and needles.in_text(metrics.text) == Counter()


def test_metrics() -> None:
    with serving(FakeWriter()) as url, httpx.Client(base_url=url) as http:
        http.post(CHAT, json=chat("a b c"))
        http.post(CHAT, json=chat(seed=1))
        answer = http.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    figures = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    requests = 'mpcinfer_proxy_requests_total{endpoint="/v1/chat/completions",status="%s"}'
    assert figures[requests % 200] == figures[requests % 400] == "1.0"
    assert figures['mpcinfer_proxy_tokens_total{kind="prompt"}'] == "3.0"
    assert figures['mpcinfer_proxy_tokens_total{kind="completion"}'] == "3.0"
    for party in "01":
        assert figures[f'mpcinfer_proxy_share_bytes_total{{direction="sent",party="{party}"}}'] == "24.0"
        assert figures[f'mpcinfer_proxy_share_bytes_total{{direction="received",party="{party}"}}'] == "24.0"
    assert figures['mpcinfer_proxy_traffic_bytes_total{sender="party"}'] == "360000.0"
    assert figures["mpcinfer_proxy_rounds_total"] == "120.0"
    assert figures["mpcinfer_proxy_token_seconds_count"] == "3.0"
    assert figures["mpcinfer_proxy_first_token_seconds_count"] == "1.0"
    assert "python_gc" not in answer.text


def test_what_a_path_is_logged_as() -> None:
    said = {"/v1/models/x": "/v1/models/{id}", "/secret": "other", "/": "/", "/v1/models": "/v1/models"}
    assert {path: route(path) for path in said} == said


def test_receipts_of_what_was_written_can_be_asked_for(http: httpx.Client, writer: FakeWriter) -> None:
    """The fake parties sign nothing, so their receipt is a stand-in."""
    receipt = SimpleNamespace(to_bytes=lambda: b'{"signed":true}\n')
    writer.before = lambda number: setattr(writer.begun[-1], "receipt", receipt)
    for path, body in (
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}),
        ("/v1/completions", {"model": "tiny", "prompt": "hello", "n": 2, "stream": True}),
        ("/v1/responses", {"model": "tiny", "input": "hello"}),
    ):
        answer = http.post(path, json=body)
        where = answer.headers["x-mpcinfer-receipt"]
        assert where.startswith("/v1/receipts/") and where.removeprefix("/v1/receipts/") in answer.text
        assert http.get(where).content == b'{"signed":true}\n'
        assert http.get(f"{where}?index=1").status_code == (200 if "n" in body else 404)
    for wrong in ("/v1/receipts/none", f"{where}?index=x", f"{where}?index=-1"):
        assert http.get(wrong).status_code == 404


def test_receipts_of_embeddings_are_by_input(http: httpx.Client, writer: FakeWriter) -> None:
    def sign(text: Any) -> list[Any]:
        return [SimpleNamespace(to_bytes=lambda: f"signed {text}".encode())]

    writer.sign = sign
    for given, texts in (
        ("a b", ["a b"]),
        (["a b", "c"], ["a b", "c"]),
        ([5, 6], [(5, 6)]),
        ([[5], [6, 7]], [(5,), (6, 7)]),
    ):
        where = http.post("/v1/embeddings", json={"model": "encoder", "input": given}).headers["x-mpcinfer-receipt"]
        found = [http.get(f"{where}?index={i}") for i in range(len(texts) + 1)]
        assert [each.text for each in found[:-1]] == [f"signed {text}" for text in texts]
        assert found[-1].status_code == 404 and http.get(where).text == f"signed {texts[0]}"
    assert "x-mpcinfer-receipt" not in http.post("/v1/embeddings", json={"model": "other", "input": "a"}).headers


def test_only_the_last_receipts_are_kept() -> None:
    proxy = Proxy(FakeWriter().backend())
    for i in range(300):
        proxy._keep(str(i), [None] * 64)  # type: ignore[list-item]
    proxy._keep("nothing", [])
    assert len(proxy._receipts) == 64 and "299" in proxy._receipts and "235" not in proxy._receipts
    proxy._keep("many", [None] * 5000)  # type: ignore[list-item]
    assert list(proxy._receipts) == ["many"]
