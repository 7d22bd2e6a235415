"""What is put in a value's place: a mask, nothing, a keyed hash, a token.

- mask: one mask character for each character, the last `keep_last` kept; nothing is kept of a value
  that is not longer than twice that. A mask of several characters stands once.
- hash: `hash_` and 32 letters: keyed BLAKE2b of the bytes, 128 bits.
- tokenize: `tok_<kind>_` and 24 letters; the same however a value is written (case, separators).

Letters are a to p, one for each half byte, so no detector takes a result for a value. Without
the key neither can be made from a guessed value.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b

from mesh.errors import ConfigError
from mesh.model.l7_policy import RedactionAction

MIN_KEY_BYTES = 16
KEY_SECONDS = 10.0
_LETTERS = bytes.maketrans(b"0123456789abcdef", b"abcdefghijklmnop")
_SEPARATORS = b" \t-./()"


class Secret:
    """The key of one policy. It does not show itself. A file that changes is read again."""

    __slots__ = ("_asked_at", "_key", "_read")

    def __init__(self, key: bytes, read: Callable[[], bytes] | None = None) -> None:
        """`read` gives the key anew. Raises `ConfigError` for a key that could be guessed."""
        self._read = read
        self._asked_at = 0.0
        self._set(key)

    def refresh(self, now: float) -> None:
        """Read the key again, every `KEY_SECONDS`; one that is not good leaves the old one."""
        if self._read is not None and now - self._asked_at >= KEY_SECONDS:
            self._asked_at = now
            with suppress(ConfigError):
                self._set(self._read())

    def _set(self, key: bytes) -> None:
        if len(key) < MIN_KEY_BYTES:
            raise ConfigError(
                f"key of redaction has {len(key)} bytes, needs at least {MIN_KEY_BYTES}",
                hint="head -c 32 /dev/urandom > key; kubectl create secret generic ...",
            )
        self._key = blake2b(key, digest_size=32, person=b"ambit-redact-key").digest()

    def digest(self, purpose: bytes, value: bytes, size: int) -> bytes:
        """`size` letters, different for each purpose (16 bytes at most)."""
        found = blake2b(value, key=self._key, digest_size=size // 2, person=purpose).hexdigest()
        return found.encode("ascii").translate(_LETTERS)


def replace(action: RedactionAction, kind: str, value: bytes, secret: Secret | None) -> bytes:
    """What stands for `value` (its view, escapes undone). `block` has no replacement: `filter`.

    Raises `ConfigError`: the action is keyed and there is no key.
    """
    if action.kind in ("drop", "block"):
        return b""
    if action.kind == "mask":
        return _mask(action, value)
    if secret is None:
        raise ConfigError(f"redaction by {action.kind} without a key", hint="set keyFile")
    if action.kind == "hash":
        return b"hash_" + secret.digest(b"hash", value, 32)
    return b"tok_" + kind.encode() + b"_" + secret.digest(b"token", normalize(kind, value), 24)


def normalize(kind: str, value: bytes) -> bytes:
    """One spelling of a value: case and separators do not count where they carry nothing."""
    if kind in ("payment-card", "phone", "national-id", "iban"):
        return value.translate(None, _SEPARATORS).upper()
    return value.lower() if kind in ("email", "ip") else value


def _mask(action: RedactionAction, value: bytes) -> bytes:
    text = value.decode("utf-8", "replace")
    kept = action.keep_last if len(text) > 2 * action.keep_last else 0
    end = text[len(text) - kept :] if kept else ""
    if len(action.mask) != 1:
        return (action.mask + end).encode("utf-8")
    return (action.mask * (len(text) - kept) + end).encode("utf-8")
