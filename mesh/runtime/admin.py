"""The HTTP endpoints of a daemon: admin (15000), metrics (15020), readiness (15021), and the
node agent's CNI endpoint. Small, bounded, for loopback, unix sockets or already open listeners.

Own server on httptools, and not starlette on hypercorn, because of the node proxy's memory:
beside trio, ssl, structlog and prometheus-client those two add 6 to 8 MiB resident
and 204 ms to every start; httptools adds 0.2 MiB and 5 ms, and the limit for the whole process
is 60 MiB. The price is no streaming and no routing by pattern, which nothing here needs.

Every bound is a constant below. A request that carries `Origin` may not change anything: a web
page in some browser on the node is nobody's administrator.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import trio
from prometheus_client import CollectorRegistry

from mesh.errors import (
    ConfigError,
    Denied,
    IdentityError,
    KernelError,
    MeshError,
    RemoteProtocolError,
    Unavailable,
)
from mesh.runtime import lifecycle, log, metrics
from mesh.runtime.http1 import Request, RequestReader, Response, encode_response

__all__ = [
    "AdminApp",
    "Readiness",
    "ReadyTask",
    "Request",
    "Response",
    "admin_app",
    "metrics_app",
    "open_unix_listener",
    "readiness_app",
]

MAX_CONNECTIONS = 64
REQUEST_SECONDS = 10.0
IDLE_SECONDS = 60.0
HANDLER_SECONDS = 60.0
CHUNK = 16 << 10

Handler = Callable[[Request], Awaitable[Response]]


class AdminApp:
    """Routes by exact path, served on any number of listeners."""

    def __init__(self, name: str = "admin", *, handler_seconds: float = HANDLER_SECONDS) -> None:
        self._name = name
        self._handler_seconds = handler_seconds
        self._routes: dict[str, dict[str, Handler]] = {}
        self._local: set[str] = set()
        self._connections = 0

    def route(
        self,
        path: str,
        handler: Handler,
        methods: Sequence[str] = ("GET",),
        *,
        is_local: bool = False,
    ) -> None:
        """Answer `path` by `handler`; HEAD comes with GET.

        What `is_local` is answered to callers from a loopback address only, whatever the
        listener is open to: in a pod, to who may `kubectl port-forward` to it.
        """
        for method in methods:
            self._routes.setdefault(path, {})[method] = handler
        if is_local:
            self._local.add(path)

    def paths(self) -> list[str]:
        """What is routed, sorted: for an index page."""
        return sorted(self._routes)

    async def serve(
        self,
        listeners: Sequence[socket.socket],
        *,
        connections: trio.Nursery | None = None,
        task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve on listening sockets, which it owns from here on and closes at the end.

        Never returns. If cancelled: closes listeners, and connections unless they have a
        nursery of their own (`connections`).
        """
        wrapped = []
        for listener in listeners:
            listener.setblocking(False)
            wrapped.append(trio.SocketListener(trio.socket.from_stdlib_socket(listener)))
        await trio.serve_listeners(
            self._serve_guarded, wrapped, handler_nursery=connections, task_status=task_status
        )

    async def _serve_guarded(self, stream: trio.SocketStream) -> None:
        await lifecycle.guard(self._name, self._serve_connection, stream)

    async def _serve_connection(self, stream: trio.SocketStream) -> None:
        self._connections += 1
        try:
            with contextlib.suppress(trio.BrokenResourceError):
                if self._connections <= MAX_CONNECTIONS:
                    await self._answer_all(stream)
                elif self._connections <= 2 * MAX_CONNECTIONS:
                    await _refuse(stream, "too many connections", 503)
        finally:
            self._connections -= 1
            await trio.aclose_forcefully(stream)

    async def _answer_all(self, stream: trio.SocketStream) -> None:
        reader = RequestReader()
        is_local = _is_local(stream.socket)
        while True:
            try:
                request = await _read_request(stream, reader)
            except RemoteProtocolError as exc:
                await _refuse(stream, str(exc), exc.http_status)
                return
            if request is None:
                return
            response = await self.handle(request, is_local=is_local)
            with trio.move_on_after(REQUEST_SECONDS) as scope:
                await stream.send_all(
                    encode_response(
                        response,
                        keep_alive=request.keep_alive,
                        head_only=request.method == "HEAD",
                    )
                )
            if scope.cancelled_caught or not request.keep_alive:
                return

    async def handle(self, request: Request, *, is_local: bool = True) -> Response:
        """The answer to one request: never raises, except when cancelled."""
        methods = self._routes.get(request.path)
        if request.path in self._local and not is_local:
            return Response.text("this page is for callers from here, as by port-forward", 403)
        if methods is None:
            return Response.text(f"no such page; there are: {' '.join(self.paths())}", 404)
        method = "GET" if request.method == "HEAD" else request.method
        handler = methods.get(method)
        if handler is None:
            allow = ", ".join(sorted(methods))
            refusal = Response.text(f"use {allow}", 405)
            return Response(405, refusal.content_type, refusal.body, (("allow", allow),))
        if method != "GET" and "origin" in request.headers:
            return Response.text("requests from web pages are refused", 403)
        answer: Response | None = None

        async def ask() -> None:
            nonlocal answer
            answer = await handler(request)

        try:
            with trio.move_on_after(self._handler_seconds) as scope:
                await lifecycle.supervise(f"{self._name} {request.path}", ask)
        except MeshError as exc:
            text = f"{exc}\nhint: {exc.hint}" if exc.hint else str(exc)
            return Response.text(text, _status(exc))
        if scope.cancelled_caught:
            return Response.text("took too long", 503)
        return answer or Response.text("internal error, see the log", 500)


