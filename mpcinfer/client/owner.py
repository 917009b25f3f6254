"""The model owner's side: turn a network into a Program and shares of its weights, and hand them to the parties."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from mpcinfer.client.cluster import CONNECT_TIMEOUT, LIST_TIMEOUT, Connection
from mpcinfer.client.examples import captured_model
from mpcinfer.client.locate import AnyPath
from mpcinfer.client.model import Model
from mpcinfer.config import Cluster
from mpcinfer.errors import AgreementError, ForbiddenError, NotFoundError
from mpcinfer.graph.capture import Captured, capture
from mpcinfer.models.decoder import Decoder
from mpcinfer.models.load import load
from mpcinfer.models.vocabulary import Vocabulary
from mpcinfer.ring.domain import Z64
from mpcinfer.ring.sharing import split
from mpcinfer.trust.canaries import sign
from mpcinfer.trust.commitment import SALT_BYTES
from mpcinfer.trust.grant import Commitment, Grant, Terms, open_grant
from mpcinfer.trust.signing import Signed, Signer
from mpcinfer.wire.identity import Identity
from mpcinfer.wire.v1 import party_pb2

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

Progress = Callable[[int, int], None]

DEPLOY_TIMEOUT = 1800.0
# what is short in itself, but waits for its turn: for the steps, and the tape under way, of others
TURN_TIMEOUT = 300.0
EVERYBODY = Terms()
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Deployed:
    """A model that all parties have committed: what to call it, and how many secret parameters it has."""

    name: str
    version: int
    deployment_id: str
    parameters: int
    reveal: str


class ModelOwner:
    """What a model owner holds: a connection to all parties of a cluster."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._signer = Signer(connection.identity)

    @classmethod
    def connect(
        cls,
        cluster: AnyPath | Cluster,
        identity: AnyPath | Identity | None = None,
        *,
        timeout: float = CONNECT_TIMEOUT,
        pin: AnyPath | None = None,
    ) -> Self:
        """Connect to all parties, checking who they are.

        cluster: the cluster file, or the directory it is in. identity: which key pair to use (see `locate.locate`);
        by default the only `owner-*` pair beside the cluster file. pin: as for `Client.connect`.
        """
        return cls(Connection.to(cluster, identity, roles=("owner",), timeout=timeout, pin=pin))

    @property
    def parties(self) -> int:
        """How many parties hold a share of each model."""
        return self._connection.cluster.n

    def deploy(
        self,
        model: nn.Module | ExportedProgram,
        example_inputs: torch.Tensor | Sequence[torch.Tensor] = (),
        *,
        name: str,
        frac_bits: int = 16,
        reveal: str = "logits",
        k: int = 5,
        public: Sequence[str] = (),
        dynamic_shapes: Any = None,
        grant: Terms = EVERYBODY,
        progress: Progress | None = None,
        timeout: float = DEPLOY_TIMEOUT,
    ) -> Deployed:
        """Share the weights of `model` among the parties; a name that exists gets a new version.

        example_inputs: a tensor per argument of the model (none for an ExportedProgram, which has its own), as large as
        real ones: from them, and the weights, comes the limit that clients' inputs must stay below.
        reveal: what clients learn: "logits", "probabilities", "top-k" (the indices of the `k` largest) or "argmax".
        dynamic_shapes: the sizes that stay free, as `torch.export` takes them (by default the batch, where the model
        allows it); one called "batch" says that rows do not influence each other. frac_bits: precision, 8 to 24.
        public: names of constants that are no secret. grant: who may use it, how often and until when; by default all
        clients of the cluster, without a limit. progress: called with (bytes sent, bytes to send), from another
        thread. timeout in seconds, for the upload and the parties' preparations.
        The model is on all parties after this, or on none. Raises what `graph.capture.capture` does for a model that
        cannot be evaluated, InputError for a name the parties refuse, and UnavailableError if a party fails.
        """
        examples = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
        captured = capture(
            model, examples, frac_bits=frac_bits, reveal=reveal, k=k, public=public, dynamic_shapes=dynamic_shapes
        )
        return self.upload(captured, name=name, grant=grant, progress=progress, timeout=timeout)

    def deploy_file(
        self,
        path: AnyPath,
        *,
        name: str,
        context: int | None = None,
        task: str | None = None,
        frac_bits: int = 16,
        reveal: str = "",
        grant: Terms = EVERYBODY,
        progress: Progress | None = None,
        timeout: float = DEPLOY_TIMEOUT,
    ) -> Deployed:
        """Deploy a model as it lies on disk, with its tokenizer: what `models.load` knows that takes ids of a text.

        reveal: by default "tokens" for a language model, "logits" for others. context: how many tokens a language
        model's text and answer may have at most. Else as `deploy`.
        """
        loaded = load(Path(path), task=task, context=context)
        captured = captured_model(loaded, frac_bits=frac_bits, reveal=reveal)
        return self.upload(
            captured, name=name, vocabulary=loaded.words(), grant=grant, progress=progress, timeout=timeout
        )

    def upload(
        self,
        captured: Captured,
        *,
        name: str,
        vocabulary: Vocabulary | None = None,
        grant: Terms = EVERYBODY,
        progress: Progress | None = None,
        timeout: float = DEPLOY_TIMEOUT,
    ) -> Deployed:
        """Share what `graph.capture.capture` made of a model, whose weights are taken out of it; else as `deploy`.

        vocabulary: what clients need to turn text into the model's tokens; public.
        """
        program = captured.program
        granted = Grant.first(
            name,
            program=program.digest(),
            entry_point="generate" if program.caches else "infer",
            reveals=program.reveal,
            cluster=self._connection.cluster,
            terms=grant,
        )
        upload = _Upload(captured, granted, self._signer, vocabulary, self._connection.cluster, progress)
        try:
            answers = self._connection.call("Deploy", upload.streams(), timeout=timeout)
        except Exception:
            if upload.interrupted is not None:
                raise upload.interrupted from None
            raise
        if len({(answer.name, answer.version, answer.deployment_id) for answer in answers}) > 1:
            raise AgreementError(f"the parties disagree about what {name!r} was deployed as; deploy it again")
        first = answers[0]
        return Deployed(
            first.name, first.version, first.deployment_id.hex(), captured.program.size, captured.program.reveal
        )

    def canaries(
        self,
        name: str,
        model: nn.Module | ExportedProgram,
        inputs: Sequence[torch.Tensor | Sequence[torch.Tensor]],
        *,
        version: int = 0,
        max_new_tokens: int = 32,
        **judged: float,
    ) -> Signed:
        """Inputs with their right answers, signed, for clients that check on the parties; see `client.canaries`.

        model: as it was deployed as `name` (version 0: the newest). inputs: of each canary one tensor, or one per
        input; of a language model the ids of prompts, continued by up to `max_new_tokens` tokens. judged: margin,
        tolerance. Nothing is sent. Write it with `trust.canaries.write` and give it to clients, not to the parties.
        """
        from mpcinfer.client.canaries import from_examples, from_prompts

        found = [m for m in self._connection.models(name) if version in (0, m.version)]
        if not found:
            raise NotFoundError(f"no model {name!r} of this version is deployed here")
        found = [m for m in found if m.owner == self._connection.identity.role] or found
        if found[-1].owner != self._connection.identity.role:
            raise ForbiddenError(f"clients take canaries of {name!r} from {found[-1].owner} alone")
        if isinstance(model, Decoder):
            prompts = [torch.as_tensor(ids).flatten().tolist() for ids in inputs]
            made = from_prompts(found[-1], model, prompts, max_new_tokens, **judged)
        else:
            made = from_examples(found[-1], model, inputs, **judged)
        return sign(self._signer, made)

    def remove(self, name: str, version: int = 0, *, timeout: float = TURN_TIMEOUT) -> int:
        """Remove a version of a model (0: all versions) from all parties: how many were removed.

        Every party has confirmed it once this returns. NotFoundError if there is none, AgreementError if the parties
        confirm different numbers.
        """
        request = party_pb2.RemoveModelRequest(request_id=secrets.token_bytes(16), name=name, version=version)
        answers = self._connection.call("RemoveModel", [request] * self.parties, timeout=timeout)
        return _confirmed("removed", name, [answer.removed for answer in answers])

    def refresh(self, name: str, version: int = 0, *, timeout: float = DEPLOY_TIMEOUT) -> int:
        """Have the parties make the shares of a version of a model (0: all versions) anew: of how many they have.

        The model stays what it is, with its grant; shares stolen before are of no use with others stolen after.
        Whoever connects with a party's key may ask for it too, of any owner's model. NotFoundError if there is none.
        """
        request = party_pb2.RefreshModelRequest(request_id=secrets.token_bytes(16), name=name, version=version)
        answers = self._connection.call("RefreshModel", [request] * self.parties, timeout=timeout)
        return _confirmed("refreshed", name, [answer.refreshed for answer in answers])

    def grant(self, name: str, terms: Terms, version: int = 0, *, timeout: float = TURN_TIMEOUT) -> list[Grant]:
        """Replace what is granted for a version of one's model (0: all versions), from the next request on.

        NotFoundError if there is none.
        """
        return self._replace(name, version, timeout, terms=terms, revoked=False)

    def grant_again(self, name: str, version: int = 0, *, timeout: float = TURN_TIMEOUT) -> list[Grant]:
        """The same terms for the parties as the cluster file has them now, after one of them or its key was replaced.

        Not for versions that are revoked, or granted to these parties as it is. NotFoundError if there is none.
        """
        cluster = self._connection.cluster
        return self._replace(name, version, timeout, lambda g: not g.revoked and not g.holds_for(cluster))

    def revoke(self, name: str, version: int = 0, *, timeout: float = TURN_TIMEOUT) -> list[Grant]:
        """Nobody may use a version of one's model (0: all versions) any more, until it is granted again."""
        return self._replace(name, version, timeout, revoked=True)

    def grants(self, name: str, version: int = 0, *, timeout: float = LIST_TIMEOUT) -> dict[int, Grant]:
        """What oneself has granted, by version; what the parties show is verified. NotFoundError if there is none.

        It may be for parties that have been replaced since (see `Grant.holds_for`): these serve nothing by it.
        """
        cluster, role = self._connection.cluster, self._connection.identity.role
        answers = self._connection.call("ListModels", [party_pb2.ListModelsRequest()] * cluster.n, timeout=timeout)
        found: dict[int, Grant] = {}
        for info in (info for answer in answers for info in answer.models):
            if info.owner != role or info.name != name or version not in (0, info.version):
                continue
            granted = open_grant(Signed.of(info.grant), cluster, role, past=True, elsewhere=True)
            if info.version not in found or granted.serial > found[info.version].serial:
                found[info.version] = granted
        if not found:
            raise NotFoundError(f"{role} has no model {name!r}{f' version {version}' if version else ''} here")
        return found

    def serves(self, grant: Grant) -> bool:
        """Whether the parties as they are now may serve by it, its terms permitting."""
        return grant.holds_for(self._connection.cluster)

    def salt(self, name: str, version: int) -> bytes:
        """What the commitment to a version's weights is salted with. Shown to somebody with the weights, it proves
        that these are the ones; to anybody else it lets guesses be confirmed.
        """
        return self.grants(name, version)[version].salt(self._signer)

    def _replace(
        self, name: str, version: int, timeout: float, which: Callable[[Grant], bool] = lambda _: True, **changes: Any
    ) -> list[Grant]:
        parties, replaced = self._connection.cluster.n, []
        for number, granted in sorted(self.grants(name, version, timeout=timeout).items()):
            if not which(granted):
                continue
            replaced.append(granted.replaced(**changes).given_to(self._connection.cluster))
            request = party_pb2.SetGrantRequest(
                request_id=secrets.token_bytes(16),
                name=name,
                version=number,
                grant=replaced[-1].sign(self._signer).message(),
            )
            self._connection.call("SetGrant", [request] * parties, timeout=timeout)
        return replaced

    def models(self) -> list[Model]:
        """The deployed models, by name and version. AgreementError if the parties hold different ones."""
        return self._connection.models()

    def close(self) -> None:
        """Close the connection; calls in flight fail."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _confirmed(what: str, name: str, counts: Sequence[int]) -> int:
    """How many versions all parties say that they have done it to."""
    if len(set(counts)) > 1 or not counts[0]:
        said = ", ".join(f"party {index} {count}" for index, count in enumerate(counts))
        raise AgreementError(f"the parties have {what} different numbers of versions of {name!r}: {said}; try again")
    return counts[0]


def _bytes(encoded: torch.Tensor) -> memoryview:
    array: np.ndarray[Any, Any] = encoded.contiguous().numpy().astype("<i8", copy=False)
    return array.reshape(-1).view(np.uint8).data


class _Upload:
    """The shares of one model: a seed per weight for all parties but the last, which gets the bytes."""

    def __init__(
        self,
        captured: Captured,
        grant: Grant,
        signer: Signer,
        vocabulary: Vocabulary | None,
        cluster: Cluster,
        progress: Progress | None,
    ) -> None:
        parties = cluster.n
        self._holders = [endpoint.index for endpoint in cluster.holders]
        self.interrupted: BaseException | None = None
        self._progress = progress
        self._shares: list[memoryview] = []
        self._headers = [
            party_pb2.DeployHeader(
                name=grant.name,
                program=captured.program.to_bytes(),
                digest=hashlib.sha256().digest(),
                vocabulary=vocabulary.to_bytes() if vocabulary is not None else b"",
                salt=secrets.token_bytes(SALT_BYTES),
            )
            for _ in range(parties)
        ]
        request_id, digest = secrets.token_bytes(16), hashlib.sha256()
        for header in self._headers:
            header.request_id = request_id
        commitment = Commitment(grant.salt(signer))
        for parameter in captured.program.parameters:
            weight = captured.weights.pop(parameter.name)
            commitment.add(parameter.name, _bytes(weight))
            seeds, last = split(weight, Z64, parties)
            for header, seed in zip(self._headers, [*seeds, b""], strict=True):
                header.weights.add(name=parameter.name, shape=parameter.shape, frac_bits=parameter.frac_bits, seed=seed)
            self._shares.append(_bytes(last))
            digest.update(self._shares[-1])
        self.size = sum(len(share) for share in self._shares)
        signed = replace(grant, model=commitment.hex()).sign(signer).message()
        for header in self._headers:
            header.grant.CopyFrom(signed)
        self._headers[-1].size, self._headers[-1].digest = self.size, digest.digest()

    def streams(self) -> list[Iterator[party_pb2.DeployRequest]]:
        """What to send to each party, and to each witness what its party is sent."""
        heads = [[party_pb2.DeployRequest(header=header)] for header in self._headers]
        last = len(heads) - 1
        return [
            self._chunks(reported=place == last) if index == last else iter(heads[index])
            for place, index in enumerate(self._holders)
        ]

    def _chunks(self, *, reported: bool) -> Iterator[party_pb2.DeployRequest]:
        sent = 0
        try:
            yield party_pb2.DeployRequest(header=self._headers[-1])
            self._report(0, reported=reported)
            for share in self._shares:
                for start in range(0, len(share), _CHUNK):
                    chunk = share[start : start + _CHUNK]
                    yield party_pb2.DeployRequest(chunk=bytes(chunk))
                    sent += len(chunk)
                    self._report(sent, reported=reported)
        except GeneratorExit:
            raise
        except BaseException as error:  # of `progress`; gRPC would only say that the stream broke
            self.interrupted = error
            raise

    def _report(self, sent: int, *, reported: bool) -> None:
        if self._progress is not None and reported:
            self._progress(sent, self.size)
