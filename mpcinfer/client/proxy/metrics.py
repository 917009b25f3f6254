"""What the proxy counts, for Prometheus: requests, tokens, bytes, rounds, seconds. Never a word, nor a model's name."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from mpcinfer.client.generation import Generation, Piece

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Meter:
    """The figures of one proxy, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"mpcinfer_proxy_{name}", what, labels, registry=self._registry)

        def histogram(name: str, what: str, *labels: str) -> Histogram:
            return Histogram(f"mpcinfer_proxy_{name}", what, labels, registry=self._registry, buckets=_SECONDS)

        self._requests = counter("requests", "Requests by endpoint and HTTP status.", "endpoint", "status")
        self._tokens = counter("tokens", "Tokens: of prompts, of those the cached ones, and written.", "kind")
        self._shares = counter("share_bytes", "Bytes of shares between this proxy and a party.", "party", "direction")
        self._traffic = counter("traffic_bytes", "Bytes that each party, and the dealer, sent for answers.", "sender")
        self._rounds = counter("rounds", "Rounds of messages between the parties.")
        self._seconds = histogram("request_seconds", "Seconds that requests took.", "endpoint")
        self._first = histogram("first_token_seconds", "Seconds from a request to the first token of an answer.")
        self._online = histogram("token_seconds", "Seconds online per token, as the parties counted them.")

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """A request has been answered."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def began(self, generation: Generation) -> None:
        """An answer is being written."""
        self._tokens.labels("prompt").inc(generation.prompt_tokens)
        self._tokens.labels("cached").inc(generation.cached_tokens)
        for party, share in enumerate(generation.sent):
            self._shares.labels(str(party), "sent").inc(len(share))

    def piece(self, piece: Piece, waited: float | None) -> None:
        """A token came; waited: seconds since the request, if it is the first of its answer."""
        self._tokens.labels("completion").inc()
        for party, share in enumerate(piece.received):
            self._shares.labels(str(party), "received").inc(len(share))
        self._traffic.labels("party").inc(piece.cost.bytes_sent_per_party)
        self._traffic.labels("dealer").inc(piece.cost.bytes_sent_by_dealer)
        self._rounds.inc(piece.cost.rounds)
        self._online.observe(piece.cost.seconds_online)
        if waited is not None:
            self._first.observe(waited)

    def embedded(self, tokens: int) -> None:
        """A text was embedded."""
        self._tokens.labels("prompt").inc(tokens)

    def text(self) -> bytes:
        """All figures in Prometheus's text format."""
        return generate_latest(self._registry)


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() - self._start
