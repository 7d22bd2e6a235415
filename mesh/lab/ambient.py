"""The mesh's side of a lab: its daemons started in order, and what they need on the way.

The controller first, until it is ready and has published the root certificate; then on every
node at once the node agent and the node proxy. Proxies get the root certificate, and a token of
their own that is renewed well before it expires.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trio

from mesh.cluster.api import Ref
from mesh.errors import ConfigError, Unavailable
from mesh.lab import addresses, daemons, fetch, mounts, system_objects
from mesh.lab.kubelet import PodRunner
from mesh.lab.live import SYSTEM_NAMESPACE
from mesh.lab.merge import merge_patch_for
from mesh.lab.podspec import VolumeSource
from mesh.lab.processes import Log, Place
from mesh.lab.state import DOMAIN, LabState
from mesh.lab.tokens import AUDIENCE, LIFETIME_SECONDS, Issuer, Subject
from mesh.lab.topology import NodePlan, PodPlan

READY_SECONDS = 30.0
START_SECONDS = 60.0
CAPTURE_SECONDS = 10.0
ROOT_CERTIFICATE = Ref("ConfigMap", SYSTEM_NAMESPACE, "istio-ca-root-cert")
ROOT_KEY = "root-cert.pem"
_PASSED_ON = ("PYTHON", "COVERAGE", "LANG", "LC_", "TZ")


def program_path(environ: Mapping[str, str]) -> str:
    """The PATH of containers and daemons: this Python's own programs come first."""
    own = str(Path(sys.executable).parent)
    return os.pathsep.join(dict.fromkeys([own, *environ.get("PATH", os.defpath).split(os.pathsep)]))


