"""The header block of CONNECTs that lead to one place, made ready: sans-IO.

What two connections of one workload to one destination differ in is the connection's id, the
caller's address and the trace; the rest of their heads is encoded once. The bytes are those that
`encode_block(encode_request(head))` makes, which is pinned by a test.
"""

from __future__ import annotations

from mesh.hbone.head import CONNECTION_KEY, Baggage, ConnectHead, Forwarded, encode_baggage
from mesh.http.hpack_table import encode_block, encode_length, encode_name


class HeadTemplate:
    """CONNECTs to `authority` from a workload that `baggage` describes; `host` is the service that
    was asked for, or empty. All are ASCII.
    """

    __slots__ = ("_baggage", "_beginning", "_forwarded", "_forwarded_end", "_trace", "head")

    def __init__(self, authority: str, baggage: Baggage, host: str) -> None:
        self.head = ConnectHead(authority, baggage, Forwarded("", host))
        """What they all have in common."""
        pseudo = [(b":method", b"CONNECT"), (b":authority", authority.encode("ascii"))]
        self._beginning = encode_block(pseudo) + encode_name(b"baggage")
        told = encode_baggage(baggage)
        self._baggage = f"{told}{',' if told else ''}{CONNECTION_KEY}".encode("ascii")
        self._forwarded = encode_name(b"forwarded")
        self._forwarded_end = f'";host={host}'.encode("ascii") if host else b'"'
        self._trace = encode_name(b"traceparent")

    def block(self, connection_id: str, for_address: str, traceparent: str) -> bytes:
        """The block of one of them. None of the three is empty; all are ASCII."""
        told = self._baggage + connection_id.encode("ascii")
        forwarded = b'for="%b%b' % (for_address.encode("ascii"), self._forwarded_end)
        return b"".join(
            (
                self._beginning,
                encode_length(len(told)),
                told,
                self._forwarded,
                encode_length(len(forwarded)),
                forwarded,
                self._trace,
                encode_length(len(traceparent)),
                traceparent.encode("ascii"),
            )
        )
