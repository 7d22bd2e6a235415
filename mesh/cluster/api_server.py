"""The API server as calls and streams for trio, by way of the `kubernetes` package.

That package finds the server and proves who we are (in-cluster, kubeconfig, exec plugins,
tokens that rotate); it blocks, so each of its calls runs in a thread. Threads live here and
nowhere else. A call that is cancelled has its socket shut down at once, which ends its
thread. Nothing is retried here: whoever calls knows what a failure means.
"""

from __future__ import annotations

import socket
import ssl
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import trio

from mesh.cluster import port_forward
from mesh.cluster.api import Object
from mesh.cluster.mirror import ApiFailure
from mesh.errors import ConfigError

_T = TypeVar("_T")
_CONNECT_SECONDS = 10.0
CALL_SECONDS = 30.0
_MAX_ANSWER_BYTES = 256 << 20
_MAX_EVENT_BYTES = 8 << 20
_CHUNK_BYTES = 1 << 18
_THREADS = 256
_USER_TIMEOUT_MS = 30_000


@dataclass(frozen=True, slots=True)
class Access:
    """Which API server, and as whom. Nothing set: the pod's own, else kubectl's default."""

    kubeconfig: Path | None = None
    context: str | None = None


# What alone the API server gives its tokens' keys as.
_KEYS = "application/jwk-set+json"


