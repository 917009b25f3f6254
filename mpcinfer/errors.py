"""Every error mpcinfer raises on purpose, as one tree, mapped once to gRPC status names and HTTP codes.

    MpcInferError
    +-- InputError               what the caller handed in is wrong            INVALID_ARGUMENT     400
    |   +-- ShapeError
    |   +-- DtypeError
    |   +-- RangeError           NaN, infinite, or outside the fixed-point range
    |   +-- UploadError          truncated or corrupted upload
    |   +-- ContextLengthError   a text longer than the model or the session takes
    +-- UnsupportedError         an operator without a protocol, or a feature  UNIMPLEMENTED        501
    +-- NotFoundError            unknown model or version                      NOT_FOUND            404
    +-- ConflictError            already there, or being changed               ALREADY_EXISTS       409
    +-- IdentityError            certificate missing, wrong, expired, unpinned UNAUTHENTICATED      401
    |   +-- ForbiddenError       the identity is known but may not do this     PERMISSION_DENIED    403
    |   |   +-- GrantError       not what the model's owner has granted
    |   |   +-- BudgetError      granted, and used up
    |   +-- SignatureError       a signed statement is missing, forged or altered
    |   +-- ManifestError        the parties are not what was pinned
    +-- ConfigError              a configuration or cluster file is wrong      FAILED_PRECONDITION  412
    |   +-- AgreementError       parties disagree (protocol version, cluster, model, request)
    +-- StoreError               a file at rest is damaged or unreadable       DATA_LOSS            500
    +-- BusyError                admission limit reached                       RESOURCE_EXHAUSTED   429
    +-- DeadlineError            not finished in time                          DEADLINE_EXCEEDED    504
    +-- UnavailableError         a party or the dealer cannot be reached       UNAVAILABLE          503
    |   +-- AbortedError         a peer failed in the middle; nothing leaked, retry   ABORTED       503
    +-- ProtocolError            a bug or an attack: a rule of the protocol broke     INTERNAL      500
        +-- TamperingError       somebody computed something else, and was caught

A message names the cause and the remedy. It never contains a secret: values, shares and seeds are not formatted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar


class MpcInferError(Exception):
    """Base of all errors raised on purpose; `grpc_status` and `http_status` say how it travels."""

    grpc_status: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500

    def __init__(self, message: str = "") -> None:
        """message: a text, so that nothing else is ever turned into one here."""
        super().__init__(message)


class InputError(MpcInferError):
    """What the caller handed in is wrong; retrying without a change fails again."""

    grpc_status = "INVALID_ARGUMENT"
    http_status = 400


class ShapeError(InputError):
    """A tensor has another shape than the model declares."""


class DtypeError(InputError):
    """A tensor has a dtype that cannot be encoded."""


class RangeError(InputError):
    """A value is NaN, infinite, or outside the fixed-point range."""


class UploadError(InputError):
    """An upload is truncated, corrupted or inconsistent with its header."""


class ContextLengthError(InputError):
    """A prompt with its answer is longer than the model, or a party's memory for one session, takes."""


class UnsupportedError(MpcInferError):
    """An operator or a feature for which there is no protocol; `missing` has all such operators, and where they are."""

    def __init__(self, message: str = "", missing: Mapping[str, Sequence[str]] | None = None) -> None:
        super().__init__(message)
        self.missing = dict(missing or {})

    grpc_status = "UNIMPLEMENTED"
    http_status = 501


class NotFoundError(MpcInferError):
    """Unknown model or version."""

    grpc_status = "NOT_FOUND"
    http_status = 404


class ConflictError(MpcInferError):
    """The thing exists already or is being changed."""

    grpc_status = "ALREADY_EXISTS"
    http_status = 409


class IdentityError(MpcInferError):
    """A certificate is missing, wrong, expired, or not the pinned one."""

    grpc_status = "UNAUTHENTICATED"
    http_status = 401


class ForbiddenError(IdentityError):
    """The identity is known but its role may not do this."""

    grpc_status = "PERMISSION_DENIED"
    http_status = 403


class GrantError(ForbiddenError):
    """The model's owner has not granted this: another client, entry point, time or place, or it was revoked."""


class BudgetError(ForbiddenError):
    """What the owner has granted for this period is used up."""


class SignatureError(IdentityError):
    """A signed statement is missing, forged, altered or meant for something else."""


class ManifestError(IdentityError):
    """The parties are not, or do not run, what was pinned, or cannot prove it."""


class ConfigError(MpcInferError):
    """A configuration or cluster file is wrong."""

    grpc_status = "FAILED_PRECONDITION"
    http_status = 412


class AgreementError(ConfigError):
    """Parties disagree on something all must agree on."""


class StoreError(MpcInferError):
    """A file at rest is damaged or cannot be decrypted."""

    grpc_status = "DATA_LOSS"


class BusyError(MpcInferError):
    """The admission limit is reached; try again later."""

    grpc_status = "RESOURCE_EXHAUSTED"
    http_status = 429


class DeadlineError(MpcInferError):
    """Not finished in the time allowed."""

    grpc_status = "DEADLINE_EXCEEDED"
    http_status = 504


class UnavailableError(MpcInferError):
    """A party or the dealer cannot be reached."""

    grpc_status = "UNAVAILABLE"
    http_status = 503


class AbortedError(UnavailableError):
    """A peer failed in the middle of the work; its correlations are burnt and the request may be sent again."""

    grpc_status = "ABORTED"


class ProtocolError(MpcInferError):
    """A rule of the protocol was broken: a bug or an attack, never a user's mistake."""


class TamperingError(ProtocolError):
    """Somebody has computed something else than was agreed on, and was caught."""
