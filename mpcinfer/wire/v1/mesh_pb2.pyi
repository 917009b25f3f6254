from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FrameKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FRAME_KIND_UNSPECIFIED: _ClassVar[FrameKind]
    FRAME_KIND_HELLO: _ClassVar[FrameKind]
    FRAME_KIND_CONTROL: _ClassVar[FrameKind]
    FRAME_KIND_OPENING: _ClassVar[FrameKind]
FRAME_KIND_UNSPECIFIED: FrameKind
FRAME_KIND_HELLO: FrameKind
FRAME_KIND_CONTROL: FrameKind
FRAME_KIND_OPENING: FrameKind

class CorrectionsRequest(_message.Message):
    __slots__ = ("session", "tape", "chunk")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TAPE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    tape: bytes
    chunk: bytes
    def __init__(self, session: _Optional[bytes] = ..., tape: _Optional[bytes] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class CorrectionsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ConnectRequest(_message.Message):
    __slots__ = ("frame",)
    FRAME_FIELD_NUMBER: _ClassVar[int]
    frame: Frame
    def __init__(self, frame: _Optional[_Union[Frame, _Mapping]] = ...) -> None: ...

class ConnectResponse(_message.Message):
    __slots__ = ("frame",)
    FRAME_FIELD_NUMBER: _ClassVar[int]
    frame: Frame
    def __init__(self, frame: _Optional[_Union[Frame, _Mapping]] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("sequence", "kind", "more", "payload")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    kind: FrameKind
    more: bool
    payload: bytes
    def __init__(self, sequence: _Optional[int] = ..., kind: _Optional[_Union[FrameKind, str]] = ..., more: bool = ..., payload: _Optional[bytes] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_version", "cluster_digest", "index", "session", "nonce", "direct_port", "direct_token")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    DIRECT_PORT_FIELD_NUMBER: _ClassVar[int]
    DIRECT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    cluster_digest: bytes
    index: int
    session: bytes
    nonce: bytes
    direct_port: int
    direct_token: bytes
    def __init__(self, protocol_version: _Optional[int] = ..., cluster_digest: _Optional[bytes] = ..., index: _Optional[int] = ..., session: _Optional[bytes] = ..., nonce: _Optional[bytes] = ..., direct_port: _Optional[int] = ..., direct_token: _Optional[bytes] = ...) -> None: ...

class Direct(_message.Message):
    __slots__ = ("connected",)
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    connected: bool
    def __init__(self, connected: bool = ...) -> None: ...