def _is_local(connection: trio.socket.SocketType) -> bool:
    """Whether the peer is on this machine, or in this network namespace."""
    if connection.family == socket.AF_UNIX:
        return True
    try:
        peer = ipaddress.ip_address(connection.getpeername()[0])
    except (OSError, ValueError):  # it has gone already
        return False
    mapped = getattr(peer, "ipv4_mapped", None)
    return bool((mapped or peer).is_loopback)


def _status(exc: MeshError) -> int:
    match exc:
        case ConfigError():
            return 400
        case RemoteProtocolError():
            return exc.http_status
        case Denied() | IdentityError():
            return 403
        case Unavailable():
            return 503
        case KernelError() | _:
            return 500


async def _read_request(stream: trio.SocketStream, reader: RequestReader) -> Request | None:
    """The next request, or None when the peer ended or stayed silent."""
    request = reader.next_request()
    if request is not None:
        return request
    seconds = IDLE_SECONDS if reader.is_idle else REQUEST_SECONDS
    deadline = trio.current_time() + seconds
    continued = False
    while True:
        with trio.move_on_at(deadline) as scope:
            data = await stream.receive_some(CHUNK)
        if scope.cancelled_caught:
            if reader.is_idle:
                return None
            raise RemoteProtocolError("request took too long", http_status=408)
        if not data:
            return None
        was_idle = reader.is_idle
        reader.receive_data(bytes(data))
        if was_idle:
            # One deadline for the whole request, so that a trickle cannot stretch it.
            deadline = trio.current_time() + REQUEST_SECONDS
        request = reader.next_request()
        if request is not None:
            return request
        if reader.wants_continue and not continued:
            continued = True
            await stream.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")


async def _refuse(stream: trio.SocketStream, message: str, status: int) -> None:
    with trio.move_on_after(1.0):
        refusal = Response.text(message, status)
        await stream.send_all(encode_response(refusal, keep_alive=False))
        await stream.send_eof()
        # Closing on unread bytes would reset the connection before the peer saw the refusal.
        while await stream.receive_some(CHUNK):
            pass


