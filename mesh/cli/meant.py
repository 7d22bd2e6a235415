"""What a person meant by SRC and DST: pods, services, addresses and host names. Pure.

pod/NAME.NS   NS/NAME   svc/NAME.NS   10.1.2.3   [fd00::1]   web.shop, each with :PORT behind it.
NAME of a pod may also be what its owner calls it (a Deployment's name): then any pod of it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from mesh.cli.output import NotFound
from mesh.errors import ConfigError

Dumps: TypeAlias = Mapping[str, Mapping[str, Any]]

_PORT = re.compile(r"[0-9]{1,5}")
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252})")
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,252})")
_FORMS = "pod/NAME.NAMESPACE, NAMESPACE/NAME, svc/NAME.NAMESPACE, an address or a host name"
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Meant:
    """`name` is a pod's or service's name, an address in canonical text, or a host name."""

    kind: Literal["pod", "service", "ip", "host"]
    name: str
    namespace: str = ""
    port: int | None = None

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


def parse(text: str) -> Meant:
    """Read SRC or DST. Raises ConfigError."""
    prefix, slash, rest = text.partition("/")
    if slash:
        name, port = _split_port(rest, text)
        if prefix in ("pod", "pods", "po", "svc", "service", "services"):
            name, dot, namespace = name.rpartition(".")
            if not dot:
                name, namespace = namespace, "default"
            kind: Literal["pod", "service"] = "pod" if prefix.startswith("po") else "service"
        else:
            kind, namespace = "pod", prefix
        if not _NAME.fullmatch(name) or not _NAME.fullmatch(namespace):
            raise ConfigError(f"not a name: {text!r}", hint=f"write {_FORMS}")
        return Meant(kind, name, namespace, port)
    try:
        return Meant("ip", str(ipaddress.ip_address(text)))
    except ValueError:
        pass
    host, port = _split_port(text, text)
    try:
        return Meant("ip", str(ipaddress.ip_address(host.strip("[]"))), port=port)
    except ValueError:
        if not _HOST.fullmatch(host):
            raise ConfigError(f"not a name: {text!r}", hint=f"write {_FORMS}") from None
        return Meant("host", host.lower().rstrip("."), port=port)


def _split_port(text: str, whole: str) -> tuple[str, int | None]:
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        return text, None
    if not _PORT.fullmatch(port) or not 0 < int(port) < 65536:
        raise ConfigError(f"not a port: {whole!r}")
    return host, int(port)


def find_workload(dumps: Dumps, meant: Meant) -> Mapping[str, Any]:
    """The workload as a proxy dumps it. Raises NotFound, or ConfigError for what is none."""
    if meant.kind in ("host", "service"):
        raise ConfigError(
            f"{meant} is no pod",
            hint="a source is pod/NAME.NAMESPACE, NAMESPACE/NAME or an address",
        )
    there = {each["uid"]: each for each in _listed(dumps, "workloads")}
    if meant.kind == "ip":
        fits = [
            each
            for each in there.values()
            if meant.name in (each.get("workloadIps") or ())
            and each.get("networkMode") != "HostNetwork"
        ]
        if not fits:
            raise NotFound(f"no proxy knows a workload at {meant.name}", hint="ambit workloads")
        return fits[0]
    local = [each for each in there.values() if each.get("namespace") == meant.namespace]
    exact = [each for each in local if each.get("name") == meant.name]
    owned = [each for each in local if each.get("workloadName") == meant.name]
    fits = exact or owned
    if not fits:
        names = sorted(str(each.get("name")) for each in local)
        known = ", ".join(names[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")
        hint = f"in {meant.namespace}: {known}" if names else "ambit workloads"
        raise NotFound(f"no proxy knows a pod {meant}", hint=hint)
    return min(fits, key=lambda each: str(each.get("name")))


def find_service(dumps: Dumps, meant: Meant) -> Mapping[str, Any]:
    """The service as a proxy dumps it. Raises NotFound."""
    local = [each for each in _listed(dumps, "services") if each["namespace"] == meant.namespace]
    for each in local:
        if each.get("name") == meant.name:
            return each
    names = sorted({str(each.get("name")) for each in local})
    hint = f"in {meant.namespace}: {', '.join(names[:_SHOWN])}" if names else "ambit services"
    raise NotFound(f"no proxy knows a service {meant}", hint=hint)


def choose_port(meant: Meant, service: Mapping[str, Any] | None) -> int:
    """The port that was given, or the only one of the service. Raises ConfigError."""
    if meant.port is not None:
        return meant.port
    ports = sorted(int(each) for each in (service.get("ports") or {})) if service else []
    if len(ports) == 1:
        return ports[0]
    listed = f"its ports are {', '.join(map(str, ports))}" if ports else f"such as {meant}:80"
    raise ConfigError(f"{meant} needs a port", hint=listed)


def service_of_host(dumps: Dumps, host: str) -> Mapping[str, Any] | None:
    """A service that a host name may mean, to learn its only port; nothing is decided by it."""
    for each in _listed(dumps, "services"):
        hostname = str(each.get("hostname", ""))
        if hostname == host or hostname.startswith(f"{host}."):
            return each
    return None


def _listed(dumps: Dumps, section: str) -> Iterator[Mapping[str, Any]]:
    for dump in dumps.values():
        yield from dump.get(section) or ()
