"""The endpoint that shows figures: what it answers, to how many, and that it goes when it is told to."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest

from mpcinfer.errors import BusyError, ConfigError
from mpcinfer.wire import metrics
from mpcinfer.wire.metrics import Figures, MetricsServer, result_of


@contextmanager
def serving(figures: Figures, address: str = "127.0.0.1:0") -> Iterator[str]:
    server = MetricsServer(address, figures.text)
    server.start()
    host = address.rpartition(":")[0]
    try:
        yield f"http://{host}:{server.port}"
    finally:
        server.stop()


@pytest.fixture
def figures() -> Figures:
    return Figures("test")


def test_figures_are_shown_as_they_are_when_asked_for(figures: Figures) -> None:
    depth = {"a": 1}
    figures.counter("calls", "Calls.", "kind").labels("x").inc(3)
    figures.histogram("seconds", "Seconds.").observe(0.02)
    figures.gauge("depth", "How deep.", lambda: depth["a"])
    figures.lookup("rounds", "Rounds.", lambda: [(("y",), 7.0)], "action")
    figures.lookup("levels", "Levels.", lambda: [(("z",), depth["a"])], "action", gauge=True)
    with serving(figures) as url:
        first = httpx.get(f"{url}/metrics")
        depth["a"] = 2
        second = httpx.get(f"{url}/metrics?name=x").text.splitlines()
    assert first.status_code == 200 and first.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    lines = first.text.splitlines()
    for line in (
        'test_calls_total{kind="x"} 3.0',
        'test_seconds_bucket{le="0.03"} 1.0',
        "test_depth 1.0",
        'test_rounds_total{action="y"} 7.0',
        "# TYPE test_rounds_total counter",
        "# TYPE test_levels gauge",
    ):
        assert line in lines
    assert "test_depth 2.0" in second and 'test_levels{action="z"} 2.0' in second
    assert any(line.startswith("process_resident_memory_bytes ") for line in lines)


def test_processes_in_one_process_have_figures_of_their_own(figures: Figures) -> None:
    other = Figures("test")
    figures.counter("calls", "Calls.").inc()
    other.counter("calls", "Calls.")
    assert b"test_calls_total 1.0" in figures.text() and b"test_calls_total 0.0" in other.text()
    with pytest.raises(ValueError, match="test_calls"):
        figures.lookup("calls", "Another of that name.", lambda: [])


def test_nothing_else_is_there(figures: Figures) -> None:
    with serving(figures) as url, httpx.Client(base_url=url) as http:
        assert http.get("/metrics").headers["Server"] == "mpcinfer"
        for path in ("/", "/metrics/", "/favicon.ico", "/../etc/passwd"):
            assert http.get(path).status_code == 404
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert http.request(method, "/metrics").status_code == 501


def test_a_taken_port(figures: Figures) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"cannot listen on {address} for metrics: .* set another metrics_listen"):
            MetricsServer(address, figures.text)
    with serving(figures, address) as url:
        assert httpx.get(f"{url}/metrics").status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/metrics")
    with serving(figures, address) as url:  # at once, as after a restart
        assert httpx.get(f"{url}/metrics").status_code == 200


def test_an_address_of_another_machine(figures: Figures) -> None:
    for address in ("192.0.2.1:9464", "does-not-exist.invalid:9464"):
        with pytest.raises(ConfigError, match="set another metrics_listen"):
            MetricsServer(address, figures.text)


def test_stopping_before_it_has_begun(figures: Figures) -> None:
    server = MetricsServer("127.0.0.1:0", figures.text)
    server.stop()
    MetricsServer(f"127.0.0.1:{server.port}", figures.text).stop()


def test_ipv6(figures: Figures) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with serving(figures, "[::1]:0") as url:
        assert httpx.get(f"{url}/metrics").status_code == 200


def test_callers_who_say_nothing_hold_nobody_up_for_long(figures: Figures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics._Handler, "timeout", 2.0)

    def asked(address: tuple[str, int]) -> bytes:
        with socket.create_connection(address) as caller:
            try:
                caller.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                return caller.recv(12)
            except ConnectionError:
                return b""

    with serving(figures) as url, ExitStack() as stack:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        for _ in range(metrics._SCRAPES):
            stack.enter_context(socket.create_connection(address))
        assert asked(address) == b""  # as many as are answered at a time
        end = time.monotonic() + 20
        while not (answer := asked(address)) and time.monotonic() < end:
            time.sleep(0.1)
        assert answer == b"HTTP/1.0 200"


def test_a_figure_that_cannot_be_read_is_logged_without_its_values(
    figures: Figures, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> float:
        raise ValueError("zebra")

    figures.gauge("broken", "Broken.", fail)
    with serving(figures) as url, pytest.raises(httpx.HTTPError):
        httpx.get(f"{url}/metrics")
    said = [r.getMessage() for r in caplog.records if r.name == "mpcinfer.wire.metrics" and r.levelno >= logging.ERROR]
    assert said == ["metrics cannot be read: ValueError"]


def test_what_a_result_is_called() -> None:
    assert result_of(BusyError("said to alice")) == "BusyError"
    assert result_of(ZeroDivisionError()) == "internal"
    assert result_of(GeneratorExit()) == "cancelled"
