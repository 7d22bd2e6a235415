"""The node proxy's pages: admin on loopback, metrics and readiness for the cluster.

The admin port asks nobody who they are, so it is on loopback or a unix socket and nowhere else
(`ztunnel.config` refuses other addresses); what a page of it changes is refused to web pages
(`mesh.runtime.admin`). Keys of `/config_dump` are upstream's.
"""

from __future__ import annotations

import functools
import json
import socket
from collections.abc import Sequence
from pathlib import Path

import trio

from mesh import __version__
from mesh.errors import ConfigError, KernelError
from mesh.runtime import log
from mesh.runtime.admin import AdminApp, Request, Response, admin_app, open_unix_listener
from mesh.runtime.lifecycle import Shutdown
from mesh.sockets import open_listener
from ztunnel import dump
from ztunnel.config import UNIX
from ztunnel.explain import Explainer
from ztunnel.node import Node
from ztunnel.pods import Pods

_log = log.get("admin")


async def serve_pages(
    pages: Sequence[tuple[str, AdminApp]],
    doors: trio.CancelScope,
    connections: trio.Nursery,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Let requests in until `doors` is cancelled; those that are in live in `connections`."""
    with doors:
        async with trio.open_nursery() as nursery:
            for address, app in pages:
                serve = functools.partial(app.serve, _listen(address), connections=connections)
                await nursery.start(serve)
            task_status.started()


def _listen(address: str) -> list[socket.socket]:
    """Listeners for `host:port` or `unix:PATH`; `localhost` is both loopback addresses. A
    port is shared with the process before us, and the one after.
    """
    if address.startswith(UNIX):
        return [open_unix_listener(Path(address.removeprefix(UNIX)))]
    host, found, port = address.rpartition(":")
    if not found or not port.isdigit():
        raise ConfigError(f"not an address: {address!r}", hint="give host:port")
    if host != "localhost":
        return [open_listener(int(port), host=host.strip("[]") or "::", shares_port=True)]
    listeners = [open_listener(int(port), host="127.0.0.1", shares_port=True)]
    if socket.has_ipv6:
        try:
            listeners.append(open_listener(int(port), host="::1", shares_port=True))
        except KernelError:
            _log.info("no_ipv6_loopback", address=address)
    return listeners


def make_admin(node: Node, pods: Pods, shutdown: Shutdown) -> AdminApp:
    """The admin pages: those of every daemon, what this proxy holds, and what it would decide."""
    app = admin_app("ztunnel", shutdown)

    async def config_dump(_: Request) -> Response:
        body = dump.dump_store(node.store) | {
            "staticConfig": {},
            "version": __version__,
            "config": dump.dump_config(node.config),
            "certificates": dump.dump_certificates(node.secrets.entries()),
            "workloadState": dump.dump_pods(pods, node.connections),
        }
        text = json.dumps(body, default=str, indent=2)
        return Response(200, "application/json", text.encode())

    app.route("/config_dump", config_dump)
    Explainer(node, lambda: pods).add_to(app)
    return app
