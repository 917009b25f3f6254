"""Making things while those made before are on their way."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T], most: int) -> Generator[T]:
    """The same items in the same order, made in a thread of their own; at most so many wait for being taken.

    What making them raises is raised here, after the items before. Closed early, it waits for the item in the making.
    """
    made: SimpleQueue[tuple[T] | BaseException | None] = SimpleQueue()
    room, closed = threading.Semaphore(most - 1), threading.Event()

    def make() -> None:
        end: BaseException | None = None
        try:
            for item in items:
                made.put((item,))
                room.acquire()
                if closed.is_set():
                    break
        except BaseException as error:  # whoever takes the items hears of it
            end = error
        made.put(end)

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while isinstance(item := made.get(), tuple):
            yield item[0]
            room.release()
        if item is not None:
            raise item
    finally:
        closed.set()
        room.release()
        thread.join()
