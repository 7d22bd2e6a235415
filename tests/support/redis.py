"""A real Redis on a port of loopback, that can be stopped, killed and come back."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator

import pytest
import trio


class RedisServer:
    """`redis-server`, without files. Its port stays."""

    def __init__(self, password: str = "") -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._password = password
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """As a policy names it."""
        return f"redis://127.0.0.1:{self.port}/0"

    async def start(self) -> None:
        """Until it accepts connections."""
        words = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        words += ["--requirepass", self._password] if self._password else []
        self._process = subprocess.Popen(words, stdout=subprocess.DEVNULL, cwd="/")
        with trio.fail_after(20):
            while True:
                with contextlib.suppress(OSError):
                    async with await trio.open_tcp_stream("127.0.0.1", self.port):
                        return
                await trio.sleep(0.02)

    def pause(self) -> None:
        """It stays connected and says nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """It is gone, with what it knew."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def known(self) -> str:
        """What it knows, as its own client prints it."""
        words = ["redis-cli", "-p", str(self.port), "keys", "*"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def redis_server(password: str = "") -> Iterator[RedisServer]:
    """One that ends with the block; to be started."""
    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server is installed")
    server = RedisServer(password)
    try:
        yield server
    finally:
        server.kill()
