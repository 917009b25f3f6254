"""The data owner's side: share an input among the parties, add up the shares of the answer."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, cast

import torch

from mpcinfer.client.audit import Audit, audited
from mpcinfer.client.cluster import CONNECT_TIMEOUT, LIST_TIMEOUT, Connection
from mpcinfer.client.generation import Message, Prompt, Settings
from mpcinfer.client.inputs import Array, cut, encode_inputs, free_sizes
from mpcinfer.client.locate import AnyPath
from mpcinfer.client.model import Model, TensorSpec
from mpcinfer.client.outputs import Cost, cost_of, output_of, total
from mpcinfer.client.proof import Proven
from mpcinfer.client.status import PartyStatus, cluster_status, wait_until_ready
from mpcinfer.client.text import Tokenizer
from mpcinfer.client.tokens import UserToken, source
from mpcinfer.client.writing import Answer, Memory
from mpcinfer.config import Cluster
from mpcinfer.errors import (
    AbortedError,
    DeadlineError,
    InputError,
    MpcInferError,
    NotFoundError,
    ProtocolError,
    StoreError,
)
from mpcinfer.graph.sizes import filled
from mpcinfer.models.vocabulary import Vocabulary
from mpcinfer.ring.codec import check_indices
from mpcinfer.ring.domain import Ring
from mpcinfer.ring.sharing import split
from mpcinfer.trust import canaries
from mpcinfer.trust.canaries import CanarySet
from mpcinfer.trust.commitment import SALT_BYTES
from mpcinfer.trust.manifest import Manifest
from mpcinfer.trust.receipt import Receipt
from mpcinfer.wire.identity import Identity
from mpcinfer.wire.v1 import party_pb2, tensor_pb2

_READY_TIMEOUT = 15.0
GENERATE_TIMEOUT = 3600.0


@dataclass(frozen=True)
class Answered:
    """What became of one request: the outputs, what they cost, what the parties have signed."""

    outputs: list[torch.Tensor] = field(repr=False)
    cost: Cost
    receipt: Receipt


class Client:
    """What a data owner holds: a connection to all parties of a cluster. May be used from several threads."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._models: dict[tuple[str, int], Model] = {}
        self._texts: dict[str, tuple[Tokenizer, Vocabulary]] = {}
        self._memory = Memory()
        self.audit: Audit | None = None
        """For all requests that are given none of their own."""
        self._proven: Proven | None = None
        self.last_cost: Cost | None = None
        """What the last answer cost: {"online": {"seconds", "rounds", "bytes_sent_per_party"}, "offline": {"seconds",
        "rounds", "bytes_sent_per_party", "bytes_sent_by_dealer"}}; seconds and bytes per party of the slowest and the
        most talkative party. The offline phase does not depend on the input and may have happened before it came; of
        what is large it is what a party had to wait for while it computed; that the others then waited for it is part
        of their online phase."""

    @property
    def last_receipt(self) -> Receipt | None:
        """What all parties have signed about the last answer (a text: as far as it is written), and was checked.

        Of a batch that was sent as several requests, that of the last one.
        """
        return self._proven.receipt if self._proven is not None else None

    @classmethod
    def connect(
        cls,
        cluster: AnyPath | Cluster,
        identity: AnyPath | Identity | None = None,
        *,
        token: UserToken | None = None,
        timeout: float = CONNECT_TIMEOUT,
        pin: AnyPath | None = None,
    ) -> Self:
        """Connect to all parties, checking who they are.

        cluster: the cluster file, or the directory it is in. identity: which key pair to use (see `locate.locate`);
        by default the only `client-*` pair beside the cluster file, else the only `owner-*` pair. token: of a gateway,
        the token (JWT) of the user for whom calls are made, or what returns one that is fresh, or the path (`Path`) of
        a file that holds it and is read again when it changes. pin: the file that `mpcinfer pin` has written; by
        default MPCINFER_PIN, else `manifest.pin` beside the cluster file if it is there. ConfigError for a token's file
        that cannot be read, or that others can read.
        ManifestError if the parties are not what was pinned.
        """
        shown = source(token)
        connection = Connection.to(cluster, identity, timeout=timeout, pin=pin)
        connection.token = shown
        return cls(connection)

    @property
    def manifest(self) -> Manifest:
        """Who the parties are and what they run, as they have signed it when they were last connected to."""
        return self._connection.manifest

    def infer(
        self,
        name: str,
        *inputs: Array,
        version: int = 0,
        timeout: float = 60.0,
        audit: Audit | None = None,
        receipts: list[Receipt] | None = None,
    ) -> Any:
        """Evaluate the model `name` (version 0: the newest) on `inputs`, within `timeout` seconds.

        inputs: one tensor per input of the model, the batch first where the model has one; torch or numpy, of any
        real dtype. Returns the output, or a tuple of them, of the same kind: float32, or int64 where what the model
        owner reveals is an index. A batch too large for one request is sent as several, one after the other.
        Nothing leaves this process before ShapeError, DtypeError and RangeError are ruled out. When a party fails in
        the middle, the request is shared afresh and sent once more as soon as the parties are ready.
        audit: send canaries among the requests, each with `timeout` seconds of its own; TamperingError for one that is
        answered wrong: what was to follow is not sent then. receipts: a list that is given what the parties have
        signed about each of the requests, in their order, where several threads would race for `last_receipt`.
        """
        deadline = time.monotonic() + timeout
        model, audit = self._model(name, version, deadline), audit or self.audit
        if model.context:
            raise InputError(f"{name!r} is a language model: it generates")
        try:
            return self._infer(model, inputs, deadline, timeout, audit, receipts)
        except NotFoundError:
            # The version has been removed, or deployed anew, since it was looked up.
            self._models.pop((name, model.version), None)
            found = self._model(name, version, deadline)
            if found == model:
                raise
            return self._infer(found, inputs, deadline, timeout, audit, receipts)

    def generate(
        self,
        name: str,
        prompt: Prompt | Sequence[int],
        settings: Settings | None = None,
        *,
        version: int = 0,
        timeout: float = GENERATE_TIMEOUT,
        stream: bool = True,
        audit: Audit | None = None,
        **changes: Any,
    ) -> Answer:
        """Have a language model continue a text, or answer in a conversation, within `timeout` seconds.

        prompt: a text, messages such as {"role": "user", "content": "..."}, or token ids. settings, and `changes` to
        them by name (max_new_tokens, temperature, top_k, repetition_penalty, stop): see `Settings`. The answer is
        iterated over as it is written; with stream=False it is complete. What the parties still hold of a text that
        begins in the same way is not sent again. audit: canaries go before it, when its first piece is asked for; for
        greedy answers only, and nothing is kept of the text. Raises ContextLengthError for too long a text, InputError
        for models that write no text, and while it is written what `infer` raises.
        """
        deadline = time.monotonic() + timeout
        model = self._model(name, version, deadline)
        settings = replace(settings or Settings(), **changes)
        tokenizer, stop = None, tuple[int, ...]()
        if model.vocabulary_digest:
            tokenizer, vocabulary = self._text(model, deadline)
            stop = vocabulary.stop
        if not model.context:
            raise InputError(f"{name!r} is no language model: it has outputs to infer, but writes no text")
        if isinstance(prompt, str) or any(isinstance(part, Mapping) for part in prompt):
            if tokenizer is None:
                raise InputError(f"{name!r} was deployed without a tokenizer: give token ids")
            ids = tokenizer.ids(prompt) if isinstance(prompt, str) else tokenizer.chat(cast(Sequence[Message], prompt))
        else:
            ids = check_indices(torch.tensor(list(prompt)), model.inputs[0].limit, "the prompt")
            if not len(ids):
                raise InputError("the prompt has no token")
        if (audit := audit or self.audit) is not None:
            answer = audited(audit, self._connection, model, tokenizer, ids.tolist(), settings, stop, timeout)
        else:
            left = deadline - time.monotonic()
            answer = Answer(self._connection, self._memory, model, tokenizer, ids.tolist(), settings, stop, left)
        self._proven = answer
        if not stream:
            for _ in answer:
                pass
        return answer

    def canaries(self, path: AnyPath) -> CanarySet:
        """The canaries in a file, checked to be signed by an owner of this cluster: for `Audit`."""
        return canaries.read(Path(path), self._connection.cluster)

    def embed(
        self, name: str, texts: Sequence[str], *, timeout: float = 60.0, receipts: list[Receipt] | None = None
    ) -> list[torch.Tensor]:
        """What an encoder makes of each text: one vector, float32. Texts of equal length share a request.

        receipts: as for `infer`; the shortest texts' come first. InputError for a model that was deployed without a
        tokenizer, or makes no vector of a text.
        """
        deadline = time.monotonic() + timeout
        model = self._model(name, 0, deadline)
        if not model.vocabulary_digest or model.context or len(model.inputs) != 1 or len(model.outputs) != 1:
            raise InputError(f"{name!r} does not embed texts: it needs a tokenizer, one input and one output")
        tokenizer, _ = self._text(model, deadline)
        ids = [tokenizer.ids(text) for text in texts]
        batched = len(model.inputs[0].shape) == 2
        found: dict[int, torch.Tensor] = {}
        for length in sorted({len(each) for each in ids}):
            places = [i for i, each in enumerate(ids) if len(each) == length]
            groups = [places] if batched else [[i] for i in places]
            for group in groups:
                x = torch.stack([ids[i] for i in group]) if batched else ids[group[0]]
                y = self.infer(name, x, version=model.version, timeout=deadline - time.monotonic(), receipts=receipts)
                found.update(zip(group, y if batched else [y], strict=True))
        return [found[i].reshape(-1) for i in range(len(ids))]

    def count_tokens(self, name: str, text: str) -> int:
        """How many tokens a text has for a model that was deployed with its tokenizer."""
        deadline = time.monotonic() + LIST_TIMEOUT
        tokenizer, _ = self._text(self._model(name, 0, deadline), deadline)
        return len(tokenizer.ids(text))

    def vocabulary(self, name: str, version: int = 0, *, timeout: float = LIST_TIMEOUT) -> Vocabulary:
        """Tokenizer and chat template of a model, as its owner deployed them. InputError if there are none."""
        deadline = time.monotonic() + timeout
        return self._text(self._model(name, version, deadline), deadline)[1]

    def _text(self, model: Model, deadline: float) -> tuple[Tokenizer, Vocabulary]:
        """The text side of a model, the same from every party."""
        digest = model.vocabulary_digest
        if not digest:
            raise InputError(f"{model.name!r} was deployed without a tokenizer")
        if digest not in self._texts:
            request = party_pb2.VocabularyRequest(model=model.full_name, version=model.version)
            requests = [request] * self._connection.cluster.n
            with self._connection.stream("Vocabulary", requests, timeout=deadline - time.monotonic()) as (parts, _):
                # the parties' listings agree on the digest, so one of them will do
                data = b"".join(part[0].chunk for part in parts)
            if hashlib.sha256(data).hexdigest() != digest:
                raise ProtocolError(f"party/0 answered with another vocabulary of {model.name!r} than it has announced")
            vocabulary = Vocabulary.from_bytes(data)
            self._texts[digest] = Tokenizer.of(vocabulary, model.context or None), vocabulary
        return self._texts[digest]

    def models(self) -> list[Model]:
        """The deployed models, by name and version. AgreementError if the parties hold different ones."""
        return self._connection.models()

    def status(self) -> list[PartyStatus]:
        """How each party is doing, asked over new channels; a party that is down is reported, not raised."""
        return cluster_status(self._connection.cluster, self._connection.identity, demands=self._connection.demands)

    def close(self) -> None:
        """Close the connection; calls in flight fail."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _model(self, name: str, version: int, deadline: float) -> Model:
        """The model with this version. A version never changes, but which one is the newest has to be asked."""
        if (name, version) not in self._models:
            found = self._connection.models(name, timeout=min(deadline - time.monotonic(), LIST_TIMEOUT))
            if version not in (0, *(m.version for m in found)) or not found:
                self._raise_if_damaged(name, version, deadline)
            if not found:
                raise NotFoundError(f"no model {name!r} is deployed here; `mpcinfer models` lists those that are")
            if version and version not in [m.version for m in found]:
                known = ", ".join(str(m.version) for m in found)
                raise NotFoundError(f"model {name!r} has no version {version}, only {known}")
            owners = sorted({m.owner for m in found})
            if len(owners) > 1:
                own = self._connection.identity.role
                if own not in owners:
                    raise InputError(
                        f"several owners have a model {name!r}; name it {' or '.join(m.full_name for m in found)}"
                    )
                found = [m for m in found if m.owner == own]
            chosen = next((m for m in found if m.version == version), found[-1])
            self._models[name, chosen.version] = chosen
            return chosen
        return self._models[name, version]

    def _raise_if_damaged(self, name: str, version: int, deadline: float) -> None:
        """StoreError if a model is missing because a party's copy is damaged: asked for it, the parties say so."""
        nothing = party_pb2.InferRequest(request_id=secrets.token_bytes(16), model=name, version=version)
        left = min(deadline - time.monotonic(), LIST_TIMEOUT)
        try:
            self._connection.call("Infer", [nothing] * self._connection.cluster.n, timeout=left)
        except StoreError:
            raise
        except MpcInferError:
            pass

    def _infer(
        self,
        model: Model,
        inputs: Sequence[Array],
        deadline: float,
        timeout: float,
        audit: Audit | None,
        receipts: list[Receipt] | None,
    ) -> Any:
        parts = cut(model, encode_inputs(model, inputs))
        if audit is None:
            answers = [self._answer(model, part, deadline) for part in parts]
        else:
            answers = [self._audited(model, part, timeout, audit) for part in parts]
        self._proven, self.last_cost = answers[-1], total([each.cost for each in answers])
        if receipts is not None:
            receipts += [each.receipt for each in answers]
        as_torch = any(isinstance(x, torch.Tensor) for x in inputs)
        outputs: list[Array] = []
        for position, spec in enumerate(model.outputs):
            whole = (
                torch.cat([each.outputs[position] for each in answers])
                if len(answers) > 1
                else answers[0].outputs[position]
            )
            # Without fraction bits a value is an index.
            value = (whole.double() / 2.0**spec.frac_bits).float() if spec.frac_bits else whole
            outputs.append(value if as_torch else value.numpy())
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _audited(self, model: Model, inputs: list[torch.Tensor], timeout: float, audit: Audit) -> Answered:
        """One request after the canaries that go before it. Each has the same time from its own beginning: parties
        see how long a caller is going to wait."""
        for canary in audit.examples(model, inputs):
            answered = self._answer(model, list(canary.inputs), time.monotonic() + timeout)
            audit.check_example(canary, answered.outputs)
        return self._answer(model, inputs, time.monotonic() + timeout)

    def _answer(self, model: Model, inputs: list[torch.Tensor], deadline: float) -> Answered:
        """One request, sent once more if a party failed in the middle."""
        connection = self._connection
        try:
            return self._request(model, inputs, deadline)
        except AbortedError as error:
            left = deadline - time.monotonic()
            if left <= 0:
                raise
            try:
                wait_until_ready(connection.cluster, connection.identity, timeout=min(left, _READY_TIMEOUT))
            except MpcInferError as obstacle:
                raise AbortedError(f"{error} ({obstacle})") from error
        return self._request(model, inputs, deadline)

    def _request(self, model: Model, inputs: list[torch.Tensor], deadline: float) -> Answered:
        """Share the encoded inputs, have the model evaluated, add up the shares of the outputs."""
        parties = self._connection.cluster.n
        request_id = secrets.token_bytes(16)
        requests = [
            party_pb2.InferRequest(
                request_id=request_id,
                model=model.full_name,
                version=model.version,
                salt=secrets.token_bytes(SALT_BYTES),
            )
            for _ in range(parties)
        ]
        for spec, x in zip(model.inputs, inputs, strict=True):
            seeds, last = split(x, Ring(spec.ring_bits), parties)
            for request, seed in zip(requests, seeds, strict=False):
                request.inputs.append(_message(spec, x.shape, seed=seed))
            requests[-1].inputs.append(_message(spec, x.shape, data=last.numpy().astype("<i8", copy=False).tobytes()))
        left = deadline - time.monotonic()
        if left <= 0:
            raise DeadlineError("no time left to send the request; allow it more time")
        proof = self._connection.proof(model, requests, [request.inputs for request in requests])
        answers = self._connection.call("Infer", requests, timeout=left)
        if any(answer.version != model.version for answer in answers):
            raise ProtocolError(f"a party answered with another version of model {model.name!r} than was asked for")
        free = free_sizes(model, inputs)
        shapes = [filled(spec.shape, free) for spec in model.outputs]
        outputs = [
            output_of(answers, i, *expected) for i, expected in enumerate(zip(model.outputs, shapes, strict=True))
        ]
        return Answered(outputs, cost_of(answers), proof.check(answers))


def _message(spec: TensorSpec, shape: Sequence[int], **content: bytes) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(shape=shape, frac_bits=spec.frac_bits, ring_bits=spec.ring_bits, **content)
