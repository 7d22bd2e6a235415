"""Paths of many spellings through the whole daemon, by both versions of HTTP: what an endpoint may
take for /admin never reaches it, and what an ALLOW rule lets pass is /public by every reading.
"""

from __future__ import annotations

import itertools
import re
from urllib.parse import unquote_to_bytes

import pytest

from mesh.model.l7_policy import L7Authorization, L7Operation, L7Rule
from tests.support.raw_http2 import HELLO, RawPeer, get
from tests.support.waypoints import key, running_app, running_waypoint, service, settle, traffic

pytestmark = pytest.mark.usefixtures("no_fd_leak")

_UP = [
    "..",
    "%2e%2e",
    "%2E.",
    ".%2e",
    "..;",
    "..;a=b",
    "%252e%252e",
    "..%00",
    "%c0%ae%c0%ae",
    "....",
]
_SLASH = ["/", "//", "/./", "%2f", "%2F", "%5c", "\\", "%252f", ";/", "/;x/", "%c0%af"]
_ADMIN = [
    "admin", "admin/", "admin//", "admin/x", "admin;x", "admin;x=y/z", "admin%2f", "%61dmin",
    "%61%64%6d%69%6e", "admin%3bx", "admin?x=/public/", "admin%3f", "%2561dmin", "admin%00",
    "./admin", ".%2fadmin", "admin/.", "admin/../admin", "x/../admin", "admin.", "admin%20",
    "admin%09", "admin#x", "%25%36%31dmin", "%252561dmin", "%c1%a1dmin", "%e0%81%a1dmin",
    "%25c1%25a1dmin", "admin%253bx", "%u0061dmin", "admin%252fx",
]  # fmt: skip
TARGETS = sorted(
    {
        *(f"{slash}{name}" for slash in ("/", "//", "/;x/", "/%2f", "/\\") for name in _ADMIN),
        *(f"/public{a}{up}{b}admin" for a, up, b in itertools.product(_SLASH, _UP, _SLASH)),
        *(f"/public/a{a}{up}{b}x" for a, up, b in itertools.product(_SLASH, _UP, _SLASH[:4])),
        *("/public/x", "/public/x;y", "/public/%20", "/public/a%2fb", "/public//a", "/x"),
    }
)


_OVERLONG = {
    b"\xc0\xae": b".", b"\xc0\xaf": b"/", b"\xc1\xa1": b"a", b"\xe0\x81\xa1": b"a",
}  # fmt: skip


def _lands(target: bytes, *, decodes: int, drops_parameters: bool, merges: bool) -> bytes:
    """Where an endpoint that reads paths in this way ends up."""
    path = target.partition(b"?")[0]
    if drops_parameters:
        path = re.sub(rb";[^/]*", b"", path)
    for _ in range(decodes):
        path = unquote_to_bytes(path)
        for encoded, meant in _OVERLONG.items():
            path = path.replace(encoded, meant)
    if drops_parameters:
        path = re.sub(rb";[^/]*", b"", path)
    if merges:
        path = re.sub(rb"[/\\]+", b"/", path)
    found: list[bytes] = []
    for segment in path.split(b"/")[1:]:
        if segment == b"..":
            found = found[:-1]
        elif segment != b".":
            found.append(segment)
    return b"/" + b"/".join(found)


def readings(target: bytes) -> set[bytes]:
    """By every kind of endpoint."""
    both = (False, True)
    return {
        _lands(target, decodes=decodes, drops_parameters=drops, merges=merges)
        for decodes, drops, merges in itertools.product(range(4), both, both)
    }


def is_in(path: bytes, folder: bytes) -> bool:
    return path == folder or path.startswith(folder + b"/")


async def test_no_spelling_leads_around_a_policy() -> None:
    to = [L7Operation(paths=("/admin", "/admin/*")), L7Operation(paths=("/public", "/public/*"))]
    deny = L7Authorization("shop", "deny", "DENY", (L7Rule(operations=(to[0],)),))
    allow = L7Authorization("shop", "allow", "ALLOW", (L7Rule(operations=(to[1],)),))
    async with (
        running_app("denied-1", key("denied")) as denied,
        running_app("allowed-1", key("allowed")) as allowed,
        running_waypoint(
            [
                service("denied", 1), service("allowed", 2), denied.workload, allowed.workload,
                traffic("denied", authorizations=(deny,)),
                traffic("allowed", authorizations=(allow,)),
            ]
        ) as mesh,
    ):  # fmt: skip
        connection = await mesh.connect()
        for vip in ("10.96.0.1:80", "10.96.0.2:80"):
            peer = RawPeer(await mesh.open(vip, connection))
            await peer.send(HELLO)
            for start in range(0, len(TARGETS), 50):
                ids = [2 * i + 1 for i in range(start, min(start + 50, len(TARGETS)))]
                paths = [TARGETS[i // 2].encode() for i in ids]
                await peer.send(
                    b"".join(get(i, path=path) for i, path in zip(ids, paths, strict=True))
                )
                heard = await peer.read(*ids)
            answers = {heads[0][b":status"] for heads in heard.heads.values()}
            assert answers == {b"200", b"400", b"403"}
        # HTTP/1.1 goes the same way behind its own parser: a few are enough.
        by_http2 = {each.target for each in denied.requests}
        for target in TARGETS[::20]:
            stream = await mesh.open("10.96.0.1:80", connection)
            await stream.send_all(
                f"GET {target} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n".encode()
            )
            status = (await settle(stream, b"never"))[9:12]
            assert status in {b"200", b"400", b"403"}
        assert {each.target for each in denied.requests} == by_http2
    assert len(denied.requests) > 50
    for each in denied.requests:
        assert not any(is_in(path, b"/admin") for path in readings(each.target)), each.target
    assert len(allowed.requests) > 20
    for each in allowed.requests:
        assert all(is_in(path, b"/public") for path in readings(each.target)), each.target
