"""The Kubernetes API behind the `Cluster` protocol.

What is decided about lists and watches is in `reflector` and `mirror`; how the server is
reached, in `api_server`. Here the two meet, and objects are written: by server-side apply
under our own field manager.

A `status` in what is applied or patched goes to the status sub-resource, as Kubernetes
demands and a directory does not: both twins take the same objects.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import trio

from mesh.cluster.api import Conflict, Event, NotFound, Object, Ref, Synced, group_of, ref_of
from mesh.cluster.api_server import Access, ApiServer
from mesh.cluster.mirror import ApiFailure, Resource, version_of
from mesh.cluster.reflector import PAGE_LIMIT, Page, Reflector, Report
from mesh.errors import ConfigError, MeshError, Unavailable

FIELD_MANAGER = "ambit"

_LIST_SECONDS = 120.0
# Bookmarks come about once a minute: a watch that says nothing for longer may be half open.
_SILENCE_SECONDS = 90.0
_WATCH_SECONDS = (240, 480)
_BUFFERED_EVENTS = 256
_DISCOVERY_SECONDS = 5.0
_BUSY_ATTEMPTS = 6


class KubernetesCluster:
    """See the module. `kinds` are watched when none are named.

    `selectors` narrows what is watched, by kind: {"Pod": "spec.nodeName=n1"} (field selectors).
    `homes` narrows it to one namespace, by kind, so that rights there are enough.
    `manager` owns the fields that we apply. `silence_seconds` bounds how long a watch may say
    nothing before it is opened anew.
    """

    def __init__(
        self,
        access: Access,
        *,
        kinds: Sequence[str] = (),
        selectors: Mapping[str, str] | None = None,
        homes: Mapping[str, str] | None = None,
        manager: str = FIELD_MANAGER,
        report: Report = lambda _event, _fields: None,
        silence_seconds: float = _SILENCE_SECONDS,
    ) -> None:
        self._server = ApiServer(access)
        self._kinds = tuple(kinds)
        self._selectors = dict(selectors or {})
        self._homes = dict(homes or {})
        self._manager = manager
        self._report = report
        self._silence = silence_seconds
        self._rng = random.Random()  # noqa: S311 - spreads retries, guards nothing
        self._discovery = trio.Lock()
        self._discovered: dict[str, tuple[float, Mapping[str, Any] | None]] = {}

    # -- the Cluster protocol ----------------------------------------------------------

    @asynccontextmanager
    async def watch(
        self, kinds: Sequence[str] = ()
    ) -> AsyncIterator[trio.MemoryReceiveChannel[Event]]:
        """See `Cluster.watch`: `Synced` when every kind is told. Back-pressure is the server's.

        A server that does not answer is no error here; it is tried until it does.
        """
        wanted = tuple(kinds) or self._kinds
        for kind in wanted:
            group_of(kind)
        await self._server.connect()
        send, receive = trio.open_memory_channel[Event](_BUFFERED_EVENTS)
        missing = set(wanted)
        is_told = trio.Event()

        def told(kind: str) -> None:
            missing.discard(kind)
            if not missing:
                is_told.set()

        async def finish() -> None:
            if wanted:
                await is_told.wait()
            await send.send(Synced())

        async def follow() -> None:
            try:
                async with trio.open_nursery() as following:
                    following.start_soon(finish)
                    for kind in wanted:
                        reflector = Reflector(
                            kind, self, send.send, partial(told, kind), self._rng, self._report
                        )
                        following.start_soon(reflector.run)
            except* trio.BrokenResourceError:
                pass  # the reader has closed its end

        try:
            async with send, trio.open_nursery() as nursery:
                nursery.start_soon(follow)
                with receive:
                    yield receive
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            # The caller's own error left our nursery in a wrapper that means nothing to it.
            if len(group.exceptions) == 1:
                raise group.exceptions[0] from group.exceptions[0].__cause__
            raise

    async def get(self, ref: Ref) -> Object | None:
        """See `Cluster.get`. Raises ConfigError, Unavailable."""
        resource = await self.discover(ref.kind)
        if resource is None:
            return None
        try:
            return await self._send("GET", resource.path(ref.namespace, ref.name), ref)
        except NotFound:
            return None

    async def apply(self, object: Object) -> None:  # noqa: A002
        """See `Cluster.apply`: server-side apply; fields that others own are taken over.

        Raises Conflict if the object names a `resourceVersion` that is not the current one.
        If cancelled: it is not known whether it has been applied.
        """
        ref = ref_of(object)
        resource = await self._resource_of(object)
        main = {key: value for key, value in object.items() if key != "status"}
        if set(main) - {"apiVersion", "kind", "metadata"} or "status" not in object:
            await self._apply(resource.path(ref.namespace, ref.name), ref, main)
        if "status" in object:
            kept = {key: object["metadata"].get(key) for key in ("name", "namespace")}
            status = {**object, "metadata": {key: each for key, each in kept.items() if each}}
            status = {key: status[key] for key in ("apiVersion", "kind", "metadata", "status")}
            await self._apply(resource.path(ref.namespace, ref.name, "status"), ref, status)

    async def patch(self, ref: Ref, merge_patch: Mapping[str, Any]) -> None:
        """See `Cluster.patch`. Raises Conflict as `apply`.

        If cancelled: it is not known whether it has been applied.
        """
        resource = await self._known(ref)
        main = {key: value for key, value in merge_patch.items() if key != "status"}
        path = resource.path(ref.namespace, ref.name)
        query = [("fieldManager", self._manager)]
        send = partial(self._send, "PATCH", what=ref, query=query, content="merge-patch+json")
        if main:
            await send(path, body=main)
        if "status" in merge_patch:
            await send(f"{path}/status", body={"status": merge_patch["status"]})

    async def delete(self, ref: Ref) -> None:
        """See `Cluster.delete`. What depends on the object goes after it, in the background."""
        resource = await self.discover(ref.kind)
        if resource is None:
            return
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
        try:
            await self._send("DELETE", resource.path(ref.namespace, ref.name), ref, body=body)
        except NotFound:
            return

    # -- what only a real API server has -----------------------------------------------

    async def create(self, object: Object) -> Object:  # noqa: A002
        """Create and return what the server made of it, for reviews too.

        Raises Conflict when it exists, ConfigError, Unavailable.
        """
        resource = await self._resource_of(object)
        metadata = object.get("metadata") or {}
        namespace = metadata.get("namespace", "default") if resource.is_namespaced else ""
        query = [("fieldManager", self._manager)]
        what = str(object.get("kind"))
        return await self._send("POST", resource.path(namespace), what, query=query, body=object)

    async def replace(self, object: Object) -> Object:  # noqa: A002
        """Write the object whole, if it still has the `resourceVersion` that it names.

        Raises Conflict when it has changed, NotFound, ConfigError, Unavailable.
        """
        ref = ref_of(object)
        resource = await self._known(ref)
        path = resource.path(ref.namespace, ref.name)
        query = [("fieldManager", self._manager)]
        return await self._send("PUT", path, ref, query=query, body=object)

    async def list_objects(self, kind: str, namespace: str = "") -> list[Object]:
        """The objects of a kind, of one namespace or of all; none if the kind is not served.

        Raises ConfigError when we may not read them, Unavailable.
        """
        try:
            resource = await self.discover(kind)
        except ApiFailure as failure:
            raise _meaning(failure, kind) from failure
        if resource is None:
            return []
        found: list[Object] = []
        token, more = "", True
        while more:
            query = [("limit", str(PAGE_LIMIT)), *([("continue", token)] if token else [])]
            answer = await self._send("GET", resource.path(namespace), kind, query=query)
            said = {"apiVersion": resource.api_version, "kind": kind.partition(".")[0]}
            found += [{**said, **item} for item in answer.get("items") or ()]
            token = (answer.get("metadata") or {}).get("continue") or ""
            more = bool(token)
        return found

    async def read_page(self, pod: Ref, port: int, path: str) -> tuple[int, bytes]:
        """GET a page that a pod serves to itself, by a forwarded port; status and body.

        Raises NotFound, ConfigError when we may not, Unavailable.
        """
        resource = await self._known(pod)
        try:
            return await self._server.read_page(resource.path(pod.namespace, pod.name), port, path)
        except ApiFailure as failure:
            raise _meaning(failure, pod) from failure

    async def token_keys(self) -> tuple[str, bytes]:
        """The issuer of service accounts' tokens, and its public keys as a JWKS document.

        Raises ConfigError when we may not read them, Unavailable.
        """
        about = await self._send("GET", "/.well-known/openid-configuration", "the token issuer")
        keys = await self._send("GET", "/openid/v1/jwks", "the token issuer's keys")
        return str(about.get("issuer", "")), json.dumps(keys).encode()

    # -- what a reflector reads --------------------------------------------------------

    async def discover(self, kind: str) -> Resource | None:
        """See `Source.discover`: the version that the server prefers. Raises ApiFailure."""
        group = group_of(kind)
        name = kind.partition(".")[0]
        if not group:
            return _find(name, "", "v1", await self._discover("/api/v1"))
        served = await self._discover(f"/apis/{group}")
        if served is None:
            return None
        preferred = (served.get("preferredVersion") or {}).get("version")
        versions = [each.get("version") for each in served.get("versions") or ()]
        for version in dict.fromkeys([preferred, *versions]):
            found = _find(name, group, version, await self._discover(f"/apis/{group}/{version}"))
            if found is not None:
                return found
        return None

    async def list_page(self, resource: Resource, token: str, limit: int) -> Page:
        """See `Source.list_page`. Raises ApiFailure."""
        query = [*self._selection(resource)]
        if limit:
            query.append(("limit", str(limit)))
        if token:
            query.append(("continue", token))
        path = resource.path(self._homes.get(resource.kind, ""))
        answer = await self._server.call("GET", path, query=query, seconds=_LIST_SECONDS)
        items = answer.get("items") or []
        token = (answer.get("metadata") or {}).get("continue") or ""
        if not isinstance(items, list) or not isinstance(token, str):
            raise ApiFailure(f"the list of {resource.name} is no list", code=500)
        return Page(items, version_of(answer), token)

    @asynccontextmanager
    async def open_watch(
        self, resource: Resource, version: str
    ) -> AsyncIterator[AsyncIterator[list[Object]]]:
        """See `Source.open_watch`. If cancelled: its socket is closed at once."""
        query = [
            *self._selection(resource),
            ("watch", "true"),
            ("allowWatchBookmarks", "true"),
            ("resourceVersion", version),
            ("timeoutSeconds", str(self._rng.randint(*_WATCH_SECONDS))),
        ]
        path = resource.path(self._homes.get(resource.kind, ""))
        async with self._server.open_stream(path, query, self._silence) as batches:
            yield batches

    def _selection(self, resource: Resource) -> list[tuple[str, str]]:
        selector = self._selectors.get(resource.kind)
        return [("fieldSelector", selector)] if selector else []

    # -- calls -------------------------------------------------------------------------

    async def _discover(self, path: str) -> Mapping[str, Any] | None:
        async with self._discovery:
            until, found = self._discovered.get(path, (0.0, None))
            if time.monotonic() < until:
                return found
            try:
                found = await self._server.call("GET", path)
            except ApiFailure as failure:
                if failure.code != 404:
                    raise
                found = None
            self._discovered[path] = (time.monotonic() + _DISCOVERY_SECONDS, found)
            return found

    async def _resource_of(self, obj: Object) -> Resource:
        """The resource by the version that the object names, which may not be the preferred."""
        group, _, version = str(obj.get("apiVersion", "")).rpartition("/")
        path = f"/apis/{group}/{version}" if group else f"/api/{version}"
        kind = str(obj.get("kind", ""))
        found = _find(kind, group, version, await self._discover(path))
        if found is None:
            # It may have been installed a moment ago.
            self._discovered.pop(path, None)
            found = _find(kind, group, version, await self._discover(path))
        if found is None:
            raise ConfigError(
                f"the API server does not serve {obj.get('apiVersion')} {kind}",
                hint="is its CustomResourceDefinition installed?",
            )
        return found

    async def _known(self, ref: Ref) -> Resource:
        resource = await self.discover(ref.kind)
        if resource is None:
            raise NotFound(f"{ref} does not exist: the API server does not serve its kind")
        return resource

    async def _apply(self, path: str, ref: Ref, obj: Object) -> None:
        query = [("fieldManager", self._manager), ("force", "true")]
        await self._send("PATCH", path, ref, query=query, body=obj, content="apply-patch+yaml")

    async def _send(
        self,
        method: str,
        path: str,
        what: object,
        *,
        query: Sequence[tuple[str, str]] = (),
        body: Mapping[str, Any] | None = None,
        content: str = "json",
    ) -> Object:
        """One call about `what`. Raises NotFound, Conflict, ConfigError, Unavailable.

        A server that has too much to do refuses before it does anything; it is asked again.
        """
        for attempt in range(_BUSY_ATTEMPTS):
            try:
                return await self._server.call(
                    method, path, query=query, body=body, content=content
                )
            except ApiFailure as failure:
                if failure.code != 429 or attempt == _BUSY_ATTEMPTS - 1:
                    raise _meaning(failure, what) from failure
                await trio.sleep(max(failure.retry_after_seconds, 0.5) * self._rng.uniform(1, 1.5))
        raise AssertionError  # the last attempt returns or raises


def _find(kind: str, group: str, version: str, served: Mapping[str, Any] | None) -> Resource | None:
    for each in (served or {}).get("resources") or ():
        if each.get("kind") == kind and "/" not in each.get("name", "/"):
            full = kind if _plain(kind) == group else f"{kind}.{group or 'core'}"
            return Resource(full, group, version, each["name"], bool(each.get("namespaced")))
    return None


def _plain(kind: str) -> str | None:
    try:
        return group_of(kind)
    except ConfigError:
        return None


def _meaning(failure: ApiFailure, what: object) -> MeshError:
    """What a failed call about one object means to its caller."""
    match failure.code:
        case 404 | 410:
            return NotFound(f"{what} does not exist")
        case 409:
            return Conflict(f"{what}: {failure}")
        case 400 | 401 | 403 | 405 | 406 | 413 | 415 | 422:
            return ConfigError(f"{what}: {failure}", hint=failure.hint)
    return Unavailable(f"{what}: {failure}", hint=failure.hint)
