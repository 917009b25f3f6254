"""Running a gRPC server process: mTLS, health service, metrics where asked for, graceful stop."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from mpcinfer.config import Node
from mpcinfer.errors import MpcInferError
from mpcinfer.wire import channel
from mpcinfer.wire.identity import Identity
from mpcinfer.wire.metrics import Figures, MetricsServer

_log = logging.getLogger(__name__)
_TELLING_SECONDS = 1.0
_PLAIN = (str, int, float, Path, MpcInferError)


class Server:
    """One process's server. `add` registers services; `workers` threads run handlers; `figures` are its metrics."""

    def __init__(
        self,
        node: Node,
        identity: Identity,
        workers: int,
        add: Callable[[grpc.Server], None],
        figures: Figures,
        interceptors: Sequence[grpc.ServerInterceptor] = (),
    ) -> None:
        """Take the ports; ConfigError if one cannot be had."""
        self._grace = node.limits.stop_grace_s
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="grpc")
        options = channel.server_options(node.limits.max_message_mb)
        self._server = grpc.server(self._executor, interceptors=list(interceptors), options=options)
        self.health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        self.set_serving(False)
        add(self._server)
        self.metrics: MetricsServer | None = None
        with ExitStack() as undo:
            if node.metrics_listen:
                self.metrics = MetricsServer(node.metrics_listen, figures.text)
                undo.callback(self.metrics.stop)
            self.port = channel.bind(self._server, node.listen, channel.server_credentials(identity, node.cluster))
            undo.pop_all()

    def set_serving(self, serving: bool) -> None:
        """What the health service answers."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        self.health.set("", status)

    def start(self) -> None:
        """Begin to accept calls, and to show metrics."""
        if self.metrics is not None:
            self.metrics.start()
        self._server.start()

    def stop(self) -> None:
        """Refuse new calls, let running ones finish within the grace period, then return."""
        # grpc_health can wait for a watcher that waits for it; such a watcher learns it from the connection's end
        telling = threading.Thread(target=self.health.enter_graceful_shutdown, name="health", daemon=True)
        telling.start()
        telling.join(_TELLING_SECONDS)
        self._server.stop(self._grace).wait()
        self._executor.shutdown(wait=False, cancel_futures=True)
        if self.metrics is not None:
            self.metrics.stop()


def stop_signal() -> Callable[[], str]:
    """From now on SIGTERM and SIGINT ask this process to stop; the result blocks until one has come, and names it."""
    received: list[int] = []
    stop = threading.Event()

    def handler(number: int, _frame: object) -> None:
        received.append(number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)

    def wait() -> str:
        stop.wait()
        return signal.Signals(received[0]).name

    return wait


def configure_logging(level: str) -> None:
    """Log lines on stderr. Of what is no plain data, a tensor or a message of the wire, they show the type only."""
    logging.basicConfig(
        stream=sys.stderr, level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(_redact)


def _redact(record: logging.LogRecord) -> bool:
    # a single dictionary is passed on by itself, for formats that name its items
    args = record.args if isinstance(record.args, tuple) else (record.args,) if record.args else ()
    record.args = tuple(each if isinstance(each, _PLAIN) else type(each).__name__ for each in args)
    return True
