"""A page of a pod, read through the API server: what `kubectl port-forward` and curl would show.

For pages that are served to their own pod only: whom the API server lets forward ports
(`pods/portforward`) may read them. One connection, one GET, in a thread.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
from typing import Any

from mesh.cluster.mirror import ApiFailure

MAX_PAGE_BYTES = 64 << 20
_SILENCE_SECONDS = 60.0


def read_page(client: Any, pod_path: str, port: int, path: str) -> tuple[int, bytes]:
    """In a thread: GET `path` at a pod's `port`; status and body.

    `client` is the kubernetes package's, `pod_path` the pod's own path. Raises ApiFailure.
    """
    from kubernetes.client.exceptions import ApiException
    from kubernetes.stream import ws_client

    query = [("ports", str(port))]
    method, url, headers, _, _ = client.param_serialize(
        "GET",
        f"{pod_path}/portforward",
        query_params=query,
        header_params={"sec-websocket-protocol": ws_client.V4_CHANNEL_PROTOCOL},
        auth_settings=["BearerToken"],
    )
    where = url.partition("?")[0]
    try:
        forward = ws_client.portforward_call(
            client.configuration, method, where, query_params=query, headers=headers
        )
    except ApiException as exc:
        raise ApiFailure(_reason(exc), code=_code(exc)) from exc
    try:
        return _get(forward.socket(port), path, lambda: str(forward.error(port) or ""))
    finally:
        with contextlib.suppress(OSError):
            forward.close()


def _get(connected: Any, path: str, error: Any) -> tuple[int, bytes]:
    connected.settimeout(_SILENCE_SECONDS)
    connection = http.client.HTTPConnection("localhost", timeout=_SILENCE_SECONDS)
    connection.sock = connected
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        answer = connection.getresponse()
        body = answer.read(MAX_PAGE_BYTES + 1)
    except (OSError, http.client.HTTPException, ValueError) as exc:
        told = error().strip() or str(exc) or type(exc).__name__
        raise ApiFailure(f"the port does not answer: {told[:200]}") from exc
    if len(body) > MAX_PAGE_BYTES:
        raise ApiFailure(f"the page is larger than {MAX_PAGE_BYTES >> 20} MiB", code=413)
    return answer.status, body


_HANDSHAKE = re.compile(r"Handshake status (\d{3}) ([^-]*)")
_MESSAGE = re.compile(r'"message":"((?:[^"\\]|\\.)*)"')


def _reason(exc: Any) -> str:
    """What the package made of a refused handshake: status, fields and body in one text."""
    text = str(exc.reason or exc)
    refused, message = _HANDSHAKE.match(text), _MESSAGE.search(text)
    if refused and message:
        text = json.loads(f'"{message[1]}"')
    elif refused:
        text = f"{refused[1]} {refused[2]}"
    return f"forwarding a port: {' '.join(text.split())[:300] or 'refused'}"


def _code(exc: Any) -> int:
    refused = _HANDSHAKE.match(str(exc.reason or ""))
    return int(refused[1]) if refused else 0
