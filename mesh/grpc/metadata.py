"""Metadata of a call: which header fields are the application's, and what may be sent.

Pure. Names are lower case. Values are printable ASCII; of a `-bin` field the base64 text is
handed on as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from mesh.errors import LocalProtocolError
from mesh.http.events import Headers

CONTENT_TYPE: Final = "application/grpc"
_NAME = re.compile(r"[0-9a-z_.-]+", re.ASCII)
_VALUE = re.compile(r"[\x20-\x7e]*", re.ASCII)


def check_metadata(metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    """The fields to send. Raises LocalProtocolError for a name or value that cannot be, never
    printing the value, which may be a token.
    """
    fields = []
    for name, value in metadata.items():
        if not _NAME.fullmatch(name) or name.startswith("grpc-"):
            raise LocalProtocolError(f"metadata name {name!r} cannot be sent")
        if not _VALUE.fullmatch(value):
            raise LocalProtocolError(f"the value of metadata {name!r} cannot be sent")
        fields.append((name, value.strip(" ")))
    return fields


def read_metadata(headers: Headers) -> dict[str, str]:
    """What a peer sent beside pseudo-headers, by name; repeated fields joined by a comma."""
    metadata: dict[str, str] = {}
    for name, value in headers:
        if not name.startswith(":"):
            metadata[name] = f"{metadata[name]},{value}" if name in metadata else value
    return metadata