class ApiServer:
    """See the module."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._threads = trio.CapacityLimiter(_THREADS)
        self._client: Any = None
        self._connecting = trio.Lock()

    async def connect(self) -> None:
        """Read the configuration, once; the server is not asked. Raises ConfigError."""
        async with self._connecting:
            if self._client is None:
                self._client = await trio.to_thread.run_sync(_new_client, self._access)
                # The connections that are kept for later calls.
                weakref.finalize(self, self._client.close)

    async def call(
        self,
        method: str,
        path: str,
        *,
        query: Sequence[tuple[str, str]] = (),
        body: Mapping[str, Any] | None = None,
        content: str = "json",
        seconds: float = CALL_SECONDS,
    ) -> Object:
        """The object that the server answers with. Raises ApiFailure, ConfigError.

        If cancelled: it is not known whether the server has done it.
        """
        call = _Call()

        def exchange() -> Object:
            response = self._open(method, path, query, body, content, seconds)
            answer = _read_all(response)
            call.finish()
            return decode(answer)

        try:
            return await self._run(call, exchange)
        finally:
            call.cancel()

    @asynccontextmanager
    async def open_stream(
        self, path: str, query: Sequence[tuple[str, str]], silence_seconds: float
    ) -> AsyncIterator[AsyncIterator[list[Object]]]:
        """Objects, line by line, in the batches that they come in. Raises ApiFailure, ConfigError.

        Ends when the server ends it, or after a silence. If cancelled: the socket is closed.
        """
        call = _Call()
        try:
            response = await self._run(
                call, self._open, "GET", path, query, None, "", silence_seconds
            )
            async with aclosing(self._batches(call, response)) as batches:
                yield batches
        finally:
            call.cancel()

    async def read_page(self, pod_path: str, port: int, path: str) -> tuple[int, bytes]:
        """See `port_forward.read_page`. If cancelled: its thread ends by its own time limit."""
        await self.connect()
        return await trio.to_thread.run_sync(
            partial(port_forward.read_page, self._client, pod_path, port, path),
            abandon_on_cancel=True,
            limiter=self._threads,
        )

    async def _batches(self, call: _Call, response: Any) -> AsyncGenerator[list[Object], None]:
        rest = b""
        while True:
            chunk = await self._run(call, _read_some, response)
            if not chunk:
                call.finish()
                return
            head, newline, tail = chunk.rpartition(b"\n")
            if not newline:
                rest += chunk
                if len(rest) > _MAX_EVENT_BYTES:
                    raise ApiFailure("an event is too large", code=500)
                continue
            lines, rest = (rest + head).split(b"\n"), tail
            yield [decode(line) for line in lines if line.strip()]

    async def _run(self, call: _Call, do: Callable[..., _T], *args: Any) -> _T:
        """Run in a thread what uses `call`'s connections. Raises ApiFailure, ConfigError.

        If cancelled: the thread is left; the caller ends it by `call.cancel()`.
        """
        await self.connect()
        return await trio.to_thread.run_sync(
            partial(call.run, do, *args), abandon_on_cancel=True, limiter=self._threads
        )

    def _open(
        self,
        method: str,
        path: str,
        query: Sequence[tuple[str, str]],
        body: Mapping[str, Any] | None,
        content: str,
        seconds: float,
    ) -> Any:
        """In a thread: send a request; a response that is good and not yet read."""
        headers = {"Accept": _KEYS if path.startswith("/openid/") else "application/json"}
        if body is not None:
            headers["Content-Type"] = f"application/{content}"
        request = self._client.param_serialize(
            method,
            path,
            query_params=list(query),
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        timeout = (_CONNECT_SECONDS, seconds)
        response = self._client.call_api(*request, _request_timeout=timeout).response
        if 200 <= response.status <= 299:
            _current.call.read(response)
            return response
        failure = _failure(response)
        _current.call.finish()
        raise failure


# -- in threads ----------------------------------------------------------------------------


class _Call:
    """What one call uses, so that another thread can end it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connections: list[Any] = []
        self._response: Any = None
        self._is_cancelled = False
        self._is_running = False

    def run(self, do: Callable[..., _T], *args: Any) -> _T:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        _current.call = self
        with self._lock:
            self._is_running = not self._is_cancelled
        if not self._is_running:
            raise ApiFailure("cancelled")
        try:
            return do(*args)
        except (HTTPError, ApiException, OSError, ValueError) as exc:
            # ValueError: the package's and http.client's word for a closed file.
            raise ApiFailure(f"the API server does not answer: {_reason(exc)}") from exc
        finally:
            _current.call = None
            with self._lock:
                self._is_running = False
                if self._is_cancelled:
                    self._close()

    def use(self, connection: Any) -> None:
        """This call is about to use a connection. Raises OSError if it is cancelled."""
        with self._lock:
            if self._is_cancelled:
                raise ConnectionAbortedError("cancelled")
            self._connections.append(connection)
        with _owning:
            connection.owner = self

    def read(self, response: Any) -> None:
        """This call is going to read a response."""
        self._response = response

    def finish(self) -> None:
        """It is over, and its connections are others' to use."""
        with self._lock:
            self._connections.clear()
            self._response = None

    def cancel(self) -> None:
        """End it: whoever reads or writes wakes up with an error, and closes."""
        with self._lock:
            self._is_cancelled = True
            if not self._is_running:
                self._close()
                return
            with _owning:
                for connection in self._connections:
                    if connection.owner is not self or connection.sock is None:
                        continue
                    # Not SSLSocket.shutdown: it would pull the TLS state away from the reader.
                    with suppress(OSError):
                        socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)

    def _close(self) -> None:
        if self._response is not None:
            self._response.close()
        with _owning:
            for connection in self._connections:
                if connection.owner is self:
                    connection.close()
        self._connections.clear()
        self._response = None


_current = threading.local()
# A connection goes back to the pool when an answer is read, before the call that read it is
# over: by then it may be another call's. Held while one changes hands, or is ended.
_owning = threading.Lock()


