"""Buckets in a Redis, for limits that all replicas keep together: one script, one round trip for
the rules of a policy that concern a request, and Redis' own clock.

The script is the generic cell rate algorithm of `gcra`. What names a bucket is hashed, so that no
identity, header or token of a caller is stored; the rules of a policy lie in one hash slot, and a
bucket ends by itself when it is full. Whoever waits for an answer waits for `timeout` at most;
after a failure nobody waits until one probe has been answered. coredis costs 23 MiB, so only a
waypoint that shares limits imports it (`waypoint.filters.rate_limit.stores`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import ssl
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import anyio
import trio
from coredis import Redis
from coredis.exceptions import AuthenticationError, RedisError
from coredis.retry import NoRetryPolicy

from mesh.errors import ConfigError, Unavailable
from waypoint.filters.rate_limit.gcra import NEVER, Rate, Verdict, hit
from waypoint.filters.rate_limit.local import Key

MAX_CONNECTIONS = 16
CONNECT_SECONDS = 1.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 5.0
_MICRO = 1_000_000
# For each key: microseconds for one request, its burst, the cost. Answers allowed, and until when
# the bucket is full; refused, that and how long to wait.
_SCRIPT = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local out = {}
for i, key in ipairs(KEYS) do
  local interval, burst, cost = ARGV[3 * i - 2] + 0, ARGV[3 * i - 1] + 0, ARGV[3 * i] + 0
  local start = math.max(tonumber(redis.call('GET', key) or '0'), now)
  local after = start + interval * cost
  local wait = after - interval * burst - now
  if wait <= interval * 0.000001 then
    if after > now then
      redis.call('SET', key, string.format('%.0f', after), 'PX', math.ceil((after - now) / 1000))
    end
    out[i] = {1, math.ceil(after - now), 0}
  else
    out[i] = {0, math.ceil(start - now), math.ceil(wait)}
  end
end
return out
"""

Asked = tuple[str, Key, Rate, int]
"""A rule's name, the caller's key, the rate, the cost."""


class RedisStore:
    """One Redis, as `redis://` or `rediss://` (TLS, the system's roots) names it."""

    def __init__(self, address: str, credentials: Callable[[], str] = str) -> None:
        """`credentials` gives `password` or `user:password`, again when Redis has refused them.

        Raises ConfigError.
        """
        url = urlsplit(address if "://" in address else f"redis://{address}")
        try:
            port = url.port or 6379
        except ValueError as exc:
            raise ConfigError(f"{address!r} is no address of a Redis: {exc}") from exc
        if url.scheme not in ("redis", "rediss") or not url.hostname:
            raise ConfigError(f"{address!r} is no address of a Redis")
        if url.username or url.password:
            raise ConfigError("credentials are no part of a policy", hint="RATE_LIMIT_CREDENTIALS")
        self.address = address
        self._credentials = credentials
        self._login = credentials()
        self._refused = trio.Event()
        self._open = functools.partial(
            Redis,
            url.hostname,
            port,
            int(url.path.strip("/") or 0),
            ssl_context=ssl.create_default_context() if url.scheme == "rediss" else None,
            connect_timeout=CONNECT_SECONDS,
            stream_timeout=CONNECT_SECONDS,
            max_connections=MAX_CONNECTIONS,
            retry_policy=NoRetryPolicy(),
        )
        self._client: Redis[bytes] | None = None
        self._pause = 0.0
        self._silent_until = 0.0

    @property
    def is_answering(self) -> bool:
        """Whether it is worth asking: the last answer came, or it is time for a probe."""
        return self._client is not None and trio.current_time() >= self._silent_until

    async def run(self) -> None:
        """Keep connections, for ever. If cancelled: they are closed."""
        while True:
            self._refused = trio.Event()
            user, _, password = self._login.rpartition(":")
            try:
                async with self._open(username=user or None, password=password or None) as client:
                    self._client = client
                    await self._refused.wait()
            except* (RedisError, OSError, anyio.BrokenResourceError, anyio.EndOfStream):
                pass  # who asked has been told
            finally:
                self._client = None
            await trio.sleep(FIRST_PAUSE_SECONDS)
            with contextlib.suppress(ConfigError):  # those before may still be right
                self._login = self._credentials()

    async def hit(self, scope: str, asked: Sequence[Asked], seconds: float) -> list[Verdict]:
        """Take from the buckets of `scope`, within `seconds`. Raises Unavailable.

        If cancelled: what was asked may have been taken.
        """
        client = self._client
        if client is None or not self.is_answering:
            raise Unavailable(f"{self.address} does not answer")
        if self._pause:
            # One probes, the others need not wait for it.
            self._silent_until = trio.current_time() + self._pause
        counted = [each for each in asked if each[2].interval != NEVER]
        try:
            with trio.fail_after(seconds):
                said = await self._ask(client, scope, counted) if counted else []
        except trio.TooSlowError as exc:
            raise self._failed(f"no answer within {seconds * 1000:g} ms") from exc
        except AuthenticationError as exc:
            self._refused.set()
            raise self._failed(str(exc)) from exc
        except (RedisError, OSError, anyio.BrokenResourceError, anyio.EndOfStream) as exc:
            raise self._failed(str(exc) or type(exc).__name__) from exc
        self._pause = self._silent_until = 0.0
        answers = iter(said)
        return [
            hit(0.0, 0.0, rate, cost) if rate.interval == NEVER
            else _verdict(next(answers), rate, cost)
            for _, _, rate, cost in asked
        ]  # fmt: skip

    async def _ask(
        self, client: Redis[bytes], scope: str, asked: Sequence[Asked]
    ) -> list[list[int]]:
        slot = _digest(scope)
        keys = [f"ambit:{{{slot}}}:{_digest(rule, *key)}" for rule, key, _, _ in asked]
        arguments: list[float] = []
        for _, _, rate, cost in asked:
            arguments += [rate.interval * _MICRO, rate.burst, cost]
        script = client.register_script(_SCRIPT)
        answer: Any = await script(keys, arguments)
        if not isinstance(answer, list) or len(answer) != len(asked):
            raise Unavailable(f"{self.address} answers nonsense")
        return [[int(part) for part in each] for each in answer]

    def _failed(self, why: str) -> Unavailable:
        self._pause = min(LONGEST_PAUSE_SECONDS, self._pause * 2 or FIRST_PAUSE_SECONDS)
        self._silent_until = trio.current_time() + self._pause
        return Unavailable(f"{self.address}: {why}")


def _digest(*parts: str) -> str:
    made = hashlib.blake2b(digest_size=16)
    for each in parts:
        data = each.encode("utf-8", "surrogateescape")
        made.update(b"%d:" % len(data) + data)
    return made.hexdigest()


def _verdict(said: Sequence[int], rate: Rate, cost: int) -> Verdict:
    """The script's answer as `gcra.hit` would put it; `full_at` is counted from now."""
    is_allowed, full_in, wait = bool(said[0]), said[1] / _MICRO, said[2] / _MICRO
    left = max(0.0, rate.interval * rate.burst - full_in)
    remaining = int((left + rate.interval * 1e-6) / rate.interval)
    retry = 0.0 if is_allowed else NEVER if cost > rate.burst else max(wait, 1 / _MICRO)
    return Verdict(is_allowed, full_in, remaining, retry, math.ceil(full_in * 1000) / 1000)
