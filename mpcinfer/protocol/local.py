"""All parties and the dealer in one process, in lock-step, without threads: for tests, and to try a protocol out."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mpcinfer.errors import ProtocolError
from mpcinfer.protocol.cache import RowMask
from mpcinfer.protocol.context import Context, Opening
from mpcinfer.protocol.correlation import Kind, Tensors, deal, expand, free_values
from mpcinfer.protocol.linear import WeightMask
from mpcinfer.protocol.types import Shared, Weight
from mpcinfer.ring import prg, sharing
from mpcinfer.ring.domain import Z64


@dataclass
class Transcript:
    """What all parties saw: every opened value, and what it cost one party (frame headers excluded)."""

    rounds: int = 0
    bytes_sent: int = 0
    dealer_bytes: int = 0
    openings: list[tuple[str, int, torch.Tensor]] = field(default_factory=list)  # label, ring bits, value


class _LocalDealer:
    def __init__(self, keys: Sequence[bytes], transcript: Transcript, fixed: dict[str, torch.Tensor]) -> None:
        self.keys = keys
        self.transcript = transcript
        self.fixed = fixed
        self.sent: dict[str, bytes] = {}

    def correction(self, name: str, item: Kind) -> bytes:
        if name not in self.sent:
            self.sent[name] = b"".join(deal(item, name, self.keys, self.fixed.__getitem__))
            if isinstance(item, WeightMask):
                (self.fixed[item.weight],) = free_values(item, name, self.keys).values()
            if isinstance(item, RowMask):
                (rows,) = free_values(item, name, self.keys).values()
                before = self.fixed.get(item.cache)
                self.fixed[item.cache] = rows if before is None else torch.cat([before, rows], dim=-2)
            self.transcript.dealer_bytes += len(self.sent[name])
        return self.sent[name]


class _LocalSource:
    def __init__(self, dealer: _LocalDealer, index: int, weights: Mapping[str, Weight]) -> None:
        self.dealer = dealer
        self.index = index
        self.weights = weights
        self.drawn: set[str] = set()

    def draw(self, name: str, item: Kind) -> Tensors:
        if name in self.drawn:
            raise ProtocolError(f"correlation {name} drawn twice")
        self.drawn.add(name)
        last = self.index == len(self.dealer.keys) - 1
        correction = self.dealer.correction(name, item) if last else None
        shares = expand(item, name, self.dealer.keys[self.index], last=last, correction=correction)
        return item.prepare(shares, lambda weight: self.weights[weight].masked)


class LocalWorld:
    """n parties. `seed` (32 bytes) determines all correlated randomness; sharing inputs draws fresh randomness."""

    def __init__(self, parties: int, seed: bytes) -> None:
        self.parties = parties
        self.seed = seed
        self.transcript = Transcript()
        self._runs = 0
        self._fixed: dict[str, torch.Tensor] = {}

    def share(self, x: torch.Tensor, frac_bits: int = 0) -> list[Shared]:
        """Fresh shares of an int64 tensor, one per party."""
        seeds, last = sharing.split(x, Z64, self.parties)
        shares = [*(prg.expand(seed, tuple(x.shape), Z64) for seed in seeds), last]
        return [Shared(share, frac_bits) for share in shares]

    def reveal(self, shares: Sequence[Shared]) -> torch.Tensor:
        """The int64 tensor behind shares."""
        return sharing.combine([s.share for s in shares], Z64)

    def run(
        self,
        protocol: Callable[..., Coroutine[Any, Any, Any]],
        *arguments: Any,
        weights: Sequence[Mapping[str, Weight]] | None = None,
    ) -> list[Any]:
        """Run `protocol(ctx, *args)` at every party; an argument that is a list gives each party its own element."""
        keys = [prg.derive(self.seed, "party", i, self._runs) for i in range(self.parties)]
        self._runs += 1
        dealer = _LocalDealer(keys, self.transcript, self._fixed)
        running = []
        for i in range(self.parties):
            own = weights[i] if weights else {}
            ctx = Context(i, self.parties, _LocalSource(dealer, i, own), own)
            running.append(protocol(ctx, *(a[i] if isinstance(a, list) else a for a in arguments)))
        try:
            return self._in_step(running)
        finally:
            for coroutine in running:
                coroutine.close()

    def _in_step(self, running: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
        values: list[torch.Tensor] | None = None
        results: list[Any] = [None] * self.parties
        while True:
            batches: list[list[Opening]] = []
            for i, coroutine in enumerate(running):
                try:
                    batches.append(coroutine.send(values))
                except StopIteration as done:
                    results[i] = done.value
            if not batches:
                return results
            if len(batches) != self.parties or len({len(b) for b in batches}) != 1:
                raise ProtocolError("parties are out of step")
            values = [self._open([batch[j] for batch in batches]) for j in range(len(batches[0]))]
            self.transcript.rounds += 1

    def _open(self, openings: Sequence[Opening]) -> torch.Tensor:
        ring = openings[0].ring
        value = sharing.combine([o.masked for o in openings], ring)
        self.transcript.bytes_sent += ring.packed_bytes(value.numel()) * (self.parties - 1)
        self.transcript.openings.append((openings[0].label, ring.bits, value))
        return value
