"""What the dealer counts, for Prometheus. Labels are kinds of calls, errors' classes and parties' indices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mpcinfer.dealer.dealing import Dealer
from mpcinfer.wire.metrics import Figures, result_of


class DealerMetrics:
    """The figures of one dealer, which counts for itself what concerns tapes; they are looked up when asked for."""

    def __init__(self, dealer: Dealer) -> None:
        self.figures = Figures("mpcinfer_dealer")
        counter, gauge = self.figures.counter, self.figures.gauge
        self._calls = counter("calls", "Calls that have ended, by what came of them.", "call", "result")
        self._sent = counter("sent_bytes", "Bytes of messages with corrections, to the last party.")
        dealer.lag = self.figures.histogram(
            "lag_seconds", "Seconds from the moment all parties have named a tape until all of it is sent."
        ).observe
        gauge("ready", "Whether all parties have joined the session.", lambda: dealer.ready)
        gauge("open_tapes", "Tapes that some parties have named and others not yet.", lambda: dealer.open_tapes)
        gauge("slots", "Texts whose masks of keys and values are kept.", lambda: dealer.slots)

        def lookup(name: str, what: str, read: Callable[[], float]) -> None:
            self.figures.lookup(name, what, lambda: [((), read())])

        lookup("sessions", "Sessions that have begun.", lambda: dealer.sessions)
        lookup("tapes", "Tapes dealt.", lambda: dealer.tapes_dealt)
        lookup("burnt_tapes", "Tapes that can never be dealt.", lambda: dealer.tapes_burnt)
        lookup("dealing_seconds", "Seconds of expanding and multiplying.", lambda: dealer.seconds_dealing)
        self.figures.lookup(
            "waiting_seconds",
            "Seconds that a party has waited until the others had named a tape too.",
            lambda: (((str(i),), seconds) for i, seconds in enumerate(dealer.seconds_waited)),
            "party",
        )

    @contextmanager
    def call(self, name: str) -> Iterator[None]:
        """While this runs a party is being answered."""
        result = "ok"
        try:
            yield
        except BaseException as error:
            result = result_of(error)
            raise
        finally:
            self._calls.labels(name, result).inc()

    def sent(self, size: int) -> None:
        """A message with corrections is on its way."""
        self._sent.inc(size)
