"""The stores that policies share their limits in, each opened once and kept open while it is asked.

What runs here is their upkeep; a request asks a store from its own task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import trio

from mesh.errors import ConfigError
from mesh.runtime import log
from waypoint.filters.rate_limit.gcra import Rate, Verdict
from waypoint.filters.rate_limit.local import Key

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

MAX_STORES = 32
MAX_CREDENTIALS_BYTES = 4096
_log = log.get("rate_limit")


class Store(Protocol):
    """Buckets that others use, too."""

    address: str

    @property
    def is_answering(self) -> bool:
        """Whether it is worth asking."""
        ...

    async def run(self) -> None:
        """Its upkeep, for ever."""
        ...

    async def hit(
        self, scope: str, asked: Sequence[tuple[str, Key, Rate, int]], seconds: float
    ) -> list[Verdict]:
        """Take from the buckets of `scope`. Raises Unavailable."""
        ...


class Stores:
    """By address. `run` has to run for them to answer."""

    def __init__(self, credentials: str = "", registry: CollectorRegistry | None = None) -> None:
        """`credentials` is the file with `password` or `user:password`; there need not be one."""
        self._credentials = credentials
        self._known: dict[str, Store] = {}
        self._send, self._receive = trio.open_memory_channel[Store](MAX_STORES)
        self._count: Callable[[str, str], None] = lambda _address, _outcome: None
        self._silent: set[str] = set()
        if registry is not None:
            from prometheus_client import Counter

            asked = Counter(
                "ambit_rate_limit_store_requests",
                "Requests judged by a shared store: answered, or failed and judged without it",
                ["store", "outcome"],
                registry=registry,
            )
            self._count = lambda address, outcome: asked.labels(address, outcome).inc()

    def redis(self, address: str) -> Store:
        """The Redis at `address`. Raises ConfigError."""
        found = self._known.get(address)
        if found is None:
            if len(self._known) >= MAX_STORES:
                raise ConfigError(f"more than {MAX_STORES} stores")
            from waypoint.filters.rate_limit.redis_store import RedisStore  # 23 MiB: only now

            found = self._known[address] = RedisStore(address, self._read_credentials)
            self._send.send_nowait(found)
        return found

    def _read_credentials(self) -> str:
        if not self._credentials:
            return ""
        try:
            with Path(self._credentials).open("rb") as file:
                return file.read(MAX_CREDENTIALS_BYTES).decode().strip()
        except FileNotFoundError:
            return ""  # a Redis that wants some says so
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"credentials cannot be read: {exc}") from exc

    async def run(self) -> None:
        """The stores' upkeep, for ever. If cancelled: they are closed."""
        async with trio.open_nursery() as nursery:
            async for store in self._receive:
                nursery.start_soon(store.run)

    def answered(self, address: str) -> None:
        """A request was judged by that store."""
        self._count(address, "answered")
        if address in self._silent:
            self._silent.discard(address)
            _log.info("store_answers_again", store=address)

    def failed(self, address: str, why: str) -> None:
        """A request was judged without it; told once, not for each."""
        self._count(address, "failed")
        if address not in self._silent:
            self._silent.add(address)
            _log.warning("store_does_not_answer", store=address, error=why)
