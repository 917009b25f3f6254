"""Tiny random decoders, and texts that go through them step by step at all parties in one process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from mpcinfer.graph.capture import Captured, capture
from mpcinfer.graph.plan import Planner
from mpcinfer.graph.program import Program
from mpcinfer.graph.step import Stepped, capacity, step
from mpcinfer.models.decoder import Decoder, DecoderConfig
from mpcinfer.models.rope import Rope
from mpcinfer.nn.sampling import Choice, Seen
from mpcinfer.protocol.local import Transcript
from mpcinfer.protocol.types import Cached, Shared
from tests.models_local import deploy_local

VOCABULARY = 50
GREEDY = Choice()
_LLAMA: dict[str, Any] = {
    "kv_heads": 2,
    "head_dim": 8,
    "activation": "silu",
    "rope": Rope(tuple(10000.0 ** (-i / 4) for i in range(4))),
    "norm": "rms",
    "gated": True,
    "tied": True,
}
_GPT2: dict[str, Any] = {
    "kv_heads": 4,
    "head_dim": 4,
    "activation": "gelu",
    "rope": None,
    "norm": "layer",
    "gated": False,
    "tied": False,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
}
STYLES = {"llama": _LLAMA, "gpt2": _GPT2}


def tiny_decoder(style: str = "llama", **changes: Any) -> Decoder:
    """A random decoder of few tokens."""
    sizes = {"vocabulary": VOCABULARY, "context": 64, "width": 16, "layers": 2, "heads": 4, "hidden": 32, "eps": 1e-5}
    settings: dict[str, Any] = {**sizes, **STYLES[style], **changes}
    settings = {"scale": settings["head_dim"] ** -0.5, "windows": (0,) * settings["layers"]} | settings
    model = Decoder(DecoderConfig(**settings)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def token_ids(length: int, seed: int = 0) -> list[int]:
    """A text."""
    found: list[int] = torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return found


def captured_decoder(model: Decoder, reveal: str = "logits") -> Captured:
    """The decoder as its owner deploys it."""
    ids = torch.tensor([token_ids(12)])
    return capture(
        model, model.example_inputs(ids), dynamic_shapes=model.dynamic_shapes(), reveal=reveal, calibration=[ids]
    )


@cache
def decoder(style: str = "llama") -> tuple[Decoder, Captured]:
    """One of each style, captured once."""
    model = tiny_decoder(style)
    return model, captured_decoder(model)


def plain_logits(model: Decoder, tokens: Sequence[int]) -> torch.Tensor:
    """The model's own logits [vocabulary] of the next token."""
    logits: torch.Tensor = model(torch.tensor([list(tokens)]), *model.empty_caches())[0][0]
    return logits


def with_room(program: Program, rows: Sequence[Cached] | None, room: int) -> dict[str, Cached]:
    """A party's caches for the next step, empty ones at first."""
    found = {}
    for i, c in enumerate(program.caches):
        none = torch.zeros(c.shape, dtype=torch.int64)
        share, masked = (rows[i].share, rows[i].masked) if rows else (none, none)
        found[c.name] = Cached(c.name, share, masked, room, c.frac_bits)
    return found


class LocalText:
    """A text at all parties."""

    def __init__(self, captured: Captured, parties: int, key: bytes = b"k" * 32) -> None:
        self.program = captured.program
        self.parties = parties
        self.world, self.holdings = deploy_local(captured, parties, key)
        self.planner = Planner(self.program, parties=parties)
        self.rows: list[list[Cached] | None] = [None] * parties
        self.length = 0
        self.before = [Seen(None, Shared(torch.empty(0, dtype=torch.int64)))] * parties

    def take_in(self, tokens: Sequence[int] | list[Shared], choice: Choice | None) -> list[Stepped]:
        """One step, which must cost what was planned."""
        whole = tokens if isinstance(tokens[0], Shared) else self.world.share(torch.tensor([list(tokens)]))
        new: list[Shared] = whole  # type: ignore[assignment]
        more = new[0].shape[1]
        room = capacity(self.length + more)
        caches = [with_room(self.program, rows, room) for rows in self.rows]
        fresh = [torch.cat([old.fresh.share, x.share[0]]) for old, x in zip(self.before, new, strict=True)]
        self.before = [Seen(old.counts, Shared(x)) for old, x in zip(self.before, fresh, strict=True)]
        self.world.transcript = Transcript()
        done: list[Stepped] = self.world.run(
            lambda ctx, held, x, own, all_ids: step(self.program, ctx, held, x, own, choice, all_ids),
            self.holdings,
            new,
            caches,
            self.before,
            weights=self.holdings,
        )
        self.rows = [each.caches for each in done]
        self.length += more
        plan, cost, logits = self.planner.step(more, room, choice, len(fresh[0]))
        if done[0].counts is not None:
            self.before = [Seen(each.counts, Shared(fresh[0][:0])) for each in done]
        seen = self.world.transcript
        assert (seen.rounds, seen.bytes_sent) == (cost.rounds, cost.bytes_sent)
        assert seen.dealer_bytes == plan.correction_bytes() and logits == done[0].logits
        return done

    def chosen(self, done: list[Stepped]) -> tuple[int, torch.Tensor]:
        """The token of a step, and its logits."""
        token, logits = (self.world.reveal([each.outputs[i] for each in done]) for i in range(2))
        return int(token), logits[0].double() / 65536
