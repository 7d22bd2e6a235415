"""nftables through libnftables.so.1 by ctypes: text in, one transaction, JSON out.

In-process, because a pod's rules are one setns and one call away that way; `nft -f -` would
cost a process each. A context per call: its netlink socket belongs to the namespace of the
calling thread, so call these inside `netns.inside(fd)`. A transaction waits some ten
milliseconds for the kernel (the GIL is released): call it in a worker thread.

A transaction with an error in it changes nothing.

The library is not made for threads. Listing keeps its place in `strtok`, so one listing runs
at a time. Applying keeps nothing as long as the text names no protocol by a word that it
would look up (`meta l4proto tcp`): `netconfig.ruleset` has none, and a test says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import socket
import struct
import threading
from dataclasses import dataclass
from typing import Any

from mesh.errors import KernelError
from netconfig.ruleset import TABLE

LIBRARY = "libnftables.so.1"
# Output without counters and handles' noise, as JSON.
_STATELESS, _JSON = 1 << 2, 1 << 4
_MESSAGE_CHARACTERS = 600

_NETLINK_NETFILTER = 12
_NFNL_SUBSYS_NFTABLES = 10
_NFT_MSG_GETGEN = 16
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2


@dataclass(frozen=True, slots=True)
class Generation:
    """The state of a namespace's rules: changes with every commit, whoever made it.

    `pid` and `program` tell of the last one; the pid is the initial pid namespace's.
    """

    number: int
    pid: int
    program: str


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        lib = ctypes.CDLL(LIBRARY)
    except OSError as exc:
        raise KernelError(
            f"{LIBRARY} is missing: {exc}", hint="apt-get install libnftables1"
        ) from exc
    lib.nft_ctx_new.restype = ctypes.c_void_p
    lib.nft_ctx_new.argtypes = [ctypes.c_uint32]
    for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
        getattr(lib, name).restype = ctypes.c_char_p
        getattr(lib, name).argtypes = [ctypes.c_void_p]
    for name in ("nft_ctx_buffer_output", "nft_ctx_buffer_error", "nft_ctx_free"):
        getattr(lib, name).argtypes = [ctypes.c_void_p]
    lib.nft_ctx_output_set_flags.argtypes = [ctypes.c_void_p, ctypes.c_uint]
    lib.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    return lib


def check_library() -> None:
    """Fail early. Raises KernelError naming the package when libnftables is missing."""
    _library()


def run(text: str, *, flags: int = 0) -> str:
    """Run commands as one transaction; what they print.

    Raises KernelError with nft's own message; then nothing has changed.
    """
    lib = _library()
    context = lib.nft_ctx_new(0)
    if not context:
        raise KernelError("nft_ctx_new failed", command="nft")
    try:
        lib.nft_ctx_buffer_output(context)
        lib.nft_ctx_buffer_error(context)
        lib.nft_ctx_output_set_flags(context, flags)
        code = lib.nft_run_cmd_from_buffer(context, text.encode())
        if code:
            message = (lib.nft_ctx_get_error_buffer(context) or b"").decode("utf-8", "replace")
            raise KernelError(
                f"nft: {message.strip()[:_MESSAGE_CHARACTERS] or 'failed without a message'}",
                errno=_errno_in(message),
                command=text.splitlines()[0] if text else "",
            )
        return (lib.nft_ctx_get_output_buffer(context) or b"").decode("utf-8", "replace")
    finally:
        lib.nft_ctx_free(context)


def _errno_in(message: str) -> int:
    """The errno that nft put into words, as far as code asks for it."""
    for number in (2, 1, 16, 17):  # ENOENT EPERM EBUSY EEXIST
        if os.strerror(number) in message:
            return number
    return 0


_one_listing = threading.Lock()


def list_json(what: str) -> list[dict[str, Any]]:
    """`list {what}`: nft's JSON items, without counters. Raises KernelError."""
    with _one_listing:
        text = run(f"list {what}", flags=_STATELESS | _JSON)
    document = json.loads(text or '{"nftables": []}')
    return [item for item in document["nftables"] if "metainfo" not in item]


def table_hash() -> str | None:
    """A hash of our table that counters, handles and other tables leave alone.

    None when the table does not exist. Raises KernelError.
    """
    try:
        items = list_json(f"table inet {TABLE}")
    except KernelError as exc:
        if exc.errno == 2:
            return None
        raise
    text = json.dumps(_without_handles(items), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _without_handles(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_handles(each) for key, each in value.items() if key != "handle"}
    if isinstance(value, list):
        return [_without_handles(each) for each in value]
    return value


def foreign_nat_chains() -> list[str]:
    """Base chains of type nat in other tables, which may decide before ours."""
    found = []
    for item in list_json("chains"):
        chain = item.get("chain", {})
        if chain.get("type") == "nat" and (chain.get("family"), chain["table"]) != ("inet", TABLE):
            found.append(f"{chain.get('family')} {chain['table']} {chain['name']}")
    return found


def generation() -> Generation:
    """The generation of the rules in the calling thread's namespace; five microseconds.

    Raises KernelError.
    """
    header = struct.pack(
        "=IHHII", 20, _NFNL_SUBSYS_NFTABLES << 8 | _NFT_MSG_GETGEN, _NLM_F_REQUEST, 1, 0
    )
    with contextlib.closing(
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
    ) as sock:
        try:
            sock.send(header + struct.pack("=BBH", socket.AF_UNSPEC, 0, 0))
            answer = sock.recv(4096)
        except OSError as exc:
            raise KernelError(
                f"generation of the rules: {exc.strerror}", errno=exc.errno or 0, command="GETGEN"
            ) from exc
    length, kind = struct.unpack_from("=IH", answer)
    if kind == _NLMSG_ERROR:
        number = -struct.unpack_from("=i", answer, 16)[0]
        raise KernelError(
            f"generation of the rules: {os.strerror(number)}", errno=number, command="GETGEN"
        )
    attributes: dict[int, bytes] = {}
    offset = 20
    while offset + 4 <= min(length, len(answer)):
        size, name = struct.unpack_from("=HH", answer, offset)
        attributes[name & 0x3FFF] = answer[offset + 4 : offset + size]
        offset += max(4, (size + 3) & ~3)
    return Generation(
        int.from_bytes(attributes.get(1, b""), "big"),
        int.from_bytes(attributes.get(2, b""), "big"),
        attributes.get(3, b"").rstrip(b"\0").decode("utf-8", "replace"),
    )
