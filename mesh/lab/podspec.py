"""What a pod asks for: containers, probes, variables and volumes, parsed from its spec.

Pure. The lab runs a container's `command` and `args` as processes of this machine, so `image`
and what belongs to it (pull policy, resources, security context) is read by nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mesh.cluster.fields import Reader, format_path
from mesh.errors import ConfigError

RestartPolicy = Literal["Always", "OnFailure", "Never"]


@dataclass(frozen=True, slots=True)
class Probe:
    """One probe; times in seconds. `port` is a number or the name of one of the ports."""

    kind: Literal["http", "tcp", "exec"]
    port: int | str = 0
    host: str = ""
    path: str = "/"
    headers: tuple[tuple[str, str], ...] = ()
    command: tuple[str, ...] = ()
    initial_delay: int = 0
    period: int = 10
    timeout: int = 1
    failures: int = 3
    successes: int = 1


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable: a literal, or taken from a field, ConfigMap or Secret."""

    name: str
    value: str = ""
    source: Literal["literal", "field", "ConfigMap", "Secret"] = "literal"
    object_name: str = ""
    key: str = ""
    optional: bool = False


@dataclass(frozen=True, slots=True)
class VariableSet:
    """All keys of a ConfigMap or Secret as variables."""

    source: Literal["ConfigMap", "Secret"]
    object_name: str
    prefix: str = ""
    optional: bool = False


@dataclass(frozen=True, slots=True)
class VolumeMount:
    """Where a container sees a volume."""

    volume: str
    path: str
    sub_path: str = ""
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class VolumeSource:
    """One source of files: `items` maps keys (or field paths) to relative paths; () means all."""

    kind: Literal["ConfigMap", "Secret", "fields", "token"]
    object_name: str = ""
    items: tuple[tuple[str, str], ...] = ()
    optional: bool = False
    audience: str = ""
    expiration: int = 3600


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume: files from sources, an empty directory, a claim's directory, or a host path."""

    name: str
    kind: Literal["files", "empty", "claim", "host"]
    sources: tuple[VolumeSource, ...] = ()
    path: str = ""  # of the host, or the claim's name
    mode: int = 0o644


@dataclass(frozen=True, slots=True)
class Container:
    """One container."""

    name: str
    command: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    variables: tuple[Variable, ...] = ()
    variable_sets: tuple[VariableSet, ...] = ()
    directory: str = ""
    ports: tuple[tuple[str, int], ...] = ()
    mounts: tuple[VolumeMount, ...] = ()
    readiness: Probe | None = None
    liveness: Probe | None = None
    startup: Probe | None = None
    is_sidecar: bool = False  # an init container with restartPolicy Always


@dataclass(frozen=True, slots=True)
class PodSpec:
    """A pod's spec, as far as the lab acts on it."""

    containers: tuple[Container, ...]
    init_containers: tuple[Container, ...] = ()
    volumes: tuple[Volume, ...] = ()
    restart_policy: RestartPolicy = "Always"
    grace_seconds: int = 30
    service_account: str = "default"
    host_network: bool = False
    hostname: str = ""
    subdomain: str = ""
    node_name: str = ""
    node_selector: tuple[tuple[str, str], ...] = ()
    host_aliases: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def named_port(self, name: str) -> int | None:
        """The number of a container port by its name."""
        for container in self.containers:
            for port_name, number in container.ports:
                if port_name == name:
                    return number
        return None


def parse_pod_spec(spec: Reader) -> PodSpec:
    """Parse a pod's spec. Raises ConfigError with the field's path."""
    volumes = tuple(_volume(item) for item in spec.get("volumes").items())
    known = {volume.name for volume in volumes}
    containers = tuple(_container(item, known) for item in spec.get("containers").items())
    if not containers:
        spec.get("containers").fail("is required and may not be empty")
    init = tuple(_container(item, known) for item in spec.get("initContainers").items())
    names = [container.name for container in (*init, *containers)]
    for name in names:
        if names.count(name) > 1:
            spec.get("containers").fail(f"two containers are named {name}")
    _refuse_clashes(spec, (*init, *containers))
    policy = spec.get("restartPolicy").text("Always")
    if policy not in ("Always", "OnFailure", "Never"):
        spec.get("restartPolicy").fail(f"{policy!r} is none of Always, OnFailure, Never")
    return PodSpec(
        containers=containers,
        init_containers=init,
        volumes=volumes,
        restart_policy=policy,  # type: ignore[arg-type]  # narrowed by the check above
        grace_seconds=_number(spec.get("terminationGracePeriodSeconds"), 30),
        service_account=spec.get("serviceAccountName").text() or "default",
        host_network=spec.get("hostNetwork").boolean(),
        hostname=spec.get("hostname").text(),
        subdomain=spec.get("subdomain").text(),
        node_name=spec.get("nodeName").text(),
        node_selector=tuple(sorted(spec.get("nodeSelector").labels().items())),
        host_aliases=tuple(
            (item.get("ip").name(), item.get("hostnames").texts())
            for item in spec.get("hostAliases").items()
        ),
    )


