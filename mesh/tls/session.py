"""One TLS session over memory BIOs and a raw socket, for the tunnel's data path.

The handshake runs under trio; afterwards the session belongs to a reactor handler, which
calls `fill` and `take` to read and `encrypt` and `flush` to write. The buffers are
process-wide: what `take` leaves in PLAIN is valid until the next `take` of any session,
so a thousand idle connections cost no buffer memory.

Contexts and certificate checks are not here (`mesh.tls.context`): this module only says
what the peer presented.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import Any

import trio

from mesh.errors import IdentityError, MeshError, Unavailable

RECORD = 16384
READ_SIZE = 256 * 1024
MAX_HANDSHAKE_BYTES = 512 * 1024
WOULD_BLOCK = -1

PLAIN = memoryview(bytearray(READ_SIZE + RECORD))
_CIPHER = memoryview(bytearray(READ_SIZE))
_NO_WAIT = socket.MSG_DONTWAIT

# What OpenSSL calls an alert or a local verdict about a certificate.
_IDENTITY_REASONS = (
    "CERTIFICATE",
    "UNKNOWN_CA",
    "UNSUPPORTED_CERT",
    "ACCESS_DENIED",
)


def tls_failure(error: ssl.SSLError, peer: str) -> MeshError:
    """The MeshError for a TLS failure: IdentityError when a certificate was refused, by us
    or by the peer (whose alert arrives after our side of a TLS 1.3 handshake is done).
    """
    reason = error.reason or str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        return IdentityError(
            f"certificate of {peer} is not trusted: {error.verify_message or reason}",
            flag="TLS_FAILURE",
        )
    if any(part in reason for part in _IDENTITY_REASONS):
        return IdentityError(
            f"{peer} refused the TLS handshake: {reason}",
            hint="the two sides may hold different roots or expired certificates",
            flag="TLS_FAILURE",
        )
    return Unavailable(f"TLS with {peer} failed: {reason}", flag="TLS_FAILURE")


class TlsSession:
    """An established session. It owns `sock` (non-blocking), which `close` closes."""

    __slots__ = (
        "_in_bio",
        "_out",
        "_out_bio",
        "_read",
        "_ssl",
        "_write",
        "peer_closed",
        "peer_name",
        "sock",
    )

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool) -> None:
        self.sock = sock
        self._in_bio = ssl.MemoryBIO()
        self._out_bio = ssl.MemoryBIO()
        self._ssl = context.wrap_bio(self._in_bio, self._out_bio, server_side=server_side)
        # typeshed says bytes; into a buffer it gives a count.
        self._read: Any = self._ssl.read
        self._write = self._ssl.write
        self._out: memoryview | None = None
        self.peer_closed = False
        self.peer_name = _peer_name(sock)

    # -- what the handshake found

    def peer_certificate_der(self) -> bytes:
        """The peer's leaf certificate. Raises IdentityError when it showed none."""
        der = self._ssl.getpeercert(binary_form=True)
        if not der:
            raise IdentityError(f"{self.peer_name} showed no certificate")
        return der

    def version(self) -> str | None:
        """The protocol version agreed on."""
        return self._ssl.version()

    def cipher(self) -> tuple[str, str, int] | None:
        """Suite name, protocol, secret bits."""
        return self._ssl.cipher()

    def selected_alpn_protocol(self) -> str | None:
        """The protocol agreed on by ALPN."""
        return self._ssl.selected_alpn_protocol()

    # -- the data path; OSError and ssl.SSLError pass through, the caller ends the connection

    def encrypt(self, data: bytearray | memoryview | bytes) -> None:
        """Turn plaintext into records waiting for `flush`."""
        size = len(data)
        if size <= RECORD:
            self._write(data)
            return
        write = self._write
        view = memoryview(data)
        offset = 0
        while offset < size:
            offset += write(view[offset : offset + RECORD])

    def flush(self) -> bool:
        """Send what waits; True when everything went out. Raises OSError."""
        out_bio = self._out_bio
        while True:
            data: bytes | memoryview | None = self._out
            if data is None:
                if not out_bio.pending:
                    return True
                data = out_bio.read()
            try:
                sent = self.sock.send(data, _NO_WAIT)
            except BlockingIOError:
                sent = 0
            if sent != len(data):
                self._out = memoryview(data)[sent:]
                return False
            self._out = None

    @property
    def has_output(self) -> bool:
        """Whether records wait for `flush`."""
        return self._out is not None or self._out_bio.pending > 0

    def fill(self) -> int:
        """Read ciphertext: bytes read, 0 at the end of the stream, or WOULD_BLOCK.

        Raises OSError when the connection was reset.
        """
        try:
            count = self.sock.recv_into(_CIPHER, READ_SIZE, _NO_WAIT)
        except BlockingIOError:
            return WOULD_BLOCK
        if count:
            self._in_bio.write(_CIPHER[:count])
        return count

    def take(self) -> tuple[int, bool]:
        """Decrypt into PLAIN: (bytes there now, whether to call again at once).

        `peer_closed` is set when the peer said close_notify. Raises ssl.SSLError.
        """
        read, in_bio = self._read, self._in_bio
        offset = 0
        try:
            count: int = read(RECORD, PLAIN)
            if not count:
                self.peer_closed = True
                return 0, False
            offset = count
            while in_bio.pending and offset < READ_SIZE:
                count = read(RECORD, PLAIN[offset : offset + RECORD])
                if not count:
                    self.peer_closed = True
                    return offset, False
                offset += count
        except ssl.SSLWantReadError:
            return offset, False
        return offset, in_bio.pending > 0

    # -- the end

    def close_notify(self) -> None:
        """Queue the orderly end; `flush` sends it."""
        with contextlib.suppress(ssl.SSLError):
            self._ssl.unwrap()

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()


