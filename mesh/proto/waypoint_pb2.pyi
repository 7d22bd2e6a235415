from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class TrafficConfig(_message.Message):
    __slots__ = ("schema", "model")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    schema: int
    model: bytes
    def __init__(self, schema: _Optional[int] = ..., model: _Optional[bytes] = ...) -> None: ...
