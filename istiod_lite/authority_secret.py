"""The authority's keys in a Secret, so that every replica signs for the same root.

The Secret is the truth and a directory the working copy: what the Secret holds is written
out for `open_authority`; the first replica ever makes new keys and creates the Secret, and
whoever loses that race takes the winner's. A start without an API server takes the copy of the
one before (in a pod, it is in memory and ends with the pod). An intermediate that was renewed
is stored back.
While roots are exchanged (`istiod_lite.authority`), the Secret holds `extra-roots.pem`, too.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from istiod_lite.authority import EXTRA_ROOTS, FILES, Authority, open_authority
from mesh.cluster.api import Conflict, Object, Ref, VersionedCluster
from mesh.errors import ConfigError, Unavailable
from mesh.runtime import log

_MAX_FILE_BYTES = 64 * 1024
_ATTEMPTS = 5
_log = log.get(__name__)


async def open_shared_authority(
    cluster: VersionedCluster, ref: Ref, directory: Path, trust_domain: str, now: float
) -> Authority:
    """The authority whose keys the Secret `ref` holds, which is made if there is none.

    Without an API server the working copy of an earlier start is used. Raises ConfigError when
    what it holds is no authority, Unavailable without an API server and without a copy.
    """
    for _ in range(_ATTEMPTS):
        try:
            found = await cluster.get(ref)
        except Unavailable as exc:
            if not all((directory / name).exists() for name in FILES):
                raise
            _log.warning("authority_from_working_copy", file=str(directory), reason=str(exc))
            return open_authority(directory, trust_domain, now)
        if found is not None:
            held = _held(found, ref)
            _write_all(directory, held)
        authority = open_authority(directory, trust_domain, now)
        kept = (*FILES, *([EXTRA_ROOTS] if (directory / EXTRA_ROOTS).exists() else []))
        wanted = {name: (directory / name).read_bytes() for name in kept}
        if found is not None and wanted == held:
            return authority
        try:
            if found is None:
                await cluster.create(_secret(ref, wanted, {}))
                _log.info("authority_created", secret=str(ref))
            else:
                await cluster.replace(_secret(ref, wanted, found["metadata"]))
                _log.info("authority_renewed", secret=str(ref))
            return authority
        except Conflict:
            continue  # another replica was first: what it wrote is the truth
    raise ConfigError(f"{ref} changes all the time", hint="does something else write it?")


def _held(secret: Mapping[str, Any], ref: Ref) -> dict[str, bytes]:
    data = secret.get("data")
    held = {}
    has_extra = isinstance(data, Mapping) and EXTRA_ROOTS in data
    for name in (*FILES, *([EXTRA_ROOTS] if has_extra else [])):
        text = data.get(name) if isinstance(data, Mapping) else None
        try:
            held[name] = base64.b64decode(text or "", validate=True)
        except (binascii.Error, TypeError, ValueError) as exc:
            raise ConfigError(f"{ref} does not hold base64", field=f"data.{name}") from exc
        if not 0 < len(held[name]) <= _MAX_FILE_BYTES:
            raise ConfigError(
                f"{ref} does not hold an authority",
                field=f"data.{name}",
                hint="restore it, or delete it to begin with a new root",
            )
    return held


def _secret(ref: Ref, files: Mapping[str, bytes], metadata: Mapping[str, Any]) -> Object:
    kept = {"resourceVersion": metadata["resourceVersion"]} if metadata else {}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": ref.name, "namespace": ref.namespace, **kept},
        "type": "ambit.dev/authority",
        "data": {name: base64.b64encode(content).decode() for name, content in files.items()},
    }


def _write_all(directory: Path, files: Mapping[str, bytes]) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        (directory / EXTRA_ROOTS).unlink(missing_ok=True)
        for name, content in files.items():
            path = directory / name
            path.unlink(missing_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                file.write(content)
    except OSError as exc:
        raise ConfigError(f"cannot be used: {exc.strerror}", file=str(directory)) from exc