def _new_client(access: Access) -> Any:
    """In a thread: a client that finds its server and its credentials. Raises ConfigError."""
    from kubernetes import client, config
    from kubernetes.config.config_exception import ConfigException
    from urllib3.connection import HTTPConnection, HTTPSConnection
    from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

    settings = client.Configuration()
    try:
        if access.kubeconfig is not None or access.context is not None or not _is_in_cluster():
            config.load_kube_config(
                config_file=str(access.kubeconfig) if access.kubeconfig else None,
                context=access.context,
                client_configuration=settings,
            )
        else:
            config.load_incluster_config(client_configuration=settings)
    except (ConfigException, OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        where = str(access.kubeconfig or "the default kubeconfig")
        raise ConfigError(
            f"no way to the Kubernetes API: {_reason(exc)}",
            file=where,
            hint="set KUBECONFIG, or run in a pod with a service account",
        ) from exc
    # We retry ourselves, and a redirect would carry our token elsewhere.
    settings.retries = False
    settings.connection_pool_maxsize = 16
    settings.socket_options = [
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS),
    ]
    api = client.ApiClient(settings)
    api.user_agent = "ambit"
    pools = {}
    for scheme, pool, connection in (
        ("http", HTTPConnectionPool, HTTPConnection),
        ("https", HTTPSConnectionPool, HTTPSConnection),
    ):
        ours = type(f"Cancellable{connection.__name__}", (_Cancellable, connection), {})
        pools[scheme] = type(f"Cancellable{pool.__name__}", (pool,), {"ConnectionCls": ours})
    api.rest_client.pool_manager.pool_classes_by_scheme = pools
    return api


class _Cancellable:
    """Mixed into urllib3's connections: the call in this thread learns what it uses."""

    owner: _Call | None = None

    def connect(self) -> None:
        _current.call.use(self)
        super().connect()  # type: ignore[misc]

    def request(self, *args: Any, **kwargs: Any) -> None:
        _current.call.use(self)
        super().request(*args, **kwargs)  # type: ignore[misc]


def _is_in_cluster() -> bool:
    return Path("/var/run/secrets/kubernetes.io/serviceaccount/token").exists()


def _read_some(response: Any) -> bytes:
    """What has come of a stream; nothing at its end, or when it has been silent for too long."""
    from urllib3.exceptions import ReadTimeoutError

    try:
        data: bytes = response.read1(_CHUNK_BYTES)
    except (ReadTimeoutError, TimeoutError):
        response.close()
        return b""
    return data


def _read_all(response: Any) -> bytes:
    parts, size = [], 0
    for chunk in response.stream(_CHUNK_BYTES, decode_content=False):
        parts.append(chunk)
        size += len(chunk)
        if size > _MAX_ANSWER_BYTES:
            response.close()
            raise ApiFailure(f"the answer is larger than {_MAX_ANSWER_BYTES >> 20} MiB", code=413)
    response.release_conn()
    return b"".join(parts)


def _failure(response: Any) -> ApiFailure:
    data = response.read(1 << 16)
    response.close()
    try:
        status = decode(data)
    except ApiFailure:
        status = {}
    message = str(status.get("message") or data[:200].decode("utf-8", "replace").strip())[:500]
    code = response.status
    hint = ""
    if code == 403:
        hint = "grant it to this service account: kubectl auth can-i --list shows what it has"
    elif code == 401:
        message = message if message not in ("", "Unauthorized") else "our credentials are refused"
        hint = "is the token expired, or of another cluster?"
    after = response.headers.get("Retry-After", "")
    seconds = min(30.0, float(after)) if after.isdecimal() else 0.0
    return ApiFailure(message or f"HTTP {code}", code=code, hint=hint, retry_after_seconds=seconds)


def _reason(exc: BaseException) -> str:
    inner = exc
    while isinstance(getattr(inner, "reason", None), BaseException):
        inner = inner.reason  # type: ignore[attr-defined]
    if isinstance(inner, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({inner.verify_message})"
    text = str(inner).rpartition(": ")[2] or type(inner).__name__
    return text[:200]


def decode(data: bytes) -> Object:
    """The JSON object in `data`. Raises ApiFailure."""
    try:
        value = msgspec.json.decode(data)
    except (ValueError, RecursionError) as exc:
        raise ApiFailure(f"the API server did not send JSON: {str(exc)[:100]}", code=500) from exc
    if not isinstance(value, dict):
        raise ApiFailure("the API server did not send an object", code=500)
    return value
