"""What a process counts, for Prometheus: a registry of its own, and the HTTP endpoint that shows it.

Plain HTTP without authentication, so only figures go in: no label may hold a name of a model, client or request.
"""

from __future__ import annotations

import logging
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from http.server import BaseHTTPRequestHandler
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mpcinfer.config.reading import split_address
from mpcinfer.errors import ConfigError, MpcInferError

_log = logging.getLogger(__name__)

Read = Callable[[], Iterable[tuple[Sequence[str], float]]]

_SECONDS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_SCRAPES = 8  # at a time
_SCRAPE_SECONDS = 5.0


class Figures:
    """Figures whose names all begin with `prefix`, and those of the process (memory, processor time, open files)."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)

    def counter(self, name: str, what: str, *labels: str) -> Counter:
        """Something that is counted where it happens."""
        return Counter(f"{self._prefix}_{name}", what, labels, registry=self._registry)

    def histogram(self, name: str, what: str, *labels: str) -> Histogram:
        """Seconds that something takes."""
        return Histogram(f"{self._prefix}_{name}", what, labels, registry=self._registry, buckets=_SECONDS)

    def gauge(self, name: str, what: str, read: Callable[[], float]) -> None:
        """Something that is looked up when it is asked for."""
        Gauge(f"{self._prefix}_{name}", what, registry=self._registry).set_function(read)

    def lookup(self, name: str, what: str, read: Read, *labels: str, gauge: bool = False) -> None:
        """Counters (or gauges) with labels, looked up when asked for: of what happens too often to be told each time.

        read: the labels' values with the figure, for each.
        """
        kind = GaugeMetricFamily if gauge else CounterMetricFamily
        self._registry.register(_Lookup(lambda: kind(f"{self._prefix}_{name}", what, labels=labels), read))

    def text(self) -> bytes:
        """All figures in Prometheus's text format."""
        return generate_latest(self._registry)


class _Lookup(Collector):
    def __init__(self, family: Callable[[], CounterMetricFamily | GaugeMetricFamily], read: Read) -> None:
        self._family = family
        self._read = read

    def describe(self) -> Iterable[Metric]:
        """The name, for the registry to see that no other figure has it; nothing is read yet."""
        return [self._family()]

    def collect(self) -> Iterable[Metric]:
        """As they are now."""
        family = self._family()
        for labels, value in self._read():
            family.add_metric(labels, value)
        return [family]


def result_of(error: BaseException) -> str:
    """How an error is called in a label: the class of ours, never its text."""
    if isinstance(error, MpcInferError):
        return type(error).__name__
    return "internal" if isinstance(error, Exception) else "cancelled"


class MetricsServer:
    """`GET /metrics` at an address."""

    def __init__(self, address: str, text: Callable[[], bytes]) -> None:
        """Take the port (any free one for port 0); ConfigError if it cannot be had."""
        host, port = split_address(address)
        try:
            self._server = _Server(host, port, text)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {address} for metrics: {error.strerror}; set another metrics_listen, or none"
            ) from error
        self._host = f"[{host}]" if ":" in host else host
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.1], name="metrics", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()
        _log.info("metrics at http://%s:%d/metrics, for whoever reaches this port", self._host, self.port)

    def stop(self) -> None:
        """Answer no more, and give the port back."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, host: str, port: int, text: Callable[[], bytes]) -> None:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = found[0]
        self.text = text
        self._slots = threading.Semaphore(_SCRAPES)
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, while there are few: the port must not be a way to exhaust a party."""
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """As inherited."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who hangs up is no matter for the log; anything else is, but not as a traceback, as inherited."""
        error = sys.exception()
        if not isinstance(error, OSError):
            _log.error("metrics cannot be read: %s", type(error).__name__)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _SCRAPE_SECONDS

    def do_GET(self) -> None:
        """The figures, whatever follows a question mark."""
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404, "Only /metrics is here")
            return
        content = self.server.text()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE_PLAIN_0_0_4)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def version_string(self) -> str:
        """What Python this is, is nobody's business."""
        return "mpcinfer"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line for every scrape would bury all others."""
