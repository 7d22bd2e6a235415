"""A pod's files in the lab's tmpfs: /etc/hosts, resolv.conf, volumes, and where they are bound.

ConfigMap, Secret and projected volumes are written again whenever their objects change, each
file replaced whole. What pods see is these directories, bound into their mount namespaces.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mesh.errors import ConfigError, MeshError
from mesh.lab import addresses, mounts
from mesh.lab.environment import Objects, PodFacts, volume_files
from mesh.lab.podspec import Container, Volume, VolumeSource
from mesh.lab.topology import NodePlan, PodPlan

MAX_HOSTNAME = 63


@dataclass(slots=True)
class PodFiles:
    """The files of one pod below the lab's directory `run`."""

    pod: PodPlan
    node: NodePlan
    run: Path
    domain: str
    objects: Objects
    token: Callable[[PodPlan, VolumeSource], str]

    @property
    def directory(self) -> Path:
        """Where they are."""
        return self.run / "pods" / self.pod.uid

    @property
    def hostname(self) -> str:
        """The pod's host name."""
        return (self.pod.spec.hostname or self.pod.name)[:MAX_HOSTNAME].rstrip("-.")

    @property
    def facts(self) -> PodFacts:
        """For the downward API."""
        metadata = self.pod.object["metadata"]
        return PodFacts(
            self.pod.name,
            self.pod.namespace,
            self.pod.uid,
            self.pod.node,
            self.node.ips,
            self.pod.ips,
            self.pod.spec.service_account,
            dict(metadata.get("labels") or {}),
            dict(metadata.get("annotations") or {}),
        )

    def write(self) -> None:
        """Write everything. Raises Unavailable while an object is missing, ConfigError."""
        (self.directory / "volumes").mkdir(parents=True, exist_ok=True)
        (self.directory / "hosts").write_text(self._hosts(), "ascii")
        resolver = resolver_configuration(self.pod.namespace, self.domain)
        (self.directory / "resolv.conf").write_text(resolver, "ascii")
        for volume in self.pod.spec.volumes:
            if volume.kind == "files":
                self._write_volume(volume)

    def refresh(self) -> None:
        """Write the volumes again, after an object changed; one that is missing now stays."""
        if not self.directory.exists():
            return
        for volume in self.pod.spec.volumes:
            if volume.kind == "files":
                with contextlib.suppress(MeshError):
                    self._write_volume(volume)

    def remove(self) -> None:
        """Remove everything but claims, which outlive pods."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def binds(self) -> list[mounts.Bind]:
        """What to mount where in the pod, parents before what is inside them.

        Raises ConfigError when a source does not exist.
        """
        binds = [
            mounts.Bind(str(self.directory / "hosts"), "/etc/hosts"),
            mounts.Bind(str(self.directory / "resolv.conf"), "/etc/resolv.conf"),
        ]
        made: dict[str, mounts.Bind] = {}
        for container in containers_of(self.pod):
            for bind in self._container_binds(container):
                earlier = made.get(bind.target)
                # Containers of a pod share one file tree here, so the laxer one wins.
                if earlier is None or earlier.read_only:
                    made[bind.target] = bind
        return binds + sorted(made.values(), key=lambda bind: bind.target)

    def _container_binds(self, container: Container) -> list[mounts.Bind]:
        volumes = {volume.name: volume for volume in self.pod.spec.volumes}
        made = []
        for mount in container.mounts:
            volume = volumes[mount.volume]
            source = self._volume_directory(volume)
            if mount.sub_path:
                source = source / mount.sub_path
                if not source.exists() and volume.kind in ("empty", "claim"):
                    source.mkdir(parents=True)
            if not source.exists():
                raise ConfigError(f"{source} does not exist", field="volumes")
            read_only = mount.read_only or volume.kind == "files"
            made.append(mounts.Bind(str(source), os.path.normpath(mount.path), read_only))
        return made

    def _volume_directory(self, volume: Volume) -> Path:
        match volume.kind:
            case "host":
                return Path(volume.path)
            case "claim":
                directory = self.run / "claims" / self.pod.namespace / volume.path
            case _:
                directory = self.directory / "volumes" / volume.name
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def _write_volume(self, volume: Volume) -> None:
        def token(source: VolumeSource) -> str:
            return self.token(self.pod, source)

        files = volume_files(volume, self.facts, self.objects, token)
        directory = self._volume_directory(volume)
        for name, content in files.items():
            path = directory / name
            if path.exists() and path.read_bytes() == content:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f".{path.name}.new")
            beside.write_bytes(content)
            beside.chmod(volume.mode)
            beside.replace(path)
        for path in directory.rglob("*"):
            if path.is_file() and str(path.relative_to(directory)) not in files:
                path.unlink()

    def _hosts(self) -> str:
        spec, name = self.pod.spec, self.hostname
        full = ""
        if spec.subdomain:
            full = f"{name}.{spec.subdomain}.{self.pod.namespace}.svc.{self.domain} "
        lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"]
        lines += [f"{ip} {full}{name}" for ip in self.pod.ips]
        lines += [f"{ip} {' '.join(names)}" for ip, names in spec.host_aliases]
        return "\n".join(lines) + "\n"


def containers_of(pod: PodPlan) -> tuple[Container, ...]:
    """All containers of a pod, init containers first."""
    return (*pod.spec.init_containers, *pod.spec.containers)


def resolver_configuration(namespace: str, domain: str) -> str:
    """A pod's /etc/resolv.conf, as ClusterFirst has it."""
    search = f"{namespace}.svc.{domain} svc.{domain} {domain}"
    return f"search {search}\nnameserver {addresses.DNS_IPS[0]}\noptions ndots:5\n"


def wall_clock() -> str:
    """Now, as Kubernetes writes times."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
