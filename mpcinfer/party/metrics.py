"""What a party counts, for Prometheus. Labels are kinds of things, classes of errors, indices of parties: no names."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from mpcinfer.party.part import Phase
from mpcinfer.wire.mesh import Account, Mesh
from mpcinfer.wire.metrics import Figures, result_of

# Of steps. Party 0 announces what a step is: anything else it might say must not become a label.
_ACTIONS = ("infer", "generate", "deploy", "remove", "grant", "refresh", "fill")


@dataclass
class Call:
    """One call, as it goes on: the seconds of its phases so far, and when its last token came."""

    seconds: dict[str, float] = field(default_factory=dict)
    taken: int = 0
    written: int = 0
    last: float = field(default_factory=time.monotonic)


class PartyMetrics:
    """The figures of one party. Rounds and bytes are counted by the mesh anyway and looked up when asked for."""

    def __init__(self) -> None:
        self.figures = Figures("mpcinfer_party")
        self._accounts = {action: Account() for action in _ACTIONS}
        self._sent: Counter[tuple[str, str]] = Counter()  # in sessions that are over
        self._mesh: Mesh | None = None
        self._lock = threading.Lock()
        self._rate = 0.0
        self._pool: Callable[[], Mapping[str, int]] = dict

        counter, histogram, lookup = self.figures.counter, self.figures.histogram, self.figures.lookup
        self._epochs = counter("epochs", "Sessions formed with the other parties and the dealer.")
        self._requests = counter("requests", "Calls that have ended, by what came of them.", "action", "result")
        self._seconds = histogram(
            "request_seconds", "Seconds of calls that succeeded; offline: dealing.", "action", "phase"
        )
        self._token_seconds = histogram("token_seconds", "Seconds of steps that wrote a token.", "phase")
        self._tokens = counter("tokens", "Tokens, of prompts and written.", "kind")
        self.figures.gauge(
            "tokens_per_second", "By the interval between the last two tokens of one text.", lambda: self._rate
        )
        lookup(
            "rounds",
            "Rounds of openings, by what they were for.",
            lambda: (((action,), account.rounds) for action, account in self._accounts.items()),
            "action",
        )
        lookup(
            "waiting_seconds",
            "Seconds of waiting for the others' openings or votes, in which a step stands still, and for the dealer, "
            "in which it goes on where a tape is fetched ahead.",
            self._waits,
            *("action", "on"),
        )
        lookup(
            "dealer_bytes",
            "Bytes of messages from the dealer.",
            lambda: (((action,), account.dealer_bytes) for action, account in self._accounts.items()),
            "action",
        )
        lookup(
            "link_bytes",
            "Bytes of messages sent to another party: openings, which is the online phase, or control.",
            self._links,
            *("peer", "kind"),
        )
        lookup(
            "pool_depth",
            "Runs for which randomness is ready.",
            lambda: (((action,), depth) for action, depth in self._pool().items()),
            "action",
            gauge=True,
        )

    # --- the lane -------------------------------------------------------------------------------------------------

    def began(self, mesh: Mesh) -> None:
        """A session with the others begins."""
        self._epochs.inc()
        with self._lock:
            self._mesh = mesh

    def ended(self) -> None:
        """It is over; its links are counted no further."""
        with self._lock:
            if self._mesh is not None:
                self._sent.update(_sent(self._mesh))
                self._mesh = None

    def account(self, action: str) -> Account:
        """Where a mesh is to note what steps of this kind take."""
        return self._accounts.get(action) or Account()

    def pool(self, depths: Callable[[], Mapping[str, int]]) -> None:
        """From now on show what `depths` returns: by action, for how many runs randomness is ready."""
        self._pool = depths

    # --- calls ----------------------------------------------------------------------------------------------------

    @contextmanager
    def call(self, action: str, gone: Callable[[], bool]) -> Iterator[Call]:
        """While this runs a caller is being answered. gone: whether the caller has hung up.

        Only the caller knows which token is the last, and hangs up on it: a text may well end so.
        """
        call, began, result = Call(), time.perf_counter(), "ok"
        try:
            yield call
        except BaseException as error:
            result = result_of(error)
            if gone() or isinstance(error, GeneratorExit):
                result = "ok" if call.written else "cancelled"
            raise
        finally:
            self._requests.labels(action, result).inc()
            if result == "ok":
                call.seconds["total"] = time.perf_counter() - began
                for phase, seconds in call.seconds.items():
                    self._seconds.labels(action, phase).observe(seconds)

    def step(self, call: Call, online: Phase, offline: Phase) -> None:
        """A step of a call is done."""
        for phase, cost in (("online", online), ("offline", offline)):
            call.seconds[phase] = call.seconds.get(phase, 0.0) + cost.seconds

    def wrote(self, call: Call, taken: int, token: bool, online: Phase, offline: Phase) -> None:
        """A step of a text is done: `taken` tokens of its prompt are taken in by now, and it has written one or not."""
        self.step(call, online, offline)
        self._tokens.labels("prompt").inc(taken - call.taken)
        call.taken = taken
        if token:
            now = time.monotonic()
            self._rate, call.last = 1 / max(1e-6, now - call.last), now
            call.written += 1
            self._tokens.labels("written").inc()
            for phase, cost in (("online", online), ("offline", offline)):
                self._token_seconds.labels(phase).observe(cost.seconds)

    # --- looked up ------------------------------------------------------------------------------------------------

    def _waits(self) -> Iterable[tuple[tuple[str, str], float]]:
        for action, account in self._accounts.items():
            yield (action, "openings"), account.openings_seconds
            yield (action, "votes"), account.votes_seconds
            yield (action, "dealer"), account.dealer_seconds

    def _links(self) -> Iterable[tuple[tuple[str, str], float]]:
        with self._lock:
            sent = self._sent.copy()
            if self._mesh is not None:
                sent.update(_sent(self._mesh))
        return sent.items()


def _sent(mesh: Mesh) -> dict[tuple[str, str], int]:
    sent = {}
    for peer, link in mesh.links.items():
        openings = link.openings_sent
        sent[str(peer), "openings"] = openings
        sent[str(peer), "control"] = link.bytes_sent - openings
    return sent