def _container(item: Reader, volumes: set[str]) -> Container:
    command = _arguments(item.get("command"))
    if not command:
        item.get("command").fail(
            "is required, because the lab ignores image",
            hint="write the program of the image's entrypoint as command",
        )
    mounts = tuple(
        VolumeMount(
            mount.get("name").name(),
            mount.get("mountPath").name(),
            mount.get("subPath").text(),
            mount.get("readOnly").boolean(),
        )
        for mount in item.get("volumeMounts").items()
    )
    for index, mount in enumerate(mounts):
        where = Reader({}, (*item.path, "volumeMounts", index))
        if mount.volume not in volumes:
            where.get("name").fail(f"the pod has no volume {mount.volume!r}")
        if not mount.path.startswith("/"):
            where.get("mountPath").fail(f"{mount.path!r} is not absolute")
        if ".." in mount.path.split("/") or ".." in mount.sub_path.split("/"):
            where.get("mountPath").fail("may not contain ..")
    return Container(
        name=item.get("name").name(),
        command=command,
        arguments=_arguments(item.get("args")),
        variables=tuple(_variable(entry) for entry in item.get("env").items()),
        variable_sets=tuple(_variable_set(entry) for entry in item.get("envFrom").items()),
        directory=item.get("workingDir").text(),
        ports=tuple(
            (
                port.get("name").text(),
                port.get("containerPort").port(),
            )
            for port in item.get("ports").items()
        ),
        mounts=mounts,
        readiness=_probe(item, "readinessProbe"),
        liveness=_probe(item, "livenessProbe"),
        startup=_probe(item, "startupProbe"),
        is_sidecar=item.get("restartPolicy").text() == "Always",
    )


def _refuse_clashes(spec: Reader, containers: tuple[Container, ...]) -> None:
    """Containers of a pod share one file tree in the lab: a path can show one thing only."""
    shown: dict[str, tuple[str, str]] = {}
    for container in containers:
        for mount in container.mounts:
            what = (mount.volume, mount.sub_path)
            if shown.setdefault(mount.path.rstrip("/"), what) != what:
                spec.get("containers").fail(
                    f"two volumes are mounted at {mount.path}, but containers of a pod share "
                    "one file tree in a lab",
                    hint="mount one of them elsewhere",
                )


def _variable(entry: Reader) -> Variable:
    name = entry.get("name").name()
    if not name or "=" in name or "\0" in name:
        entry.get("name").fail(f"{name!r} is no name of a variable")
    source = entry.get("valueFrom")
    if source.get("fieldRef").exists:
        path = source.get("fieldRef").get("fieldPath").name()
        return Variable(name, source="field", key=path)
    for kind, key in (("ConfigMap", "configMapKeyRef"), ("Secret", "secretKeyRef")):
        if source.get(key).exists:
            below = source.get(key)
            return Variable(
                name,
                source=kind,  # type: ignore[arg-type]  # one of the two literals above
                object_name=below.get("name").name(),
                key=below.get("key").name(),
                optional=below.get("optional").boolean(),
            )
    if source.value:
        source.fail(f"the lab does not know {', '.join(key for key, _ in source.entries())}")
    return Variable(name, value=entry.get("value").text())


def _variable_set(entry: Reader) -> VariableSet:
    prefix = entry.get("prefix").text()
    if entry.get("configMapRef").exists:
        below = entry.get("configMapRef")
        return VariableSet(
            "ConfigMap", below.get("name").name(), prefix, below.get("optional").boolean()
        )
    below = entry.get("secretRef")
    return VariableSet("Secret", below.get("name").name(), prefix, below.get("optional").boolean())


