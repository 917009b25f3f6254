"""Canaries among a client's own requests: which to send, and what to make of the answers.

Before each request of its own, while a coin of rate p says so, a client sends a canary of the same shape through the
same code. So whatever was sent before, each request that the parties see is a canary with probability p, and nothing
in it says so: shares are fresh, sizes, times allowed and settings the same. Whoever tampers with a request is caught
with probability p q, where q is the probability that what they did would change a canary's answer beyond its tolerance.

For texts this holds step by step. A canary is written to the full length that was asked for, so at any step of a text
the probability that it is one is at least p; and each text, canary or not, begins anew and is forgotten at its end:
what goes on with a text of before could be no canary.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from mpcinfer.client.cluster import Connection
from mpcinfer.client.generation import Settings
from mpcinfer.client.model import Model
from mpcinfer.client.text import Tokenizer
from mpcinfer.client.writing import Answer, Oblivion
from mpcinfer.errors import InputError, SignatureError, TamperingError
from mpcinfer.graph.sizes import BATCH
from mpcinfer.trust.canaries import CanarySet, Example, Text

MAX_RATE = 0.9
_COIN = 1 << 53


@dataclass(frozen=True)
class Audit:
    """Check on the parties: of the requests that they see, on average the part `rate` are canaries.

    canaries: as the model's owner has made them (`ModelOwner.canaries`) and `Client.canaries` has read them. With
    rate p an own request costs 1 / (1 - p) requests; budgets count them all.
    """

    rate: float
    canaries: CanarySet

    def __post_init__(self) -> None:
        if not 0 < self.rate <= MAX_RATE:
            raise InputError(f"the rate of canaries is above 0 and at most {MAX_RATE}")

    def examples(self, model: Model, inputs: Sequence[torch.Tensor]) -> Iterator[Example]:
        """What to send before a request with these encoded inputs. InputError, whatever the coin says, if none fits."""
        self._check(model)
        shapes = [tuple(x.shape) for x in inputs]
        rows = shapes[0][0] if batched(model) else 0
        fitting = self._fitting([(1, *shape[1:]) for shape in shapes] if rows else shapes)
        return (_stacked([secrets.choice(fitting) for _ in range(rows or 1)]) for _ in self._coins())

    def texts(self, model: Model, length: int, settings: Settings) -> Iterator[Text]:
        """What to send before a text of `length` tokens. InputError, whatever the coin says, if none fits."""
        self._check(model)
        if settings.temperature or settings.repetition_penalty != 1:
            raise InputError("only greedy answers without a penalty can be audited: others have no known right answer")
        most = settings.max_new_tokens
        fitting = [t for t in self.canaries.texts if len(t.prompt) == length and len(t.tokens) >= most]
        if not fitting:
            known = sorted({(len(t.prompt), len(t.tokens)) for t in self.canaries.texts})
            raise InputError(
                f"no canary has a prompt of {length} tokens and an answer of {most}; those of this set have "
                f"{_listed(known)}: ask the model's owner for more"
            )
        return (Text(t.prompt, t.tokens[:most]) for t in (secrets.choice(fitting) for _ in self._coins()))

    def check_example(self, example: Example, outputs: Sequence[torch.Tensor]) -> None:
        """TamperingError unless these are the outputs that the owner has signed."""
        for expected, got, tolerance in zip(example.outputs, outputs, self.canaries.tolerances, strict=True):
            # compared without a difference, which might wrap around
            low, high = expected - tolerance, expected + tolerance
            if got.shape != expected.shape or bool(((got < low) | (got > high)).any()):
                raise self._alarm()

    def check_text(self, text: Text, tokens: Sequence[int]) -> None:
        """TamperingError unless these are the tokens that the owner has signed."""
        if tuple(tokens) != text.tokens:
            raise self._alarm()

    def _alarm(self) -> TamperingError:
        known = self.canaries
        return TamperingError(
            f"canary alarm: model {known.model!r} version {known.version} answered a canary otherwise than "
            f"{known.owner} has signed; a party or the dealer computes something else. Do not trust "
            "earlier answers either, and tell the operators. The request that was to follow has not been sent"
        )

    def _coins(self) -> Iterator[None]:
        while secrets.randbelow(_COIN) < self.rate * _COIN:
            yield None

    def _check(self, model: Model) -> None:
        known = self.canaries
        if (known.model, known.version, known.deployment, known.owner) != (
            model.name,
            model.version,
            model.deployment_id,
            model.owner,
        ):
            raise SignatureError(
                f"these canaries are of model {known.model!r} version {known.version} of {known.owner}, and not of the "
                f"deployment that is asked, {model.name!r} version {model.version}: get those from its owner"
            )

    def _fitting(self, shapes: Sequence[tuple[int, ...]]) -> list[Example]:
        found = [e for e in self.canaries.examples if [tuple(x.shape) for x in e.inputs] == list(shapes)]
        if not found:
            known = sorted({tuple(tuple(x.shape) for x in e.inputs) for e in self.canaries.examples})
            raise InputError(
                f"no canary has inputs of the shape {_listed([tuple(shapes)])}; those of this set have "
                f"{_listed(known)}: ask the model's owner for more"
            )
        return found


def audited(
    audit: Audit,
    connection: Connection,
    model: Model,
    tokenizer: Tokenizer | None,
    tokens: Sequence[int],
    settings: Settings,
    stop: Sequence[int],
    timeout: float,
) -> Answer:
    """An answer before which canaries are written as it will be; see `Answer`. InputError if none fits."""
    chosen, unstopped = audit.texts(model, len(tokens), settings), replace(settings, stop=())

    def before(answer: Answer) -> None:
        for canary in chosen:
            asked = Answer(connection, Oblivion(), model, None, canary.prompt, unstopped, (), timeout)
            tokens = answer.after(asked)
            if asked.finish == "cancelled":
                return
            audit.check_text(canary, tokens)

    return Answer(connection, Oblivion(), model, tokenizer, tokens, settings, stop, timeout, before)


def batched(model: Model) -> bool:
    """Whether inputs and outputs consist of rows that do not influence each other, so that canaries can be stacked."""
    axis = next((-i for i, size in enumerate(model.sizes, 1) if size.name == BATCH), 0)
    return axis < 0 and all(spec.shape[:1] == (axis,) for spec in (*model.inputs, *model.outputs))


def _stacked(rows: Sequence[Example]) -> Example:
    if len(rows) == 1:
        return rows[0]
    inputs, outputs = zip(*(r.inputs for r in rows), strict=True), zip(*(r.outputs for r in rows), strict=True)
    return Example(tuple(map(torch.cat, inputs)), tuple(map(torch.cat, outputs)))


def _listed(known: Sequence[tuple[object, ...]]) -> str:
    return ", ".join("x".join(map(str, each)) for each in known) or "none"
