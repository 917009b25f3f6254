"""Canary sets: inputs whose right answers the model's owner has signed, for clients that check on the parties.

An example is stored as it is shared: integers, in fixed point or indices. A set belongs to one deployment of a model.
Whoever holds the answers can tell which changes of a computation they would not show: keep a set from the parties.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mpcinfer.config import Cluster
from mpcinfer.errors import ConfigError, SignatureError
from mpcinfer.trust.private import write_private
from mpcinfer.trust.signing import Signed, Signer, open_signed

PURPOSE = "canaries"


@dataclass(frozen=True)
class Example:
    """Encoded inputs, and the outputs that belong to them."""

    inputs: tuple[torch.Tensor, ...] = field(repr=False)
    outputs: tuple[torch.Tensor, ...] = field(repr=False)


@dataclass(frozen=True)
class Text:
    """A prompt, and the tokens that greedy choice continues it with."""

    prompt: tuple[int, ...] = field(repr=False)
    tokens: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True)
class CanarySet:
    """What an owner has signed for one deployment of a model.

    tolerances: for each output how far, in units of the last place, an answer may be off.
    """

    model: str
    version: int
    deployment: str
    owner: str
    tolerances: tuple[int, ...] = ()
    examples: tuple[Example, ...] = ()
    texts: tuple[Text, ...] = ()


def sign(signer: Signer, found: CanarySet) -> Signed:
    """The owner's statement."""
    return signer.sign(
        PURPOSE,
        {
            "model": found.model,
            "version": found.version,
            "deployment": found.deployment,
            "tolerances": list(found.tolerances),
            "examples": [
                {
                    "inputs": [_plain(x) for x in each.inputs],
                    "outputs": [_plain(x) for x in each.outputs],
                }
                for each in found.examples
            ],
            "texts": [{"prompt": list(each.prompt), "tokens": list(each.tokens)} for each in found.texts],
        },
    )


def opened(signed: Signed, cluster: Cluster) -> CanarySet:
    """A set that an owner in `cluster` has signed. SignatureError if it was not, or is not well formed."""
    statement = open_signed(signed, cluster, PURPOSE)
    if not statement.role.startswith("owner/"):
        raise SignatureError(f"canaries are signed by a model's owner; these are signed by {statement.role}")
    content = statement.content
    try:
        found = CanarySet(
            model=str(content["model"]),
            version=int(content["version"]),
            deployment=str(content["deployment"]),
            owner=statement.role,
            tolerances=_integers(content["tolerances"]),
            examples=tuple(_example(**each) for each in content["examples"]),
            texts=tuple(Text(_integers(each["prompt"]), _integers(each["tokens"])) for each in content["texts"]),
        )
        if (
            any(len(each.outputs) != len(found.tolerances) for each in found.examples)
            or min(found.tolerances, default=0) < 0
        ):
            raise ValueError("a tolerance for each output")
        return found
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise SignatureError(
            f"{statement.role} has signed something else than canaries; have them made anew"
        ) from error


def write(signed: Signed, path: Path) -> None:
    """Write a set for `read`. ConfigError if that fails."""
    try:
        write_private(path, json.dumps(signed.to_json()).encode())
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def read(path: Path, cluster: Cluster) -> CanarySet:
    """The set in a file. ConfigError if there is none, SignatureError as `opened`."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not a text'}") from error
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SignatureError(f"{path} holds no signed statement: get the canaries again from the owner") from error
    return opened(Signed.from_json(data), cluster)


def _plain(x: torch.Tensor) -> dict[str, Any]:
    return {"shape": list(x.shape), "data": x.flatten().tolist()}


def _example(inputs: Sequence[Any], outputs: Sequence[Any]) -> Example:
    return Example(tuple(map(_tensor, inputs)), tuple(map(_tensor, outputs)))


def _tensor(plain: Any) -> torch.Tensor:
    shape, data = _integers(plain["shape"]), _integers(plain["data"])
    if len(data) != math.prod(shape):
        raise ValueError("not its shape")
    return torch.tensor(data, dtype=torch.int64).reshape(shape)


def _integers(x: Sequence[Any]) -> tuple[int, ...]:
    if not isinstance(x, list) or not all(type(item) is int for item in x):
        raise TypeError("not integers")
    return tuple(x)
