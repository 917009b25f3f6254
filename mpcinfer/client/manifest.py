"""What the parties must show before anything is sent to them: found on disk, asked of them, checked."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc

from mpcinfer.client.locate import AnyPath, cluster_file
from mpcinfer.config import Cluster
from mpcinfer.errors import ManifestError, UnsupportedError
from mpcinfer.trust.manifest import NONCE_BYTES
from mpcinfer.trust.pin import Pin
from mpcinfer.trust.signing import Signed
from mpcinfer.wire import channel
from mpcinfer.wire.v1 import party_pb2

PIN_NAME = "manifest.pin"
PIN_VARIABLE = "MPCINFER_PIN"
COLLATERAL_VARIABLE = "MPCINFER_COLLATERAL"


@dataclass(frozen=True)
class Demands:
    """What is asked of the parties: to be as pinned (None: they need not be).

    `collateral` is where what some kinds of evidence are checked with is to be had; see `trust.evidence.Expected`.
    """

    pin: Pin | None = None
    collateral: str = field(default="", repr=False)

    @staticmethod
    def find(cluster: AnyPath | Cluster, pin: AnyPath | None = None) -> Demands:
        """The pin in this file, else in MPCINFER_PIN, else in `manifest.pin` beside the cluster file if it is there.

        ConfigError if one that was named is not there, or what is there is no pin.
        """
        named = pin or os.environ.get(PIN_VARIABLE)
        beside = None if isinstance(cluster, Cluster) else pin_file(cluster)
        file = Path(named) if named else beside if beside is not None and beside.exists() else None
        return replace(Demands.unpinned(), pin=None if file is None else Pin.load(file))

    @staticmethod
    def unpinned() -> Demands:
        """What is asked of parties that are seen for the first time."""
        return Demands(None, os.environ.get(COLLATERAL_VARIABLE, ""))


def pin_file(cluster: AnyPath) -> Path:
    """Where the pin is kept: MPCINFER_PIN, else beside the cluster file."""
    return Path(os.environ.get(PIN_VARIABLE) or cluster_file(cluster).parent / PIN_NAME)


def fresh_nonce() -> bytes:
    """What a statement is asked for with: each connection draws its own."""
    return secrets.token_bytes(NONCE_BYTES)


def ask(stub: Any, nonce: bytes, who: str, timeout: float) -> Signed:
    """A party's statement, not checked yet. Raises grpc.RpcError, or ManifestError if it does not know the question."""
    try:
        answer: party_pb2.ManifestResponse = stub.Manifest(party_pb2.ManifestRequest(nonce=nonce), timeout=timeout)
    except grpc.RpcError as error:
        if isinstance(channel.from_rpc_error(error, who), UnsupportedError):
            raise ManifestError(f"{who} signs no manifest: it runs an older release; have it upgraded") from error
        raise
    return Signed.of(answer.statement)
