"""What all steps are made of: votes, tapes, rounds. One party's part; the others do the same at the same time."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

import torch

from mpcinfer import errors
from mpcinfer.config import Limits
from mpcinfer.errors import AbortedError, MpcInferError, ProtocolError, TamperingError
from mpcinfer.graph.plan import mask_weights
from mpcinfer.party.ahead import Ahead
from mpcinfer.party.catalogue import Catalogue, Model
from mpcinfer.party.epoch import Epoch
from mpcinfer.party.inbox import Job
from mpcinfer.party.part import Part, Phase
from mpcinfer.party.policy import Policy
from mpcinfer.party.pool import Pool
from mpcinfer.party.releasing import Answer, Releasing
from mpcinfer.party.running import Late, Refused, run
from mpcinfer.party.sacrifice import Coin, audit
from mpcinfer.party.session import Session, Sessions, Slot, use_of
from mpcinfer.party.tape import Tape, fetch
from mpcinfer.party.transcript import Evidence, Transcript
from mpcinfer.party.vouching import Vouching, check_ballot
from mpcinfer.party.waiting import Ballot, Metered, Release, Round
from mpcinfer.protocol.cache import CacheUse
from mpcinfer.protocol.context import Context, Opening
from mpcinfer.protocol.tracing import Plan
from mpcinfer.protocol.types import Shared, Weight
from mpcinfer.wire import channel
from mpcinfer.wire.frames import COMPARED
from mpcinfer.wire.memory import give_back
from mpcinfer.wire.v1 import tensor_pb2


class Stepping:
    """How this party takes part in steps."""

    def __init__(
        self,
        index: int,
        catalogue: Catalogue,
        sessions: Sessions,
        policy: Policy,
        limits: Limits,
        vouching: Vouching | None = None,
    ) -> None:
        """vouching: where the cluster has witnesses."""
        self.index = index
        self.policy = policy
        self.sessions = sessions
        self._catalogue = catalogue
        self._limits = limits
        self.releasing = Releasing(vouching)
        self.pool = Pool(limits.pool_mb)
        self._ahead: Ahead | None = None

    def run(self, epoch: Epoch, steps: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
        """Run the parts of a step side by side: see `running.run`."""
        return run(epoch, steps, _shared_round, self.releasing)

    async def vote(
        self, part: Part, refusal: MpcInferError | None, note: str = "", *, late: bool = False, upload: str = ""
    ) -> dict[int, str]:
        """All parties say yes (with a note each), no, or "not here yet".

        upload: the commitment to what this party was sent, which must be what its witness was sent.
        Refused, caused by the error, if anybody says no; else Late if anybody has to wait.
        """
        own = {
            "error": type(refusal).__name__ if refusal else "",
            "text": str(refusal) if refusal else note,
            "late": late,
            "upload": upload,
        }
        answers = await Ballot(part, own)
        check_ballot(self.index, answers[self.index], own)
        if refusal is not None:
            raise Refused from refusal
        for peer, answer in sorted(answers.items()):
            if answer["error"]:
                kind = getattr(errors, answer["error"], None)
                if not (isinstance(kind, type) and issubclass(kind, MpcInferError)):
                    kind = AbortedError
                raise Refused from kind(f"party {peer}: {answer['text']}")
        if any(answer["late"] for answer in answers.values()):
            raise Late
        return {peer: answer["text"] for peer, answer in answers.items()}

    async def agreed(self, part: Part, work: Callable[[], Any]) -> Any:
        """Do something that may fail here, and go on only if it succeeded everywhere."""
        value, refusal = _tried(work)
        await self.vote(part, refusal)
        return value

    async def voted(self, part: Part, work: Callable[[], str]) -> dict[int, str]:
        """Do something that may fail here; if it succeeded everywhere, what all say that it has yielded."""
        note, refusal = _tried(work)
        return await self.vote(part, refusal, note or "")

    async def execute(
        self,
        part: Part,
        tape: Tape,
        weights: dict[str, Weight],
        protocol: Callable[[Context], Coroutine[Any, Any, Any]],
        *,
        compare: bool = True,
    ) -> tuple[Any, Phase]:
        """Run a protocol with the other parties: its result here, and what it cost without what it waited for the tape.

        TamperingError, which ends the epoch, unless all parties have seen the same opened. compare: false where those
        for whom it is run look at that themselves.
        """
        began, rounds, sent = time.perf_counter(), part.rounds, part.sent
        ctx = Context(self.index, part.epoch.mesh.parties, tape, weights)
        part.transcript, part.evidence = Transcript(), None
        result = await Metered(part, protocol(ctx))
        tape.end()
        if compare:
            await self.compare(part, tape.id)
        seconds = time.perf_counter() - began - tape.waited
        if tape.large:
            give_back()  # what comes next is smaller, as a rule
        return result, Phase(seconds, part.rounds - rounds, part.sent - sent)

    async def compare(self, part: Part, tape: bytes) -> None:
        """One more round, so that nothing is released before all have seen the same."""
        epoch = part.epoch
        seal = part.transcript.seal(epoch.secret, epoch.id, part.id, tape)
        last = Round(part, seal=seal)
        await last
        others = [peer for peer, other in last.seals.items() if not hmac.compare_digest(other, seal)]
        # a witness has seen what its party had to see: it says so when all state what they have computed, with suspects
        if others and not epoch.mesh.shadow:
            raise TamperingError(
                f"party {' and '.join(map(str, others))} saw other values opened than party {self.index}: some party "
                "has sent different values to different parties. Nothing was released; compare the parties' audit logs"
            )
        part.evidence = Evidence(epoch.id, tape, seal, part.transcript.openings, epoch.manifest)

    async def release(
        self, part: Part, job: Job, step: dict[str, Any], outputs: Sequence[tensor_pb2.Tensor] = (), number: int = 0
    ) -> bytes:
        """Go on, to let outputs leave or to commit a model, only once all parties and witnesses vouch for all before.

        number: of the answer, where a request has several. The commitment to the outputs; nothing where there are no
        witnesses. TamperingError, which ends the epoch, if anything differs.
        """
        if not self.releasing.needed:
            return b""
        answer = Answer(job, step, outputs, number)
        commitment = answer.commitment()
        await Release(part, answer.subject(commitment))
        return commitment

    async def deal(
        self,
        part: Part,
        tape: bytes,
        plan: Plan,
        digest: bytes,
        weights: dict[str, Weight],
        sessions: Sequence[Session] = (),
    ) -> Tape:
        """Fetch a tape at all parties, and another one for each that is audited.

        sessions: whose rows it is about; of several none may be audited.

        A failure ends the epoch: the dealer may have forgotten it, or burn the tape.
        """
        while True:
            use = use_of(sessions) if sessions else None
            work = partial(fetch, part.epoch, tape, plan, digest, weights, self._limits.step_timeout_s, use)
            # if what was fetched before has failed the others learn it from the links: they may wait for this party's
            # share
            self.settle()
            fetched = await self._fetched(part, work, slot=sessions[0].slot if sessions else None)
            if fetched is not None:
                return fetched
            for session in sessions:
                session.slot.skip(plan.rows)
            tape = hashlib.sha256(tape).digest()[:16]

    def ahead(
        self,
        part: Part,
        tape: bytes,
        plan: Plan,
        digest: bytes,
        weights: dict[str, Weight],
        use: CacheUse | None = None,
        rows: int = 0,
    ) -> Ahead:
        """Begin to fetch a tape that is for later, each run of which gives so many rows of caches masks.

        One after the other if there are several, and in the same order at all parties.
        """
        seconds, epoch = self._limits.step_timeout_s, part.epoch
        runs = [digest] if use is None else [use.after(i * rows).digest(digest) for i in range(use.times)]
        # it may begin only once another has come, when something else is being done
        account = epoch.mesh.account
        work = partial(fetch, epoch, tape, plan, digest, weights, seconds, use, ahead=True, account=account)
        self._ahead = Ahead(tape, work, rows * len(runs), runs, after=self._ahead)
        return self._ahead

    async def taken(self, part: Part, ahead: Ahead, slot: Slot | None = None) -> tuple[Tape | None, float]:
        """What was fetched ahead, the same at all parties, or None if it was audited. A failure ends the epoch.

        And the seconds that it took before this party began to wait for it here.
        """
        before = ahead.waited
        tape = await self._fetched(part, ahead.take, ahead.id.hex(), slot)
        if self._ahead is ahead:
            self._ahead = None
        return tape, ahead.seconds - (ahead.waited - before)

    def settle(self) -> None:
        """Wait for what is being fetched ahead: nothing else may be asked of the dealer before it is there.

        Raises what has gone wrong with it: the key chains need not agree any more, and the epoch must end.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.take()

    def check(self) -> None:
        """Raise what has gone wrong with what is being fetched ahead, if that is known; wait for nothing."""
        if self._ahead is not None and self._ahead.over:
            self.settle()

    def end(self) -> None:
        """The epoch is over: all that was fetched ahead is burnt."""
        self.pool.clear()
        self.releasing.end()
        self._ahead = None

    async def _fetched(
        self, part: Part, work: Callable[[], Tape], id_: str = "", slot: Slot | None = None
    ) -> Tape | None:
        tape, refusal = _tried(work)
        coin = Coin(part.epoch.audit_rate)
        try:
            notes = await self.vote(part, refusal, f"{id_} {coin.commitment}" if coin.rate else id_)
        except Refused as refused:
            raise refused.__cause__ or AbortedError("a party could not get its randomness") from None
        named = {peer: note.partition(" ") for peer, note in notes.items()}
        if len({name for name, _, _ in named.values()}) > 1:
            raise ProtocolError("the parties took different tapes; all of them are burnt")
        fetched: Tape = tape
        evidence, fetched.evidence = fetched.evidence, None
        if evidence is None:
            return fetched
        tossed = await self.vote(part, None, coin.nonce)
        if not coin.falls({peer: commitment for peer, (_, _, commitment) in named.items()}, tossed):
            return fetched
        before = part.epoch.mesh.bytes_sent
        audit(part.epoch, evidence, slot.mask if slot is not None else None)
        part.sent += part.epoch.mesh.bytes_sent - before
        return None

    async def masked(self, part: Part, model: Model, tape: bytes) -> None:
        """Open the weights' masks, once per epoch."""
        epoch = part.epoch
        if model.masked_in == epoch.id:
            return
        if model.masking_in == epoch.id:
            raise ProtocolError("two parts of a step open one model's masks")
        model.masking_in = epoch.id

        def prepare() -> tuple[Plan, dict[str, Shared]]:
            return model.mask_plan(epoch.mesh.parties), self._catalogue.load(model)

        try:
            plan, shares = await self.agreed(part, prepare)
            masks = await self.deal(part, tape, plan, plan.digest(), {})
            masked, _ = await self.execute(part, masks, {}, lambda ctx: mask_weights(model.program, ctx, shares))
        finally:
            model.masking_in = b""
        for weight in masked:
            weight.mask = partial(masks.kept.share, weight.name)
        model.weights = {w.name: w for w in masked}
        model.masked_in = epoch.id
        give_back()


