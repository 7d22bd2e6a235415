"""Everything that can go wrong, in six branches, because a catcher can do six different things.

    MeshError                   .flag  .hint  .retryable
    ├─ ConfigError              a flag, variable, file or object is wrong
    ├─ ProtocolError
    │  ├─ LocalProtocolError    we broke a rule: a bug
    │  └─ RemoteProtocolError   the peer broke it; .http_status, .h2_code
    ├─ IdentityError            untrusted, expired, wrong SPIFFE ID
    ├─ Denied                   policy refused; .policy
    ├─ Unavailable              nobody to answer: refused, timeout, no endpoint, draining
    └─ KernelError              netns, nft, netlink; .errno, .command

A decision is not an exception: planners return a `Refusal`. Anything that is not a
`MeshError` is a bug and reaches `mesh.runtime.lifecycle`.
"""

from __future__ import annotations

from dataclasses import dataclass


class MeshError(Exception):
    """Base of every expected failure.

    `flag` is the short response flag of the access log, `hint` says what to look at
    next, `retryable` whether the same attempt may succeed later.
    """

    flag: str = "-"
    retryable: bool = False

    def __init__(self, message: str, *, hint: str = "", flag: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        if flag is not None:
            self.flag = flag


class ConfigError(MeshError):
    """A flag, variable, file or object is wrong.

    `file`, `line` and `column` (1-based) and `field` say where, as far as known.
    """

    def __init__(
        self,
        message: str,
        *,
        file: str = "",
        line: int = 0,
        column: int = 0,
        field: str = "",
        hint: str = "",
    ) -> None:
        super().__init__(message, hint=hint)
        self.message = message
        self.file = file
        self.line = line
        self.column = column
        self.field = field

    def __str__(self) -> str:
        where = self.file
        if where and self.line:
            where += f":{self.line}"
            if self.column:
                where += f":{self.column}"
        return ": ".join(part for part in (where, self.field, self.message) if part)


class ProtocolError(MeshError):
    """A rule of a protocol was broken."""


class LocalProtocolError(ProtocolError):
    """We broke it: a bug on this side."""


class RemoteProtocolError(ProtocolError):
    """The peer broke it; answer with `http_status` or `h2_code`."""

    def __init__(
        self, message: str, *, http_status: int = 400, h2_code: int = 1, hint: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        self.http_status = http_status
        self.h2_code = h2_code


class IdentityError(MeshError):
    """A peer is not who it must be, or a certificate cannot be had."""

    flag = "IDENTITY_ERROR"


class Denied(MeshError):
    """Policy refused; `policy` is `namespace/name`."""

    flag = "DENY"

    def __init__(self, message: str, *, policy: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.policy = policy


class Unavailable(MeshError):
    """Nobody to answer: refused, timed out, no endpoint, draining."""

    flag = "CONNECT"
    retryable = True


class KernelError(MeshError):
    """A namespace, nftables or netlink operation failed."""

    def __init__(self, message: str, *, errno: int = 0, command: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.errno = errno
        self.command = command


@dataclass(frozen=True, slots=True)
class Refusal:
    """A decision not to carry something: returned by planners, never raised.

    `policy` is `namespace/name` of the policy that decided and `rule` the index of its
    rule, when one did; `http_status` is the answer where the asker speaks HTTP.
    """

    flag: str
    reason: str
    hint: str = ""
    policy: str = ""
    rule: int | None = None
    http_status: int = 503