class Ambient:
    """Starts the mesh in a lab and serves it as kubelet and API server."""

    def __init__(self, state: LabState, environ: Mapping[str, str]) -> None:
        self._state = state
        self._issuer = Issuer()
        base = {
            "PATH": program_path(environ),
            "HOME": environ.get("HOME", "/"),
            **{k: v for k, v in environ.items() if k.startswith(_PASSED_ON)},
        }
        self._around = daemons.Surroundings(
            run=state.run_directory,
            cluster=state.run_directory / "cluster",
            domain=DOMAIN,
            trust_domain=DOMAIN,
            base=base,
            replace=state.settings.replace,
            extra=state.settings.environment,
            python=sys.executable,
        )

    async def write_objects(self) -> None:
        """Nodes, and the mesh's own accounts, pods and Service."""
        nodes = self._state.plan.nodes
        for node in nodes:
            await self._ensure(system_objects.node_object(node))
        if not self._state.settings.mesh:
            return
        for account in ("istiod", "ztunnel"):
            await self._state.live.ensure_service_account(SYSTEM_NAMESPACE, account)
        places = [("istiod", "istiod", "control-plane", addresses.CONTROL_PLANE_IPS)]
        places += [(f"ztunnel-{node.name}", "ztunnel", node.name, node.ips) for node in nodes]
        for place in places:
            await self._ensure(system_objects.daemon_pod(SYSTEM_NAMESPACE, *place))
        await self._ensure(system_objects.controller_service(SYSTEM_NAMESPACE))

    async def _ensure(self, obj: dict[str, Any]) -> None:
        metadata = obj["metadata"]
        ref = Ref(obj["kind"], metadata.get("namespace", ""), metadata["name"])
        live = self._state.live.objects.get(ref)
        if live is None:
            await self._state.live.create(obj)
        elif patch := merge_patch_for(None, obj, live):
            await self._state.live.patch(ref, patch)

    async def start(self, services: trio.Nursery, logs: trio.Nursery) -> None:
        """Start every daemon; returns when all are ready.

        Raises Unavailable with the reason, ConfigError for settings of a daemon there is not.
        """
        self._check_names()
        directory = self._state.run_directory / "istiod"
        (directory / "ca").mkdir(parents=True, mode=0o700)
        (directory / "token-keys.json").write_text(self._issuer.public_keys(), "ascii")
        net = self._state.kernel.control_plane
        place = self._place(directory, net)
        await self._start(services, logs, self._around.controller(place, net))
        with trio.move_on_after(READY_SECONDS) as waiting:
            while ROOT_CERTIFICATE not in self._state.live.objects:
                await self._state.changed.wait()
        if waiting.cancelled_caught:
            raise Unavailable(
                f"istiod did not publish {ROOT_CERTIFICATE} within {READY_SECONDS:.0f} s"
            )
        async with trio.open_nursery() as nursery:
            for node in self._state.plan.nodes:
                nursery.start_soon(self._start_node, services, logs, node)

    def _check_names(self) -> None:
        nodes = [node.name for node in self._state.plan.nodes]
        known = {"istiod", *daemons.ON_NODES}
        known |= {f"{kind}@{node}" for kind in daemons.ON_NODES for node in nodes}
        for name in (*self._state.settings.replace, *self._state.settings.environment):
            if name not in known:
                raise ConfigError(
                    f"there is no {name} to replace",
                    hint=f"daemons: istiod, {', '.join(daemons.ON_NODES)}; "
                    f"nodes: {', '.join(nodes)}",
                )

    async def _start_node(self, services: trio.Nursery, logs: trio.Nursery, node: NodePlan) -> None:
        directory = self._around.node_directory(node.name)
        self._around.cni_path(node.name).parent.mkdir(parents=True)
        (directory / "var/run/secrets/istio").mkdir(parents=True)
        (directory / "var/run/secrets/tokens").mkdir(parents=True)
        self._write_token(node)
        self.write_root_certificate()
        net = self._state.kernel.nodes[node.name]
        place = self._place(directory, net)
        await self._start(services, logs, self._around.agent(node.name, node.index, place, net))
        await self._start(services, logs, self._around.proxy(node.name, node.index, place, net))

    async def _start(
        self, services: trio.Nursery, logs: trio.Nursery, spec: daemons.DaemonSpec
    ) -> None:
        state = self._state
        log = Log(state.run_directory / "logs" / f"{spec.name}.log")
        daemon = daemons.Daemon(spec, state.processes, log, state.speaker.say, logs, state.notify)
        state.daemons[spec.name] = daemon
        with trio.move_on_after(START_SECONDS) as waiting:
            await services.start(daemon.keep)
        if waiting.cancelled_caught:
            raise Unavailable(
                f"{spec.name} runs, but was not ready within {START_SECONDS:.0f} s"
                f"\n{daemon.last_words()}".rstrip(),
                hint=f"it has to answer 200 to {spec.ready_path}; "
                f"its command: {shlex.join(spec.argv)}",
            )
        state.ask_reroute()

    def _place(self, directory: Path, net: int) -> Place:
        """Mounts in which the controller and the cluster DNS are known."""
        hosts, resolver = directory / "hosts", directory / "resolv.conf"
        names = f"{daemons.CONTROLLER_NAME} {daemons.CONTROLLER_NAME}.{DOMAIN}"
        lines = ["127.0.0.1 localhost", "::1 localhost"]
        lines += [f"{ip} {names}" for ip in addresses.CONTROL_PLANE_IPS]
        hosts.write_text("\n".join(lines) + "\n", "ascii")
        resolver.write_text(f"nameserver {addresses.DNS_IPS[0]}\n", "ascii")
        binds = [
            mounts.Bind(str(hosts), "/etc/hosts"),
            mounts.Bind(str(resolver), "/etc/resolv.conf"),
        ]
        return Place((net, mounts.create_mounts(binds)), str(directory))

    # Files of the proxies.

    def write_root_certificate(self) -> None:
        """Hand the published root certificate to every node's proxy."""
        found = self._state.live.objects.get(ROOT_CERTIFICATE)
        content = str((found or {}).get("data", {}).get(ROOT_KEY, ""))
        for node in self._state.plan.nodes:
            directory = self._around.node_directory(node.name) / "var/run/secrets/istio"
            if content and directory.is_dir():
                _replace(directory / ROOT_KEY, content)

    def _write_token(self, node: NodePlan) -> None:
        directory = self._around.node_directory(node.name) / "var/run/secrets/tokens"
        subject = self._subject(SYSTEM_NAMESPACE, "ztunnel", f"ztunnel-{node.name}", node.name)
        _replace(directory / "istio-token", self._issuer.issue(subject, _now(), audience=AUDIENCE))

    async def refresh_tokens(self) -> None:
        """New tokens, well before the old ones expire. Never returns."""
        while True:
            await trio.sleep(LIFETIME_SECONDS / 3)
            if self._state.settings.mesh:
                for node in self._state.plan.nodes:
                    self._write_token(node)
            for runner in self._state.runners.values():
                runner.files.refresh()

    def pod_token(self, pod: PodPlan, source: VolumeSource) -> str:
        """A token for a pod's projected volume."""
        subject = self._subject(pod.namespace, pod.spec.service_account, pod.name, pod.node)
        audience = source.audience or "https://kubernetes.default.svc.cluster.local"
        lifetime = float(source.expiration)
        return self._issuer.issue(subject, _now(), audience=audience, lifetime=lifetime)

    def _subject(self, namespace: str, account: str, pod: str, node: str) -> Subject:
        uid = self._state.live.uid_of
        return Subject(
            namespace,
            account,
            uid("ServiceAccount", namespace, account),
            pod,
            uid("Pod", namespace, pod),
            node,
            uid("Node", "", node),
        )

    # Pods.

    async def capture(self, runner: PodRunner) -> None:
        """What a CNI plugin does: tell the node agent of a new pod, and wait for its word."""
        if not self._state.settings.mesh or runner.pod.spec.host_network:
            return
        target = fetch.Target(path=self._around.cni_path(runner.pod.node))
        addresses_of_pod = [
            {"Interface": 0, "Address": {"IP": ip, "Mask": ""}} for ip in runner.pod.ips
        ]
        body = json.dumps(
            {
                "Netns": str(runner.netns_path),
                "PodName": runner.pod.name,
                "PodNamespace": runner.pod.namespace,
                "IPs": addresses_of_pod,
            }
        ).encode()
        wait = 0.02
        while True:
            message = "waits for the node agent"
            with contextlib.suppress(Unavailable), trio.move_on_after(CAPTURE_SECONDS):
                status, said = await fetch.request(target, "POST", "/cmdadd", body=body)
                if status == 200:
                    runner.message = ""
                    return
                message = f"capture: {said.decode('utf-8', 'replace').strip()[:200]}"
            await runner.explain(message)
            await trio.sleep(wait)
            wait = min(1.0, wait * 1.5)


def _now() -> float:
    """Seconds since 1970."""
    return time.clock_gettime(time.CLOCK_REALTIME)


def _replace(path: Path, content: str) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(content, "ascii")
    beside.chmod(0o600)
    beside.replace(path)
