"""h2spec against the HBONE listener, through a bridge that adds mutual TLS for it.

`go install github.com/summerwind/h2spec/cmd/h2spec@latest` builds it; H2SPEC names the program if
it is not on the PATH.
"""

from __future__ import annotations

import os
import re
import shutil
import ssl

import pytest
import trio

from mesh.sockets import SocketAddress
from tests.support.tunnels import CLIENT_CONTEXT, open_link

H2SPEC = os.environ.get("H2SPEC") or shutil.which("h2spec") or ""
pytestmark = [
    pytest.mark.interop,
    pytest.mark.timeout(240),
    pytest.mark.skipif(not H2SPEC, reason="no h2spec: `go install` builds it"),
]

# What it asks of a web server, and we do otherwise, lawfully.
NOT_OURS = {
    # Our answer to what is no CONNECT has no body.
    "Sends a WINDOW_UPDATE frame on half-closed (remote) stream",
    "Sends a PRIORITY frame on half-closed (remote) stream",
    # Beyond 16 KiB, but not beyond the limit that our SETTINGS name.
    "Sends a large size HEADERS frame that exceeds the SETTINGS_MAX_FRAME_SIZE",
    # Requests that have ended do not count, and these end at once.
    "Sends HEADERS frames that causes their advertised concurrent stream limit to be exceeded",
}
FAILED = re.compile(r"× \d+: (.+)")


async def test_the_hbone_listener_as_h2spec_wants_it() -> None:
    async with open_link(dial=False) as link:
        plain = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]

        async def bridge(stream: trio.SocketStream) -> None:
            await _bridge(stream, link.address)

        link.nursery.start_soon(trio.serve_listeners, bridge, [plain])
        port = plain.socket.getsockname()[1]
        command = [H2SPEC, "-h", "127.0.0.1", "-p", str(port), "-o", "2"]
        done = await trio.run_process(command, capture_stdout=True, check=False)
        told = done.stdout.decode()
        failures = told.rpartition("Failures:")[2]
        assert set(FAILED.findall(failures)) <= NOT_OURS, failures
        assert "145 tests" in told


async def _bridge(plain: trio.SocketStream, address: SocketAddress) -> None:
    tls = trio.SSLStream(
        await trio.open_tcp_stream(address.ip, address.port), CLIENT_CONTEXT, https_compatible=True
    )

    async def pour(source: trio.abc.Stream, sink: trio.abc.Stream) -> None:
        try:
            while piece := await source.receive_some(65536):
                await sink.send_all(piece)
        except (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError):
            pass
        pouring.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as pouring:
            pouring.start_soon(pour, plain, tls)
            pouring.start_soon(pour, tls, plain)
    finally:
        await trio.aclose_forcefully(tls)
        await trio.aclose_forcefully(plain)
