"""The last-known-good state as bytes: what a controller needs to serve without its source. Pure.

One line of ASCII (`ambit-last-known-good SCHEMA DIGEST BYTES`), then a Zstandard frame around
MessagePack. It holds what was told to the proxies, byte for byte, so that restoring it can
loosen nothing; the pods by name, uid, account and node, which the node rule of certificates
asks for; and the *public* keys of the issuer of tokens. No Secret and no private key is in it.

Whatever is not exactly as expected is refused, with the reason: another schema, another mesh,
a digest that does not fit, too old, too large. There is no attempt to make use of a part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b

import msgspec
import zstandard

from istiod_lite.snapshot import Snapshot, Told, restored
from mesh.cluster.api import Ref
from mesh.cluster.objects import Pod
from mesh.errors import ConfigError
from mesh.xds.translate import DECODERS

SCHEMA = 1
#: Bytes of a file, and of what it unpacks to. 100 000 workloads are about 12 MiB and 60 MiB.
MAX_BYTES = 40 << 20
MAX_UNPACKED_BYTES = 512 << 20
_MAGIC = "ambit-last-known-good"
_MAX_HEADER = 160
_LEVEL = 1


@dataclass(frozen=True, slots=True)
class TokenKeys:
    """Who issues the tokens of service accounts, and its public keys (a JWKS document)."""

    issuer: str = ""
    jwks: bytes = b""


@dataclass(frozen=True, slots=True)
class _Pod:
    namespace: str
    name: str
    uid: str
    account: str
    node: str
    phase: str


@dataclass(frozen=True, slots=True)
class _Document:
    cluster_id: str
    trust_domain: str
    saved_at: float
    resources: dict[str, dict[str, bytes]]
    pods: list[_Pod]
    issuer: str
    jwks: bytes


@dataclass(frozen=True, slots=True)
class SavedState:
    """What was in force at `saved_at` (seconds since the epoch)."""

    cluster_id: str
    trust_domain: str
    saved_at: float
    snapshot: Snapshot
    pods: tuple[Pod, ...] = ()
    keys: TokenKeys = TokenKeys()


def encode(state: SavedState) -> bytes:
    """The content of a file. Raises ConfigError when it would be too large."""
    document = _Document(
        cluster_id=state.cluster_id,
        trust_domain=state.trust_domain,
        saved_at=state.saved_at,
        resources={
            type_url: {name: entry.message.resource.value for name, entry in entries.items()}
            for type_url, entries in state.snapshot.resources.items()
        },
        pods=[
            _Pod(each.namespace, each.name, each.uid, each.service_account, each.node, each.phase)
            for each in state.pods
            if each.node
        ],
        issuer=state.keys.issuer,
        jwks=state.keys.jwks,
    )
    payload = zstandard.ZstdCompressor(level=_LEVEL).compress(msgspec.msgpack.encode(document))
    if len(payload) > MAX_BYTES:
        raise ConfigError(f"{len(payload)} bytes of state are more than {MAX_BYTES}")
    return _header(SCHEMA, payload) + payload


def decode(
    content: bytes, *, cluster_id: str, trust_domain: str, now: float, max_age_seconds: float
) -> SavedState:
    """Read what `encode` made. Raises ConfigError, with the reason, for anything else."""
    document = _document(content)
    if (document.cluster_id, document.trust_domain) != (cluster_id, trust_domain):
        raise ConfigError(
            f"is of cluster {document.cluster_id[:80]!r} and trust domain "
            f"{document.trust_domain[:80]!r}, not of this mesh"
        )
    age = now - document.saved_at
    if age > max_age_seconds:
        raise ConfigError(f"is {age:.0f} s old, accepted are {max_age_seconds:.0f} s")
    models: dict[str, Mapping[str, tuple[Told, bytes]]] = {}
    for type_url, entries in document.resources.items():
        read = DECODERS.get(type_url)
        if read is None:
            raise ConfigError(f"holds resources of an unknown type {type_url[:200]!r}")
        models[type_url] = {name: (read(data), data) for name, data in entries.items()}
    pods = tuple(
        Pod(
            ref=Ref("Pod", each.namespace, each.name),
            uid=each.uid,
            service_account=each.account,
            node=each.node,
            phase=each.phase,
        )
        for each in document.pods
    )
    return SavedState(
        document.cluster_id,
        document.trust_domain,
        document.saved_at,
        restored(models),
        pods,
        TokenKeys(document.issuer, document.jwks),
    )


def _document(content: bytes) -> _Document:
    line, newline, payload = content[:_MAX_HEADER].partition(b"\n")
    payload = content[len(line) + 1 :]
    parts = line.decode("ascii", "replace").split(" ")
    if not newline or len(parts) != 4 or parts[0] != _MAGIC:
        raise ConfigError("is no last-known-good state")
    if parts[1] != str(SCHEMA):
        raise ConfigError(f"is of schema {parts[1][:20]}, understood is {SCHEMA}")
    if len(content) > MAX_BYTES + _MAX_HEADER:
        raise ConfigError(f"is larger than {MAX_BYTES} bytes")
    if _header(SCHEMA, payload) != line + newline:
        raise ConfigError("is damaged: its digest does not fit its content")
    try:
        size = zstandard.frame_content_size(payload)
        if not 0 <= size <= MAX_UNPACKED_BYTES:
            raise ConfigError("unpacks to too much")
        packed = zstandard.ZstdDecompressor().decompress(payload, max_output_size=size)
        return msgspec.msgpack.decode(packed, type=_Document)
    except (zstandard.ZstdError, msgspec.MsgspecError, RecursionError) as exc:
        raise ConfigError(f"is damaged: {exc}") from exc


def _header(schema: int, payload: bytes) -> bytes:
    digest = blake2b(payload, digest_size=32).hexdigest()
    return f"{_MAGIC} {schema} {digest} {len(payload)}\n".encode("ascii")
