"""What runs in the pods of a test: an echo that says whom it sees, and clients that ask it."""

from __future__ import annotations

from collections.abc import Awaitable

import trio


async def echo(stream: trio.SocketStream) -> None:
    """First the peer's address on a line, then whatever was said."""
    try:
        async with stream:
            await stream.send_all(stream.socket.getpeername()[0].encode() + b"\n")
            async for data in stream:
                await stream.send_all(data)
    except (trio.BrokenResourceError, OSError):  # reset by now, perhaps before we looked
        pass


async def read_line(stream: trio.SocketStream) -> str:
    data = b""
    while not data.endswith(b"\n"):
        got = await stream.receive_some(1)
        assert got, "ended before the line did"
        data += got
    return data.decode().strip().removeprefix("::ffff:")


async def ask(stream: trio.SocketStream, payload: bytes) -> tuple[str, bytes]:
    """(our address as the application saw it, the echo), with a half-close in between."""
    with trio.fail_after(30):
        async with stream:
            seen = await read_line(stream)
            async with trio.open_nursery() as nursery:

                async def say() -> None:
                    await stream.send_all(payload)
                    await stream.send_eof()

                nursery.start_soon(say)
                heard = bytearray()
                async for data in stream:
                    heard += data
            return seen, bytes(heard)


async def is_refused(connecting: Awaitable[trio.SocketStream]) -> bool:
    """Whether a new connection ends with RST; connect() itself may see it already."""
    try:
        stream = await connecting
    except ConnectionResetError:
        return True
    return await is_reset(stream)


async def is_reset(stream: trio.SocketStream) -> bool:
    """Whether the connection ends with RST, before any byte."""
    with trio.fail_after(30):
        async with stream:
            try:
                return await stream.receive_some(1) == b"never"
            except trio.BrokenResourceError:
                return True


async def read_to_end(stream: trio.SocketStream) -> bytes:
    """Everything until the connection ends, one way or the other."""
    heard = b""
    with trio.fail_after(30):
        async with stream:
            try:
                async for data in stream:
                    heard += data
            except trio.BrokenResourceError:
                pass
    return heard
