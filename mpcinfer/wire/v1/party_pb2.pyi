from mpcinfer.wire.v1 import tensor_pb2 as _tensor_pb2
from mpcinfer.wire.v1 import trust_pb2 as _trust_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("index", "parties", "protocol_version", "cluster_digest", "package_version", "state", "detail", "requests_done", "requests_failed", "requests_waiting", "uptime_seconds", "models", "runs_ready")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    PARTIES_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PACKAGE_VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_DONE_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FAILED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_WAITING_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    RUNS_READY_FIELD_NUMBER: _ClassVar[int]
    index: int
    parties: int
    protocol_version: int
    cluster_digest: bytes
    package_version: str
    state: str
    detail: str
    requests_done: int
    requests_failed: int
    requests_waiting: int
    uptime_seconds: float
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    runs_ready: int
    def __init__(self, index: _Optional[int] = ..., parties: _Optional[int] = ..., protocol_version: _Optional[int] = ..., cluster_digest: _Optional[bytes] = ..., package_version: _Optional[str] = ..., state: _Optional[str] = ..., detail: _Optional[str] = ..., requests_done: _Optional[int] = ..., requests_failed: _Optional[int] = ..., requests_waiting: _Optional[int] = ..., uptime_seconds: _Optional[float] = ..., models: _Optional[_Iterable[_Union[ModelInfo, _Mapping]]] = ..., runs_ready: _Optional[int] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "version", "deployment_id", "owner", "inputs", "outputs", "reveal", "created_unix_seconds", "parameters", "sizes", "context", "vocabulary_digest", "grant")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    REVEAL_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    deployment_id: bytes
    owner: str
    inputs: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TensorSpec]
    outputs: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TensorSpec]
    reveal: str
    created_unix_seconds: float
    parameters: int
    sizes: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.Size]
    context: int
    vocabulary_digest: bytes
    grant: _trust_pb2.Signed
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., deployment_id: _Optional[bytes] = ..., owner: _Optional[str] = ..., inputs: _Optional[_Iterable[_Union[_tensor_pb2.TensorSpec, _Mapping]]] = ..., outputs: _Optional[_Iterable[_Union[_tensor_pb2.TensorSpec, _Mapping]]] = ..., reveal: _Optional[str] = ..., created_unix_seconds: _Optional[float] = ..., parameters: _Optional[int] = ..., sizes: _Optional[_Iterable[_Union[_tensor_pb2.Size, _Mapping]]] = ..., context: _Optional[int] = ..., vocabulary_digest: _Optional[bytes] = ..., grant: _Optional[_Union[_trust_pb2.Signed, _Mapping]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelInfo, _Mapping]]] = ...) -> None: ...

class DeployRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: DeployHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[DeployHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class DeployHeader(_message.Message):
    __slots__ = ("request_id", "name", "program", "weights", "size", "digest", "vocabulary", "grant", "salt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    request_id: bytes
    name: str
    program: bytes
    weights: _containers.RepeatedCompositeFieldContainer[WeightShare]
    size: int
    digest: bytes
    vocabulary: bytes
    grant: _trust_pb2.Signed
    salt: bytes
    def __init__(self, request_id: _Optional[bytes] = ..., name: _Optional[str] = ..., program: _Optional[bytes] = ..., weights: _Optional[_Iterable[_Union[WeightShare, _Mapping]]] = ..., size: _Optional[int] = ..., digest: _Optional[bytes] = ..., vocabulary: _Optional[bytes] = ..., grant: _Optional[_Union[_trust_pb2.Signed, _Mapping]] = ..., salt: _Optional[bytes] = ...) -> None: ...

class WeightShare(_message.Message):
    __slots__ = ("name", "shape", "frac_bits", "seed")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    FRAC_BITS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    frac_bits: int
    seed: bytes
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., frac_bits: _Optional[int] = ..., seed: _Optional[bytes] = ...) -> None: ...

class DeployResponse(_message.Message):
    __slots__ = ("name", "version", "deployment_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DEPLOYMENT_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    deployment_id: bytes
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., deployment_id: _Optional[bytes] = ...) -> None: ...

class RemoveModelRequest(_message.Message):
    __slots__ = ("request_id", "name", "version")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    request_id: bytes
    name: str
    version: int
    def __init__(self, request_id: _Optional[bytes] = ..., name: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class RemoveModelResponse(_message.Message):
    __slots__ = ("removed",)
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    removed: int
    def __init__(self, removed: _Optional[int] = ...) -> None: ...

class InferRequest(_message.Message):
    __slots__ = ("request_id", "model", "version", "inputs", "salt", "token")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    request_id: bytes
    model: str
    version: int
    inputs: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.Tensor]
    salt: bytes
    token: str
    def __init__(self, request_id: _Optional[bytes] = ..., model: _Optional[str] = ..., version: _Optional[int] = ..., inputs: _Optional[_Iterable[_Union[_tensor_pb2.Tensor, _Mapping]]] = ..., salt: _Optional[bytes] = ..., token: _Optional[str] = ...) -> None: ...

class InferResponse(_message.Message):
    __slots__ = ("outputs", "version", "online", "offline", "receipt", "commitment")
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ONLINE_FIELD_NUMBER: _ClassVar[int]
    OFFLINE_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    COMMITMENT_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.Tensor]
    version: int
    online: _tensor_pb2.PhaseCost
    offline: _tensor_pb2.PhaseCost
    receipt: _trust_pb2.Signed
    commitment: bytes
    def __init__(self, outputs: _Optional[_Iterable[_Union[_tensor_pb2.Tensor, _Mapping]]] = ..., version: _Optional[int] = ..., online: _Optional[_Union[_tensor_pb2.PhaseCost, _Mapping]] = ..., offline: _Optional[_Union[_tensor_pb2.PhaseCost, _Mapping]] = ..., receipt: _Optional[_Union[_trust_pb2.Signed, _Mapping]] = ..., commitment: _Optional[bytes] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "model", "version", "parent", "keep", "tokens", "max_new_tokens", "temperature", "top_k", "repetition_penalty", "salt", "token")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    request_id: bytes
    model: str
    version: int
    parent: bytes
    keep: int
    tokens: _tensor_pb2.Tensor
    max_new_tokens: int
    temperature: int
    top_k: int
    repetition_penalty: int
    salt: bytes
    token: str
    def __init__(self, request_id: _Optional[bytes] = ..., model: _Optional[str] = ..., version: _Optional[int] = ..., parent: _Optional[bytes] = ..., keep: _Optional[int] = ..., tokens: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., max_new_tokens: _Optional[int] = ..., temperature: _Optional[int] = ..., top_k: _Optional[int] = ..., repetition_penalty: _Optional[int] = ..., salt: _Optional[bytes] = ..., token: _Optional[str] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("taken", "outputs", "online", "offline", "version", "receipt", "commitment")
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    ONLINE_FIELD_NUMBER: _ClassVar[int]
    OFFLINE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    COMMITMENT_FIELD_NUMBER: _ClassVar[int]
    taken: int
    outputs: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.Tensor]
    online: _tensor_pb2.PhaseCost
    offline: _tensor_pb2.PhaseCost
    version: int
    receipt: _trust_pb2.Signed
    commitment: bytes
    def __init__(self, taken: _Optional[int] = ..., outputs: _Optional[_Iterable[_Union[_tensor_pb2.Tensor, _Mapping]]] = ..., online: _Optional[_Union[_tensor_pb2.PhaseCost, _Mapping]] = ..., offline: _Optional[_Union[_tensor_pb2.PhaseCost, _Mapping]] = ..., version: _Optional[int] = ..., receipt: _Optional[_Union[_trust_pb2.Signed, _Mapping]] = ..., commitment: _Optional[bytes] = ...) -> None: ...

class EndSessionRequest(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    def __init__(self, session: _Optional[bytes] = ...) -> None: ...

class EndSessionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class VocabularyRequest(_message.Message):
    __slots__ = ("model", "version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class VocabularyResponse(_message.Message):
    __slots__ = ("chunk",)
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    chunk: bytes
    def __init__(self, chunk: _Optional[bytes] = ...) -> None: ...

class ManifestRequest(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    def __init__(self, nonce: _Optional[bytes] = ...) -> None: ...

class ManifestResponse(_message.Message):
    __slots__ = ("statement",)
    STATEMENT_FIELD_NUMBER: _ClassVar[int]
    statement: _trust_pb2.Signed
    def __init__(self, statement: _Optional[_Union[_trust_pb2.Signed, _Mapping]] = ...) -> None: ...

class SetGrantRequest(_message.Message):
    __slots__ = ("request_id", "name", "version", "grant")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    request_id: bytes
    name: str
    version: int
    grant: _trust_pb2.Signed
    def __init__(self, request_id: _Optional[bytes] = ..., name: _Optional[str] = ..., version: _Optional[int] = ..., grant: _Optional[_Union[_trust_pb2.Signed, _Mapping]] = ...) -> None: ...

class SetGrantResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RefreshModelRequest(_message.Message):
    __slots__ = ("request_id", "name", "version")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    request_id: bytes
    name: str
    version: int
    def __init__(self, request_id: _Optional[bytes] = ..., name: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class RefreshModelResponse(_message.Message):
    __slots__ = ("refreshed",)
    REFRESHED_FIELD_NUMBER: _ClassVar[int]
    refreshed: int
    def __init__(self, refreshed: _Optional[int] = ...) -> None: ...
