"""Wire and model of a waypoint's own resource: `mesh.model.l7_policy.TrafficConfig`.

The model is its own schema: it travels as JSON inside a small message, and is checked against
the types when it is read, so that there is one definition and not three. Reading is strict
(unknown or missing members and impossible values raise ConfigError, the text of the NACK);
writing is canonical: equal values have equal bytes.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from mesh.errors import ConfigError
from mesh.model.l7_policy import TrafficConfig
from mesh.proto.waypoint_pb2 import TrafficConfig as TrafficMessage
from mesh.xds.scalars import parse

SCHEMA: Final = 1
MAX_BYTES: Final = 8 << 20

_encoder = msgspec.json.Encoder(order="sorted")


def traffic_to_proto(config: TrafficConfig) -> TrafficMessage:
    """The message of one resource; its name is `config.key`."""
    return TrafficMessage(schema=SCHEMA, model=_encoder.encode(config))


def read_traffic(data: bytes) -> TrafficConfig:
    """Read a serialised resource. Raises ConfigError with the reason of a NACK."""
    message = TrafficMessage()
    parse(message, data)
    return traffic_from_proto(message)


def traffic_from_proto(message: TrafficMessage) -> TrafficConfig:
    """Read one resource. Raises ConfigError."""
    if message.schema != SCHEMA:
        raise ConfigError(f"TrafficConfig of schema {message.schema}, understood is {SCHEMA}")
    if len(message.model) > MAX_BYTES:
        raise ConfigError(f"TrafficConfig of {len(message.model)} bytes, allowed are {MAX_BYTES}")
    try:
        plain: Any = msgspec.json.decode(message.model)
        config = msgspec.convert(plain, TrafficConfig)
    except (msgspec.ValidationError, msgspec.DecodeError, RecursionError) as exc:
        raise ConfigError(f"TrafficConfig: {exc}") from exc
    if _encoder.encode(config) != _encoder.encode(plain):
        # A part of a policy that is not understood must not be left out in silence.
        raise ConfigError("TrafficConfig: it has members that are not known here, or lacks some")
    return config
