from mpcinfer.wire.v1 import trust_pb2 as _trust_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WitnessRequest(_message.Message):
    __slots__ = ("session", "index", "cluster_digest", "protocol_version")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    index: int
    cluster_digest: bytes
    protocol_version: int
    def __init__(self, session: _Optional[bytes] = ..., index: _Optional[int] = ..., cluster_digest: _Optional[bytes] = ..., protocol_version: _Optional[int] = ...) -> None: ...

class WitnessResponse(_message.Message):
    __slots__ = ("key", "nonce", "party_nonces")
    KEY_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PARTY_NONCES_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    nonce: bytes
    party_nonces: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, key: _Optional[bytes] = ..., nonce: _Optional[bytes] = ..., party_nonces: _Optional[_Iterable[bytes]] = ...) -> None: ...

class CorrectedRequest(_message.Message):
    __slots__ = ("session", "index", "tape")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TAPE_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    index: int
    tape: bytes
    def __init__(self, session: _Optional[bytes] = ..., index: _Optional[int] = ..., tape: _Optional[bytes] = ...) -> None: ...

class CorrectedResponse(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    def __init__(self, digest: _Optional[bytes] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("session", "index", "nonce", "public_key", "cluster_digest", "protocol_version")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    index: int
    nonce: bytes
    public_key: bytes
    cluster_digest: bytes
    protocol_version: int
    def __init__(self, session: _Optional[bytes] = ..., index: _Optional[int] = ..., nonce: _Optional[bytes] = ..., public_key: _Optional[bytes] = ..., cluster_digest: _Optional[bytes] = ..., protocol_version: _Optional[int] = ...) -> None: ...

class JoinResponse(_message.Message):
    __slots__ = ("nonce", "public_key", "party_nonces")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    PARTY_NONCES_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    public_key: bytes
    party_nonces: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, nonce: _Optional[bytes] = ..., public_key: _Optional[bytes] = ..., party_nonces: _Optional[_Iterable[bytes]] = ...) -> None: ...

class DealRequest(_message.Message):
    __slots__ = ("session", "index", "tape", "plan_digest", "plan", "caches", "signed", "beside")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TAPE_FIELD_NUMBER: _ClassVar[int]
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    CACHES_FIELD_NUMBER: _ClassVar[int]
    SIGNED_FIELD_NUMBER: _ClassVar[int]
    BESIDE_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    index: int
    tape: bytes
    plan_digest: bytes
    plan: bytes
    caches: CacheUse
    signed: bool
    beside: _containers.RepeatedCompositeFieldContainer[CacheUse]
    def __init__(self, session: _Optional[bytes] = ..., index: _Optional[int] = ..., tape: _Optional[bytes] = ..., plan_digest: _Optional[bytes] = ..., plan: _Optional[bytes] = ..., caches: _Optional[_Union[CacheUse, _Mapping]] = ..., signed: bool = ..., beside: _Optional[_Iterable[_Union[CacheUse, _Mapping]]] = ...) -> None: ...

class CacheUse(_message.Message):
    __slots__ = ("slot", "runs", "count", "times")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    slot: bytes
    runs: _containers.RepeatedScalarFieldContainer[int]
    count: int
    times: int
    def __init__(self, slot: _Optional[bytes] = ..., runs: _Optional[_Iterable[int]] = ..., count: _Optional[int] = ..., times: _Optional[int] = ...) -> None: ...

class ForgetRequest(_message.Message):
    __slots__ = ("session", "slots", "deployment")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    slots: _containers.RepeatedScalarFieldContainer[bytes]
    deployment: str
    def __init__(self, session: _Optional[bytes] = ..., slots: _Optional[_Iterable[bytes]] = ..., deployment: _Optional[str] = ...) -> None: ...

class ForgetResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DealResponse(_message.Message):
    __slots__ = ("chunk", "statement")
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    STATEMENT_FIELD_NUMBER: _ClassVar[int]
    chunk: bytes
    statement: _trust_pb2.Signed
    def __init__(self, chunk: _Optional[bytes] = ..., statement: _Optional[_Union[_trust_pb2.Signed, _Mapping]] = ...) -> None: ...

class DealerStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DealerStatusResponse(_message.Message):
    __slots__ = ("package_version", "tapes", "bytes_sent", "seconds_dealing", "uptime_seconds", "session_ready")
    PACKAGE_VERSION_FIELD_NUMBER: _ClassVar[int]
    TAPES_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_DEALING_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SESSION_READY_FIELD_NUMBER: _ClassVar[int]
    package_version: str
    tapes: int
    bytes_sent: int
    seconds_dealing: float
    uptime_seconds: float
    session_ready: bool
    def __init__(self, package_version: _Optional[str] = ..., tapes: _Optional[int] = ..., bytes_sent: _Optional[int] = ..., seconds_dealing: _Optional[float] = ..., uptime_seconds: _Optional[float] = ..., session_ready: bool = ...) -> None: ...