def _tried(work: Callable[[], Any]) -> tuple[Any, MpcInferError | None]:
    """What it returns, or why it fails."""
    try:
        return work(), None
    except MpcInferError as error:
        return None, error
    except Exception as error:
        return None, incident(error)


def incident(error: BaseException | None) -> ProtocolError:
    """What a client may be told about a failure that nobody foresaw; the log says where it was."""
    return ProtocolError(channel.to_status(error or AssertionError())[1])


def tapes(step: dict[str, Any], count: int) -> list[bytes]:
    """Ids of the tapes of a step, from the one party 0 drew."""
    base = bytes.fromhex(step["tape"])
    return [hashlib.sha256(base + bytes([i])).digest()[:16] for i in range(count)]


def _shared_round(epoch: Epoch, rounds: list[Round]) -> Callable[[], list[torch.Tensor]]:
    """One round of all parts; the frames' headers count with the first one's bytes. See `running.Exchange`."""
    # a witness sends nothing
    before, peers = epoch.mesh.bytes_sent, 0 if epoch.mesh.shadow else epoch.mesh.parties - 1
    seals = [each for each in rounds if each.seal]
    answers = _exchange(epoch, [opening for each in rounds for opening in each.openings], seals)
    headers = epoch.mesh.bytes_sent - before
    for each in rounds:
        own = peers * (sum(o.ring.packed_bytes(o.masked.numel()) for o in each.openings) + len(each.seal))
        each.part.rounds += 1
        each.part.sent += own
        headers -= own
    rounds[0].part.sent += headers

    def opened() -> list[torch.Tensor]:
        values, at = answers(), 0
        for each in rounds:
            each.part.transcript.add(each.openings, values[at : at + len(each.openings)])
            at += len(each.openings)
        return values

    return opened


def _exchange(epoch: Epoch, batch: list[Opening], sealed: list[Round]) -> Callable[[], list[torch.Tensor]]:
    """One round: all openings of a batch, then the seals, in one message to every peer."""
    packed = [opening.ring.pack(opening.masked) for opening in batch]
    sizes = [len(p) for p in packed]
    receive = epoch.mesh.begin(b"".join([*packed, *(each.seal for each in sealed)]))
    expected = sum(sizes) + COMPARED * len(sealed)

    def opened() -> list[torch.Tensor]:
        values = [opening.masked for opening in batch]
        for peer, payload in receive().items():
            if len(payload) != expected:
                raise ProtocolError(f"party {peer} sent {len(payload)} bytes in a round of {expected}")
            at = 0
            view = memoryview(payload)
            for i, opening in enumerate(batch):
                values[i] = opening.ring.add_packed(values[i], view[at : at + sizes[i]])
                at += sizes[i]
            for i, each in enumerate(sealed):
                each.seals[peer] = payload[at + COMPARED * i : at + COMPARED * (i + 1)]
        return values

    return opened
