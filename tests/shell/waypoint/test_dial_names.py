"""Endpoints that are known by name alone: external hosts."""

from __future__ import annotations

import socket

import pytest
import trio

from mesh.errors import Unavailable
from waypoint import dial


class Resolver(trio.abc.HostnameResolver):
    def __init__(self, known: dict[str, str]) -> None:
        self.known = known
        self.asked: list[str] = []

    async def getaddrinfo(self, host, port, family=0, type=0, proto=0, flags=0):  # noqa: A002
        name = host.decode() if isinstance(host, bytes) else host
        self.asked.append(name)
        if name not in self.known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (self.known[name], 0))]

    async def getnameinfo(self, sockaddr, flags):
        raise NotImplementedError


async def test_a_name_is_resolved_as_an_absolute_one():
    resolver = Resolver({"api.example.": "192.0.2.7"})
    trio.socket.set_custom_hostname_resolver(resolver)
    assert await dial._resolve("api.example") == "192.0.2.7"
    with pytest.raises(Unavailable, match=r"b\.example has no address: .*not known"):
        await dial._resolve("b.example")
    assert resolver.asked == ["api.example.", "b.example."]


async def test_a_name_that_no_name_can_be_is_unavailable_too():
    with pytest.raises(Unavailable, match="has no address"):
        await dial._resolve(f"{'a' * 70}.example")


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.169.254", "0.0.0.0"])
async def test_a_name_may_not_lead_to_ourselves_or_to_credentials(address: str):
    trio.socket.set_custom_hostname_resolver(Resolver({"evil.example.": address}))
    with pytest.raises(Unavailable, match="where nobody may be sent"):
        await dial._resolve("evil.example")