def _peer_name(sock: socket.socket) -> str:
    with contextlib.suppress(OSError):
        name = sock.getpeername()
        if isinstance(name, tuple):
            return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"
    return "peer"


async def handshake(
    sock: socket.socket, context: ssl.SSLContext, *, server_side: bool, timeout: float
) -> TlsSession:
    """Shake hands on a connected non-blocking socket within `timeout` seconds.

    Takes `sock` over: it is closed on failure. Raises IdentityError when a certificate was
    refused, Unavailable for everything else (end of stream, reset, timeout).
    If cancelled: the socket is closed.
    """
    try:
        session = TlsSession(sock, context, server_side=server_side)
        try:
            with trio.fail_after(timeout):
                await _shake(session)
        except trio.TooSlowError as exc:
            raise Unavailable(
                f"no TLS handshake with {session.peer_name} within {timeout:g} s",
                flag="TLS_FAILURE",
            ) from exc
        except ssl.SSLError as exc:
            with contextlib.suppress(OSError):
                session.flush()  # the alert, so that the peer learns why
            raise tls_failure(exc, session.peer_name) from exc
        except OSError as exc:
            raise Unavailable(
                f"{session.peer_name} ended the TLS handshake: {exc.strerror or exc}",
                flag="TLS_FAILURE",
            ) from exc
    except BaseException:
        sock.close()
        raise
    return session


async def _shake(session: TlsSession) -> None:
    received = 0
    ssl_object, in_bio, sock = session._ssl, session._in_bio, session.sock  # noqa: SLF001
    while True:
        try:
            ssl_object.do_handshake()
            done = True
        except ssl.SSLWantReadError:
            done = False
        while not session.flush():
            await trio.lowlevel.wait_writable(sock)
        if done:
            await trio.lowlevel.checkpoint()
            return
        await trio.lowlevel.wait_readable(sock)
        try:
            data = sock.recv(65536, _NO_WAIT)
        except BlockingIOError:
            continue
        if not data:
            raise ConnectionResetError("connection closed")
        received += len(data)
        if received > MAX_HANDSHAKE_BYTES:
            raise ConnectionAbortedError("the handshake is too long")
        in_bio.write(data)