def _probe(container: Reader, key: str) -> Probe | None:
    if not container.get(key).exists:
        return None
    item = container.get(key)
    shared: dict[str, Any] = {
        "initial_delay": _number(item.get("initialDelaySeconds"), 0),
        "period": _number(item.get("periodSeconds"), 10, least=1),
        "timeout": _number(item.get("timeoutSeconds"), 1, least=1),
        "failures": _number(item.get("failureThreshold"), 3, least=1),
        "successes": _number(item.get("successThreshold"), 1, least=1),
    }
    if item.get("httpGet").exists:
        get = item.get("httpGet")
        scheme = get.get("scheme").text("HTTP")
        if scheme != "HTTP":
            get.get("scheme").fail(f"the lab probes by HTTP only, not {scheme}")
        path = get.get("path").text("/")
        headers = tuple(
            (h.get("name").name(), h.get("value").text()) for h in get.get("httpHeaders").items()
        )
        for text in (path, *(part for header in headers for part in header)):
            if any(ord(character) < 0x20 or ord(character) == 0x7F for character in text):
                get.get("path").fail("control characters are not allowed in a request")
        return Probe(
            "http",
            port=_port(get.get("port")),
            host=get.get("host").text(),
            path=path if path.startswith("/") else f"/{path}",
            headers=headers,
            **shared,
        )
    if item.get("tcpSocket").exists:
        tcp = item.get("tcpSocket")
        return Probe("tcp", port=_port(tcp.get("port")), host=tcp.get("host").text(), **shared)
    if item.get("exec").exists:
        command = _arguments(item.at("exec", "command"))
        if not command:
            item.at("exec", "command").fail("is required")
        return Probe("exec", command=command, **shared)
    return container.get(key).fail("needs one of httpGet, tcpSocket, exec")


def _volume(item: Reader) -> Volume:
    name = item.get("name").name()
    kinds = [key for key, _ in item.entries() if key != "name"]
    for key in ("configMap", "secret", "downwardAPI"):
        if key in kinds:
            below = item.get(key)
            mode = _number(below.get("defaultMode"), 0o644, most=0o777)
            return Volume(name, "files", (_source(key, below),), mode=mode)
    if "projected" in kinds:
        projected = item.get("projected")
        sources = []
        for entry in projected.get("sources").items():
            for key in ("configMap", "secret", "downwardAPI", "serviceAccountToken"):
                sources += [_source(key, entry.get(key))] if entry.get(key).exists else []
        mode = _number(projected.get("defaultMode"), 0o644, most=0o777)
        return Volume(name, "files", tuple(sources), mode=mode)
    if "persistentVolumeClaim" in kinds:
        claim = item.get("persistentVolumeClaim").get("claimName").name()
        return Volume(name, "claim", path=claim)
    if "hostPath" in kinds:
        path = item.get("hostPath").get("path").name()
        if not path.startswith("/"):
            item.at("hostPath", "path").fail(f"{path!r} is not absolute")
        return Volume(name, "host", path=path)
    if not kinds or "emptyDir" in kinds:
        return Volume(name, "empty")
    raise ConfigError(
        f"the lab has no volumes of kind {', '.join(kinds)}",
        field=format_path(item.path),
        hint="configMap, secret, projected, downwardAPI, emptyDir, persistentVolumeClaim, hostPath",
    )


def _source(key: str, below: Reader) -> VolumeSource:
    if key == "serviceAccountToken":
        return VolumeSource(
            "token",
            items=(("", _relative(below, "path")),),
            audience=below.get("audience").text(),
            expiration=_number(below.get("expirationSeconds"), 3600, least=600),
        )
    if key == "downwardAPI":
        fields = tuple(
            (entry.get("fieldRef").get("fieldPath").name(), _relative(entry, "path"))
            for entry in below.get("items").items()
        )
        return VolumeSource("fields", items=fields)
    items = tuple((e.get("key").name(), _relative(e, "path")) for e in below.get("items").items())
    optional = below.get("optional").boolean()
    if key == "configMap":
        return VolumeSource("ConfigMap", below.get("name").name(), items, optional)
    name = below.get("secretName").text(below.get("name").text())
    if not name:
        below.get("secretName").fail("is required")
    return VolumeSource("Secret", name, items, optional)


def _relative(entry: Reader, key: str) -> str:
    path = entry.get(key).name()
    if not path or path.startswith("/") or ".." in path.split("/"):
        entry.get(key).fail(f"{path!r} must be a relative path without ..")
    return path


def _number(reader: Reader, default: int, *, least: int = 0, most: int = 1 << 31) -> int:
    number = reader.integer(default)
    if not least <= number <= most:
        reader.fail(f"{number} is out of range {least}..{most}")
    return number


def _arguments(reader: Reader) -> tuple[str, ...]:
    # Unlike elsewhere, an empty text is a value here: `--save ""`.
    return tuple(each.text() for each in reader.items())


def _port(reader: Reader) -> int | str:
    """A port's number or name."""
    return reader.value if isinstance(reader.value, str) and reader.value else reader.port()
