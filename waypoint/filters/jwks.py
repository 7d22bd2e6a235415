"""Key sets that issuers publish: fetched when they are needed, kept, fetched again.

One fetch at a time for each address; everybody who needs it waits for that one. Keys are good for
twenty minutes and stay in use while a newer set cannot be had, but only for a day. A key that is
asked for by a name nobody knows makes one early fetch, and no more than one in ten seconds, so
made-up names are no way to flood an issuer.

An address is data from a policy: it is http or https, leads neither to this host nor to link-local
addresses (where clouds keep credentials), is resolved once (what was judged is what is asked), is
never redirected, and answers within bounds.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Final
from urllib.parse import urlsplit

import trio
from joserfc.jwk import KeySet

from mesh.errors import ConfigError, MeshError, Unavailable
from mesh.model.l7_policy import JwtRule
from waypoint.filters.jwt import Bad, InlineKeys, KeySource, read_keys

MAX_JWKS_BYTES: Final = 256 * 1024
REFRESH_SECONDS: Final = 20 * 60.0
KEPT_SECONDS: Final = 24 * 3600.0
EARLY_SECONDS: Final = 10.0
FIRST_RETRY_SECONDS: Final = 1.0

_MOST_ADDRESSES: Final = 3
# Beyond link-local: "this" network, metadata of AWS (IPv6), Alibaba, Azure and Oracle, broadcast.
_FORBIDDEN: Final = tuple(
    ipaddress.ip_network(each)
    for each in ("0.0.0.0/8", "fd00:ec2::/32", "100.100.100.200/32", "168.63.129.16/32",
                 "192.0.0.192/32", "255.255.255.255/32", "fec0::/10")
)  # fmt: skip
_TRANSLATED: Final = tuple(
    ipaddress.ip_network(each) for each in ("64:ff9b::/96", "64:ff9b:1::/48", "::/96")
)

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
Fetch = Callable[[str], Awaitable[bytes]]


class IssuerKeys:
    """The keys behind one `jwks_uri`, or behind an issuer's discovery document."""

    def __init__(self, rule: JwtRule, fetch: Fetch) -> None:
        self._uri = rule.jwks_uri
        self._issuer = rule.issuer
        self._timeout = rule.timeout_seconds
        self._fetch = fetch
        self._keys: KeySet | None = None
        self._names: frozenset[str] = frozenset()
        self._fetched_at = float("-inf")
        self._tried_at = float("-inf")
        self._wait = FIRST_RETRY_SECONDS
        self._lock: trio.Lock | None = None

    def known(self, kid: str) -> KeySet | None:
        """The keys, unless they are old, or `kid` is new and may be asked for."""
        now = trio.current_time()
        if self._keys is None:
            return None
        may_try = now - self._tried_at >= self._wait
        if now - self._fetched_at >= REFRESH_SECONDS and may_try:
            return None
        is_strange = bool(kid) and kid not in self._names
        if is_strange and now - self._tried_at >= EARLY_SECONDS:
            return None
        return self._keys

    async def fetch(self, kid: str) -> KeySet | None:
        """The keys, fetched if that is due. None when there are none."""
        if self._lock is None:
            self._lock = trio.Lock()
        is_first = not self._lock.locked()
        async with self._lock:
            now = trio.current_time()
            is_due = self.known(kid) is None and now - self._tried_at >= self._wait
            # Whoever waited for a fetch takes what it brought, and begins no other.
            if is_due and is_first:
                await self._refresh(now)
            if trio.current_time() - self._fetched_at > KEPT_SECONDS:
                self._keys = None
            return self._keys

    async def _refresh(self, now: float) -> None:
        self._tried_at = now
        try:
            with trio.fail_after(self._timeout):
                uri = self._uri or await self._discover()
                keys = read_keys(await self._fetch(uri))
        except (MeshError, Bad, trio.TooSlowError):
            self._wait = min(self._wait * 2, 60.0)
            return
        self._keys = keys
        self._names = frozenset(key.kid for key in keys.keys if key.kid)
        self._fetched_at = trio.current_time()
        self._wait = FIRST_RETRY_SECONDS

    async def _discover(self) -> str:
        base = self._issuer.rstrip("/")
        document = await self._fetch(f"{base}/.well-known/openid-configuration")
        try:
            found = json.loads(document)
        except (ValueError, RecursionError) as exc:
            raise Bad("the discovery document cannot be read") from exc
        uri = found.get("jwks_uri") if isinstance(found, dict) else None
        if not isinstance(uri, str) or found.get("issuer") != self._issuer:
            raise Bad("the discovery document is another issuer's, or names no keys")
        return uri


