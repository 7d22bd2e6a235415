"""Readiness, startup and liveness probes, as the kubelet makes them from the node.

Network probes are dialled in the node's namespace with the node's bridge address as their
source: that address the node agent exempts from capture, so that a probe reaches the
application and not the proxy.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import trio

from mesh.errors import MeshError, Unavailable
from mesh.lab import fetch
from mesh.lab.podspec import Container, Probe
from mesh.lab.processes import Place, Processes

MAX_MESSAGE = 200


@dataclass(frozen=True, slots=True)
class Prober:
    """Makes one container's probes. `ip` is the pod's, `source` the node's address for it."""

    processes: Processes
    container: Container
    net: int
    ip: str
    source: str
    place: Place
    environment: Mapping[str, str]

    async def once(self, probe: Probe) -> str:
        """Make a probe once: "" for success, else why it failed."""
        try:
            with trio.fail_after(probe.timeout):
                return await self._make(probe)
        except trio.TooSlowError:
            return f"no answer in {probe.timeout} s"
        except MeshError as error:
            return str(error)[:MAX_MESSAGE]

    async def _make(self, probe: Probe) -> str:
        match probe.kind:
            case "exec":
                code, output = await self.processes.run(
                    probe.command,
                    environment=self.environment,
                    place=self.place,
                    timeout=probe.timeout,
                )
                said = output.decode("utf-8", "replace").strip()[:MAX_MESSAGE]
                return "" if code == 0 else f"exit code {code}: {said}"
            case "tcp":
                async with await fetch.connect(self._target(probe)):
                    return ""
            case "http":
                headers = probe.headers
                if not any(name.lower() == "user-agent" for name, _ in headers):
                    headers = (*headers, ("User-Agent", "kube-probe/1.34"))
                status, _ = await fetch.request(
                    self._target(probe), "GET", probe.path, headers=headers, head_only=True
                )
                return "" if 200 <= status < 400 else f"HTTP {status}"

    def _target(self, probe: Probe) -> fetch.Target:
        number = probe.port
        if isinstance(number, str):
            named = dict(self.container.ports).get(number)
            if named is None:
                raise Unavailable(f"the container has no port named {number!r}")
            number = named
        ip = probe.host or self.ip
        source = self.source if (":" in ip) == (":" in self.source) else ""
        return fetch.Target(ip, number, self.net, source)

    async def watch(self, probe: Probe, report: Callable[[bool, str], Awaitable[None]]) -> None:
        """Probe for ever; `report(passed, reason)` at each change of the verdict, and first.

        The verdict turns after `failures` or `successes` equal outcomes in a row, as set.
        """
        await trio.sleep(probe.initial_delay)
        verdict: bool | None = None
        run, last = 0, True
        while True:
            started = trio.current_time()
            reason = await self.once(probe)
            passed = not reason
            run = run + 1 if passed == last else 1
            last = passed
            enough = run >= (probe.successes if passed else probe.failures)
            if enough and verdict is not passed:
                verdict = passed
                await report(passed, reason)
            await trio.sleep_until(started + probe.period)
