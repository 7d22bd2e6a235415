"""How to reach the control plane: TLS channels to xDS and to the authority.

The root is read from its file for each channel, and the token for each call, so that
rotating either needs no restart.
"""

from __future__ import annotations

import urllib.parse
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from mesh.errors import ConfigError
from mesh.grpc.client import Channel, open_channel
from mesh.tls.context import control_plane_client
from mesh.xds.client import call_metadata

DEFAULT_PORT = 15012
SYSTEM_ROOTS = "SYSTEM"
_PEM_BEGIN = "-----BEGIN"
_MAX_FILE = 1 << 20


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server of the control plane."""

    host: str
    port: int
    root_ca: str
    auth_token: str
    cluster_id: str

    def open(self) -> AbstractAsyncContextManager[Channel]:
        """A new channel. Raises ConfigError or IdentityError when the root cannot be used."""
        return open_channel(
            self.host,
            self.port,
            control_plane_client(_read_root(self.root_ca)),
            metadata_provider=call_metadata(self.auth_token, self.cluster_id),
        )


def parse_address(text: str, field: str) -> tuple[str, int]:
    """Host and port of `[https://]host[:port]`. Raises ConfigError; TLS is not optional."""
    url = text if "://" in text else f"https://{text}"
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as exc:
        raise ConfigError(f"not an address: {text!r}", field=field) from exc
    if parts.scheme != "https" or not host or parts.path.strip("/"):
        raise ConfigError(
            f"not an address: {text!r}", field=field, hint="give https://host:port; TLS is a must"
        )
    return host, port or DEFAULT_PORT


def _read_root(root_ca: str) -> bytes | None:
    if root_ca == SYSTEM_ROOTS:
        return None
    if root_ca.lstrip().startswith(_PEM_BEGIN):
        return root_ca.encode()
    return _read(root_ca)


def _read(path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(_MAX_FILE)
    except OSError as exc:
        raise ConfigError(f"cannot be read: {exc.strerror}", file=path) from exc