def sources(fetch: Fetch) -> Callable[[JwtRule], KeySource]:
    """What gives each rule its keys."""

    def source(rule: JwtRule) -> KeySource:
        return InlineKeys(rule.jwks) if rule.jwks else IssuerKeys(rule, fetch)

    return source


async def fetch(uri: str) -> bytes:
    """GET `uri`. Raises ConfigError for an address that is not asked, Unavailable."""
    import httpx2  # not needed before some policy names an address

    host, port, addresses = await check_address(uri)
    error: Exception | None = None
    for address in addresses:
        try:
            return await _get(uri, host, port, address)
        except httpx2.ConnectError as exc:
            error = exc
        except (httpx2.HTTPError, httpx2.InvalidURL) as exc:
            raise Unavailable(f"{uri}: {exc}") from exc
    raise Unavailable(f"{uri}: {error}") from error


async def _get(uri: str, host: str, port: int | None, address: str) -> bytes:
    """Ask this very address: a name that is resolved again may lead elsewhere by then."""
    import httpx2

    asked = httpx2.URL(uri).copy_with(host=address)
    named = f"[{host}]" if ":" in host else host
    headers = {
        "host": named if port is None else f"{named}:{port}",
        "accept": "application/json",
        "accept-encoding": "identity",
    }
    async with (
        httpx2.AsyncClient(follow_redirects=False, trust_env=False) as client,
        client.stream("GET", asked, headers=headers, extensions={"sni_hostname": host}) as response,
    ):
        if response.status_code != 200:
            raise Unavailable(f"{uri} answers {response.status_code}")
        if response.headers.get("content-encoding", "identity") != "identity":
            raise Unavailable(f"{uri} answers in an encoding that was not asked for")
        body = bytearray()
        with contextlib.suppress(httpx2.StreamError):  # closed by ourselves
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > MAX_JWKS_BYTES:
                    await response.aclose()
        if len(body) > MAX_JWKS_BYTES:
            raise Unavailable(f"{uri} answers more than {MAX_JWKS_BYTES >> 10} KiB")
        return bytes(body)


async def check_address(uri: str) -> tuple[str, int | None, Sequence[str]]:
    """The host, the port and the addresses that may be asked. Raises ConfigError when `uri` leads
    where a policy must not lead us, by any of its addresses; Unavailable.
    """
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port
    except ValueError as exc:
        raise ConfigError(f"{uri!r} is no URI") from exc
    if parts.scheme not in ("http", "https") or not host or "@" in parts.netloc or "%" in host:
        raise ConfigError(f"{uri!r} is no http or https URI")
    try:
        found = await trio.socket.getaddrinfo(host, port or 0, type=trio.socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise Unavailable(f"{host}: {exc}") from exc
    addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
    for text in addresses:
        if leads_to_forbidden(text):
            raise ConfigError(f"{uri!r} leads to {text}, which policies may not name")
    return host, port, addresses[:_MOST_ADDRESSES]


def leads_to_forbidden(address: str) -> bool:
    """Whether an address that a name stands for, or one inside it, is forbidden."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    return any(is_forbidden(each) for each in (ip, *_inner(ip)))


def is_forbidden(ip: IpAddress) -> bool:
    """Ourselves, everybody, or where clouds keep a machine's credentials."""
    return (
        ip.is_loopback
        or ip.is_link_local
        or ip.is_multicast
        or ip.is_unspecified
        or any(ip in network for network in _FORBIDDEN)
    )


def _inner(ip: IpAddress) -> Sequence[IpAddress]:
    """The IPv4 address that an IPv6 one is translated or tunnelled to."""
    if isinstance(ip, ipaddress.IPv4Address):
        return ()
    found: list[IpAddress] = [each for each in (ip.ipv4_mapped, ip.sixtofour) if each is not None]
    if ip.teredo is not None:
        found += ip.teredo
    if any(ip in network for network in _TRANSLATED):
        found.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    return found