class ReadyTask:
    """One thing that has to happen before the daemon is ready."""

    def __init__(self, readiness: Readiness, name: str) -> None:
        self._readiness = readiness
        self.name = name

    def done(self) -> None:
        """It happened. Calling it again changes nothing."""
        self._readiness.finish(self)


class Readiness:
    """Named tasks; ready when all are done."""

    def __init__(self) -> None:
        self._pending: list[ReadyTask] = []
        self._ready = trio.Event()

    def task(self, name: str) -> ReadyTask:
        """Register one more thing to wait for."""
        task = ReadyTask(self, name)
        self._pending.append(task)
        self._ready = trio.Event()
        return task

    def finish(self, task: ReadyTask) -> None:
        """Called by `ReadyTask.done`."""
        if task in self._pending:
            self._pending.remove(task)
        if not self._pending:
            self._ready.set()

    def pending(self) -> list[str]:
        """Names of what is not done, in the order of registration."""
        return [task.name for task in self._pending]

    async def wait(self) -> None:
        """Until everything registered so far is done. If cancelled: nothing is changed."""
        while self._pending:
            await self._ready.wait()

    async def respond(self, request: Request) -> Response:
        """Handler: 200 `ready`, or 500 naming what is pending.

        While one process follows another both may listen here: who asks for one of them
        (`?process=<pid>`) and meets the other is told 421, to ask again.
        """
        if request.query.get("process", str(os.getpid())) != str(os.getpid()):
            return Response.text(f"this is process {os.getpid()}", 421)
        pending = self.pending()
        if pending:
            return Response.text(f"not ready, pending: {', '.join(pending)}", 500)
        return Response.text("ready")


def readiness_app(readiness: Readiness, path: str = "/healthz/ready") -> AdminApp:
    """What the kubelet asks."""
    app = AdminApp("readiness")
    app.route(path, readiness.respond)
    return app


def metrics_app(registry: CollectorRegistry, count: Callable[[], None] = lambda: None) -> AdminApp:
    """What Prometheus scrapes: `/metrics` and `/stats/prometheus`.

    `count` is called before, in the event loop: there it may look at what lives there.
    """
    app = AdminApp("metrics")

    async def scrape(request: Request) -> Response:
        count()
        accept = request.headers.get("accept", "")
        body, content_type = await trio.to_thread.run_sync(
            partial(metrics.render, registry, accept)
        )
        return Response(200, content_type, body)

    app.route("/metrics", scrape)
    app.route("/stats/prometheus", scrape)
    return app


def admin_app(name: str, shutdown: lifecycle.Shutdown) -> AdminApp:
    """`/` (an index), `/logging` and `/quitquitquit`; the daemon adds its own pages."""
    app = AdminApp(f"{name} admin")

    async def index(_request: Request) -> Response:
        return Response.text("\n".join([f"{name} admin", *app.paths()]))

    async def logging(request: Request) -> Response:
        if "level" in request.query:
            try:
                log.set_level(request.query["level"])
            except ValueError as exc:
                raise ConfigError(str(exc), field="level") from exc
        elif "reset" in request.query:
            log.reset_level()
        return Response.text(f"current log level is {log.level_text()}")

    async def quit_now(_request: Request) -> Response:
        shutdown.request()
        return Response.text("shutdown now")

    app.route("/", index)
    app.route("/logging", logging, methods=("POST",))
    app.route("/quitquitquit", quit_now, methods=("POST",))
    return app


def open_unix_listener(path: Path, *, mode: int = 0o600) -> socket.socket:
    """A listening unix stream socket at `path`, in place of a stale one.

    Raises KernelError.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_socket():
            path.unlink()
        listener.bind(str(path))
        os.chmod(path, mode)
        listener.listen(MAX_CONNECTIONS)
    except OSError as exc:
        listener.close()
        raise KernelError(
            f"listen on {path}: {exc.strerror or exc}", errno=exc.errno or 0, command="bind"
        ) from exc
    return listener
