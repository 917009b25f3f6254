"""Text from a language model, under encryption: the data owner's side of a session, step by step."""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mpcinfer.client.cluster import Connection
from mpcinfer.client.generation import Finish, Piece, Settings, StepCost
from mpcinfer.client.model import Model
from mpcinfer.client.status import wait_until_ready
from mpcinfer.client.text import Detokenizer, StopTexts, Tokenizer
from mpcinfer.errors import (
    AbortedError,
    ContextLengthError,
    InputError,
    MpcInferError,
    NotFoundError,
    ProtocolError,
)
from mpcinfer.nn.sampling import Choice
from mpcinfer.ring.domain import Z64
from mpcinfer.ring.sharing import combine, split
from mpcinfer.trust.commitment import SALT_BYTES
from mpcinfer.trust.receipt import Receipt
from mpcinfer.wire.v1 import party_pb2, tensor_pb2

_REMEMBERED = 16  # sessions whose beginnings a next text may have
_READY_TIMEOUT = 15.0


@dataclass(frozen=True)
class Known:
    """A session that the parties hold, and the tokens that they have taken in, at least."""

    model: Model
    id: bytes
    tokens: tuple[int, ...] = field(repr=False)


@dataclass
class Memory:
    """Which sessions there are, so that a text that begins as another one need not be taken in again."""

    _known: list[Known] = field(default_factory=list, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def longest(self, model: Model, tokens: Sequence[int]) -> tuple[bytes, int]:
        """The session that shares most of a text's beginning and how much, at least one token being left; or none."""
        best, shared = b"", 0
        with self._lock:
            for known in self._known:
                common = _common(known.tokens, tokens[:-1]) if known.model == model else 0
                if common > shared:
                    best, shared = known.id, common
        return best, shared

    def add(self, known: Known) -> list[bytes]:
        """Remember a session; those that are of no use any more."""
        with self._lock:
            same = [k for k in self._known if k.model == known.model]
            stale = [k for k in same if k.tokens == known.tokens[: len(k.tokens)]]
            self._known = [k for k in self._known if k not in stale] + [known]
            stale += self._known[:-_REMEMBERED]
            self._known = self._known[-_REMEMBERED:]
        return [k.id for k in stale]

    def drop(self, session: bytes) -> None:
        """The parties do not have it any more."""
        with self._lock:
            self._known = [k for k in self._known if k.id != session]


class Oblivion(Memory):
    """Keeps no session: every text is sent whole, and the parties are told at its end to forget it."""

    def longest(self, model: Model, tokens: Sequence[int]) -> tuple[bytes, int]:
        """None."""
        return b"", 0

    def add(self, known: Known) -> list[bytes]:
        """It is of no use any more."""
        return [known.id]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Answer:
    """See `generation.Generation`, which this is. `logits` are those of each token, if the model reveals them.

    `receipt` is what all parties have signed about the text as far as it is written.
    """

    def __init__(
        self,
        connection: Connection,
        memory: Memory,
        model: Model,
        tokenizer: Tokenizer | None,
        tokens: Sequence[int],
        settings: Settings,
        stop: Sequence[int],
        timeout: float,
        before: Callable[[Answer], None] = lambda answer: None,
    ) -> None:
        """tokens: the whole text so far. before: what to do first of all, once, with this answer; the time counts from
        its end. InputError, ContextLengthError for what the model cannot take.
        """
        longest = len(tokens) + max(0, settings.max_new_tokens - 1)
        if not 1 <= settings.max_new_tokens:
            raise InputError("max_new_tokens must be at least 1")
        if longest > model.context:
            raise ContextLengthError(
                f"the text has {len(tokens)} tokens and its answer up to {settings.max_new_tokens}, the model takes "
                f"{model.context}: shorten the text, or ask for fewer tokens"
            )
        self.id = f"gen-{secrets.token_hex(12)}"
        self.model = model.name
        self.prompt_tokens = len(tokens)
        self.text = ""
        self.tokens: list[int] = []
        self.logits: list[torch.Tensor] = []
        self.finish: Finish | None = None
        self.receipt: Receipt | None = None
        self.prompt_cost = StepCost(0.0, 0.0, 0, 0, 0)
        self._connection = connection
        self._memory = memory
        self._model = model
        self._prompt = list(tokens)
        self._settings = settings
        self._choice = Choice.of(settings.temperature, settings.top_k, settings.repetition_penalty)
        self._end = frozenset(stop)
        self._deadline = 0.0
        self._detokenizer = Detokenizer(tokenizer, tokens) if tokenizer is not None else None
        self._stops = StopTexts(settings.stop)
        self._cancelled = threading.Event()
        self._stop_streams: Callable[[], None] = lambda: None
        self._begun = False
        self._timeout, self._before = timeout, before
        self._begin(*memory.longest(model, self._prompt))

    def _begin(self, parent: bytes, keep: int) -> None:
        """Share what follows the tokens that are kept of a session."""
        parties = self._connection.cluster.n
        new = torch.tensor([self._prompt[keep:]], dtype=torch.int64)
        seeds, last = split(new, Z64, parties)
        shares = [*({"seed": seed} for seed in seeds), {"data": last.numpy().astype("<i8", copy=False).tobytes()}]
        self._session = secrets.token_bytes(16)
        self.cached_tokens = keep
        self.sent = tuple(next(iter(share.values())) for share in shares)
        self._parent = parent
        self._requests = [
            party_pb2.GenerateRequest(
                request_id=self._session,
                model=self._model.full_name,
                version=self._model.version,
                parent=parent,
                keep=keep,
                tokens=tensor_pb2.Tensor(shape=list(new.shape), ring_bits=64, **share),  # type: ignore[arg-type]
                max_new_tokens=self._settings.max_new_tokens,
                temperature=self._choice.temperature,
                top_k=self._choice.top_k,
                repetition_penalty=self._choice.penalty,
                salt=secrets.token_bytes(SALT_BYTES),
            )
            for share in shares
        ]
        self._proof = self._connection.proof(self._model, self._requests, [[r.tokens] for r in self._requests])

    def cancel(self) -> None:
        """See `Generation.cancel`."""
        self._cancelled.set()
        self._stop_streams()

    def after(self, other: Answer) -> list[int]:
        """Write another one first: its tokens. It is cancelled when this one is."""
        self._stop_streams = other.cancel
        if self._cancelled.is_set():
            other.cancel()
        return [piece.token for piece in other]

    def __iter__(self) -> Iterator[Piece]:
        """See `Generation`. Once only: what has arrived is in `text` and `tokens`."""
        if self._begun:
            raise InputError("an answer can be iterated over once")
        self._begun = True
        try:
            if not self._cancelled.is_set():
                self._before(self)
            if self._cancelled.is_set():
                self.finish = "cancelled"
                return
            self._deadline = time.monotonic() + self._timeout
            yield from self._pieces()
        except GeneratorExit:
            self.finish = self.finish or "cancelled"
            raise
        finally:
            self._stop_streams()
            self._remember()

    def _pieces(self) -> Iterator[Piece]:
        for answers in self._answers():
            cost = _cost(answers)
            for index, each in enumerate(answers):
                if len(each.outputs) != len(answers[0].outputs):
                    raise ProtocolError(f"party/{index} answered with another number of outputs than party/0")
            if not answers[0].outputs:
                self.prompt_cost = _sum(self.prompt_cost, cost)
                continue
            self.receipt = self._proof.check(answers)
            token = int(self._revealed(answers, 0).item())
            if not 0 <= token < (self._model.inputs[0].limit or math.inf):
                raise ProtocolError("the parties' shares make no token of the model's vocabulary")
            if len(answers[0].outputs) > 1:
                self.logits.append(self._revealed(answers, 1)[0].double() / 2.0 ** self._model.outputs[0].frac_bits)
            self.tokens.append(token)
            if token in self._end:
                self.finish = "stop"
            elif len(self.tokens) == self._settings.max_new_tokens:
                self.finish = "length"
            text, stopped = self._shown(token)
            if stopped:
                self.finish = "stop"
            self.text += text
            yield Piece(text, token, cost, tuple(answer.outputs[0].data for answer in answers))
            if self.finish:
                return
        if self._cancelled.is_set():
            self.finish = "cancelled"
        elif not self.finish:
            raise ProtocolError("the parties ended the answer before it was complete")

    def _shown(self, token: int) -> tuple[str, bool]:
        """The text that is complete with this token, and whether a stop text has ended it."""
        if self._detokenizer is None:
            return "", False
        text = self._detokenizer.feed(token) if token not in self._end else ""
        if not self.finish:
            return self._stops.feed(text)
        text, stopped = self._stops.feed(text + self._detokenizer.flush())
        return text + ("" if stopped else self._stops.flush()), stopped

    def _answers(self) -> Iterator[list[Any]]:
        """What the parties answer, step by step. Begun anew once if nothing has come and that may help."""
        for again in (True, False):
            arrived = False
            try:
                for answers in self._streamed():
                    arrived = True
                    yield answers
                return
            except (NotFoundError, AbortedError, ContextLengthError) as error:
                # too long with the parent: then its rows, those that were changed included, take too much memory
                if self._cancelled.is_set():
                    return
                aborted = isinstance(error, AbortedError)
                if not again or arrived or not (aborted or self._parent):
                    raise
                self._memory.drop(self._parent)
                if aborted:
                    self._wait(error)
                self._begin(b"", 0)
            except MpcInferError:
                if self._cancelled.is_set():
                    return
                raise

    def _wait(self, error: MpcInferError) -> None:
        left = self._deadline - time.monotonic()
        cluster, identity = self._connection.cluster, self._connection.identity
        try:
            wait_until_ready(cluster, identity, timeout=max(0.0, min(left, _READY_TIMEOUT)))
        except MpcInferError as obstacle:
            raise AbortedError(f"{error} ({obstacle})") from error

    def _streamed(self) -> Iterator[list[Any]]:
        left = self._deadline - time.monotonic()
        with self._connection.stream("Generate", self._requests, timeout=left) as (answers, stop):
            self._stop_streams = stop
            if self._cancelled.is_set():
                stop()
            yield from answers

    def _revealed(self, answers: list[Any], position: int) -> torch.Tensor:
        """An output: the sum of all shares."""
        shares = []
        for index, answer in enumerate(answers):
            message = answer.outputs[position] if position < len(answer.outputs) else tensor_pb2.Tensor()
            if position == 0 and tuple(message.shape) != (1, 1):
                raise ProtocolError(f"party/{index} answered with no share of a token")
            try:
                shares.append(Z64.unpack(message.data, tuple(message.shape)))
            except (ValueError, RuntimeError) as error:
                raise ProtocolError(f"party/{index} answered with a damaged share") from error
        if len({tuple(share.shape) for share in shares}) > 1:
            raise ProtocolError("the parties answered with shares of different shapes")
        return combine(shares, Z64)

    def _remember(self) -> None:
        """The session has taken in all tokens but the last, which nobody has asked it to."""
        if not self.tokens:
            return
        taken = (*self._prompt, *self.tokens[:-1])
        for stale in self._memory.add(Known(self._model, self._session, taken)):
            self._connection.forget_session(stale)


def _cost(answers: list[Any]) -> StepCost:
    return StepCost(
        seconds_online=max(a.online.seconds for a in answers),
        seconds_offline=max(a.offline.seconds for a in answers),
        rounds=max(a.online.rounds for a in answers),
        bytes_sent_per_party=max(a.online.bytes_sent for a in answers),
        bytes_sent_by_dealer=sum(a.offline.bytes_from_dealer for a in answers),
    )


def _sum(a: StepCost, b: StepCost) -> StepCost:
    return StepCost(
        a.seconds_online + b.seconds_online,
        a.seconds_offline + b.seconds_offline,
        a.rounds + b.rounds,
        a.bytes_sent_per_party + b.bytes_sent_per_party,
        a.bytes_sent_by_dealer + b.bytes_sent_by_dealer,
    )
