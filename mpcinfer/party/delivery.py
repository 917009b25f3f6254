"""What the dealer sends of a tape, in the order in which it is drawn: taken part by part, not before it is wanted."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from queue import SimpleQueue

import grpc

from mpcinfer.errors import AbortedError, ProtocolError
from mpcinfer.party.epoch import Epoch
from mpcinfer.party.passing import Unwatched
from mpcinfer.trust.signing import Signed
from mpcinfer.wire import channel
from mpcinfer.wire.frames import GRPC_HEADER, chunk_bytes
from mpcinfer.wire.mesh import Account
from mpcinfer.wire.v1 import dealer_pb2


class Delivery:
    """The corrections of one tape. One thread at a time takes them.

    statement: the dealer's word on them, if it was asked for, once all have come. frame_bytes: of what has come.
    """

    def __init__(self, epoch: Epoch, request: dealer_pb2.DealRequest, timeout: float, account: Account) -> None:
        """Waits until all parties have named the plan. Raises what the dealer or the connection to it raises, as our
        errors; so do all other methods.

        account: what it is counted for.
        """
        self.statement: Signed | None = None
        self.frame_bytes = 0
        self._over = False
        self._account = account
        self._chunks = self._received(epoch, request, timeout)
        self._rest = memoryview(b"")
        self._more()

    @property
    def complete(self) -> bool:
        """Whether nothing more will come: all has, or it has failed, which whoever takes it will be told."""
        return self._over

    def beside(self, since: float) -> float:
        """Seconds after this moment for which it came by itself, whether it was wanted or not."""
        return 0.0

    def take(self, size: int) -> bytearray | memoryview:
        """The next ones, so many bytes; ProtocolError if fewer come."""
        if 0 < size <= len(self._rest):  # as most are: nothing is copied
            part, self._rest = self._rest[:size], self._rest[size:]
            return part
        taken, at = bytearray(size), 0
        while at < size:
            if not self._more():
                raise ProtocolError("the dealer sent another amount than the plan asks for")
            part = self._rest[: size - at]
            taken[at : at + len(part)] = part
            at += len(part)
            self._rest = self._rest[len(part) :]
        return taken

    def part(self) -> memoryview:
        """Whatever comes next, empty if that was all."""
        self._more()
        found, self._rest = self._rest, memoryview(b"")
        return found

    def end(self) -> None:
        """Nothing more may come; ProtocolError if it does."""
        if self._more():
            self.close()
            raise ProtocolError("the dealer sent more than the plan asks for")

    def close(self) -> None:
        """What has not come yet is not wanted any more."""
        self._chunks.close()

    def _more(self) -> bool:
        """Whether there is more; waits for it."""
        if not self._rest:
            began = time.perf_counter()
            try:
                self._rest = next(self._chunks, memoryview(b""))
            finally:
                self._account.dealer_seconds += time.perf_counter() - began
            self._over = not self._rest
        return bool(self._rest)

    def _received(self, epoch: Epoch, request: dealer_pb2.DealRequest, timeout: float) -> Generator[memoryview]:
        passing: Unwatched | None = None
        account, whole = self._account, False
        call = epoch.dealer.Deal(request, timeout=timeout)
        try:
            with epoch.cancelling(call):
                for part in call:
                    # begun only now: a plan that the dealer did not know is asked for again
                    passing = passing or epoch.passing(request.tape)
                    if isinstance(part, memoryview):
                        chunk, size = part, chunk_bytes(len(part))
                    else:
                        chunk, size = memoryview(part.chunk), part.ByteSize() + GRPC_HEADER
                        if part.HasField("statement"):
                            self.statement = Signed.of(part.statement)
                    self.frame_bytes += size
                    account.dealer_bytes += size
                    if chunk:
                        passing.add(chunk)
                        yield chunk
            whole = True
        except GeneratorExit:
            call.cancel()
            raise
        except grpc.RpcError as error:
            if epoch.mesh.broken:
                raise AbortedError(
                    "a party or the dealer left while randomness was dealt; send the request again"
                ) from error
            raise channel.from_rpc_error(error, "dealer") from error
        finally:
            if passing is not None:
                if whole:
                    passing.end()
                else:
                    passing.cancel()


class Gathered(Delivery):
    """Corrections that are taken from the dealer as they come, by a thread, however late they are wanted."""

    def __init__(self, delivery: Delivery) -> None:
        self.statement, self.frame_bytes = None, delivery.frame_bytes
        self._delivery = delivery
        self._rest = memoryview(b"")
        self._parts: SimpleQueue[memoryview | BaseException] = SimpleQueue()
        self._ended, self._closed = 0.0, False
        threading.Thread(target=self._gather, name="gather", daemon=True).start()

    @property
    def complete(self) -> bool:
        """See `Delivery`."""
        return self._ended > 0

    def beside(self, since: float) -> float:
        """See `Delivery`."""
        return max(0.0, self._ended - since)

    def close(self) -> None:
        """See `Delivery`."""
        self._closed = True

    def _gather(self) -> None:
        last: memoryview | BaseException = memoryview(b"")
        try:
            while not self._closed and (part := self._delivery.part()):
                self._parts.put(part)
                self.frame_bytes = self._delivery.frame_bytes
        except BaseException as error:  # is raised by whoever wants what has not come
            last = error
        finally:
            self._delivery.close()
            self._ended = time.perf_counter()
            self._parts.put(last)

    def _more(self) -> bool:
        if not self._rest:
            part = self._parts.get()
            if isinstance(part, BaseException):
                self._parts.put(part)
                raise part
            self._rest = part
            if not part:
                self._parts.put(part)
        return bool(self._rest)


class Held(Delivery):
    """Corrections that have come already."""

    def __init__(self, corrections: bytearray | bytes, frame_bytes: int = 0) -> None:
        self.statement, self.frame_bytes = None, frame_bytes
        self._rest = memoryview(corrections)

    @property
    def complete(self) -> bool:
        """See `Delivery`."""
        return True

    def close(self) -> None:
        """See `Delivery`."""
        self._rest = memoryview(b"")

    def _more(self) -> bool:
        return bool(self._rest)
