"""Tapes that are fetched while something else is computed, or while nothing is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from mpcinfer.party.tape import Tape


class Ahead:
    """A tape on its way, fetched in a thread of its own.

    All parties ask for it in the same step, and nobody asks the dealer for anything else before it is there: the key
    chains of both ends move in the same order.
    """

    def __init__(
        self,
        id_: bytes,
        fetch: Callable[[], Tape],
        rows: int = 0,
        digests: Sequence[bytes] = (b"",),
        after: Ahead | None = None,
    ) -> None:
        """id_: the tape's. rows: how many of each cache it masks. digests: of what each of its runs is for. after: what
        comes first.
        """
        self.id = id_
        self.rows, self.digests = rows, digests
        # that fetching has taken, and for how much of that somebody has waited
        self.seconds = self.waited = 0.0
        self._began = 0.0
        self._tape: Future[Tape] = Future()
        threading.Thread(target=self._run, args=(fetch, after), name="ahead", daemon=True).start()

    def _run(self, fetch: Callable[[], Tape], after: Ahead | None) -> None:
        try:
            if after is not None:
                after._tape.result()
            self._began = time.perf_counter()
            tape = fetch()
        except BaseException as error:
            self._tape.set_exception(error)
        else:
            self.seconds = time.perf_counter() - self._began
            self._tape.set_result(tape)

    @property
    def complete(self) -> bool:
        """Whether all of the tape has come."""
        tape = self._tape
        return tape.done() and tape.exception() is None and tape.result().complete

    @property
    def over(self) -> bool:
        """Whether fetching has ended, in whatever way."""
        return self._tape.done()

    def take(self) -> Tape:
        """The tape, once it is there; raises what fetching it, or what came before, has raised."""
        began = time.perf_counter()
        tape = self._tape.result()
        self.waited += max(0.0, self._began + self.seconds - max(began, self._began))
        return tape
