"""A cluster that somebody gave us (AMBIT_KUBECONFIG), with the calls of `KubeServer`.

It cannot be stopped, paused or compacted: tests that do ask for the fixture `stoppable`.
"""

from __future__ import annotations

import base64
import ssl
from pathlib import Path
from typing import Any

import yaml

from tests.support.kube import ADMIN, KubeServer


class GivenCluster(KubeServer):
    """The current context of a kubeconfig: a token or a client certificate."""

    is_given = True

    def __init__(self, directory: Path, kubeconfig: Path) -> None:
        self.directory = directory
        self.process = None
        self._file = kubeconfig
        config = yaml.safe_load(kubeconfig.read_text())
        context = _named(config["contexts"], config["current-context"])["context"]
        self._cluster = _named(config["clusters"], context["cluster"])["cluster"]
        user = _named(config["users"], context["user"]).get("user") or {}
        self.url = str(self._cluster["server"]).rstrip("/")
        self._token = str(user.get("token") or "")
        if user.get("tokenFile"):
            self._token = Path(user["tokenFile"]).read_text().strip()
        self._ca = self._pem(self._cluster, "certificate-authority", "ca.pem")
        self._context = ssl.create_default_context(cafile=self._ca)
        if self._cluster.get("insecure-skip-tls-verify"):
            self._context.check_hostname = False
            self._context.verify_mode = ssl.CERT_NONE
        # Bearer tokens are sent beside it: the server looks at a valid certificate first.
        self._with_certificate = ssl.create_default_context(cafile=self._ca)
        certificate = self._pem(user, "client-certificate", "client.pem")
        if certificate:
            key = self._pem(user, "client-key", "client.key")
            self._with_certificate.load_cert_chain(certificate, key)
        if not certificate and not self._token:
            raise SystemExit(f"{kubeconfig}: neither a token nor a client certificate")

    def _pem(self, holder: dict[str, Any], name: str, file: str) -> str | None:
        data = holder.get(f"{name}-data")
        if data:
            path = self.directory / file
            path.write_bytes(base64.b64decode(data))
            path.chmod(0o600)
            return str(path)
        found = holder.get(name)
        return str(self._file.parent / found) if found else None

    def _credentials(self, token: str) -> tuple[str, ssl.SSLContext]:
        if token == ADMIN:
            return self._token, self._with_certificate
        return token, self._context

    def close(self) -> None:
        """It is not ours to end."""

    def kubeconfig(self, token: str = ADMIN, name: str = "admin") -> Path:
        """A kubeconfig of whoever has `token`; its context is called `test`."""
        path = self.directory / f"{name}.kubeconfig"
        config = yaml.safe_load(self._file.read_text())
        context = _named(config["contexts"], config["current-context"])["context"]
        user = _named(config["users"], context["user"])["user"]
        cluster = {**self._cluster}
        if self._ca and "certificate-authority-data" not in cluster:
            cluster["certificate-authority"] = self._ca
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": name, "user": user if token == ADMIN else {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": name}}],
            "current-context": "test",
        }
        path.write_text(yaml.safe_dump(content))
        path.chmod(0o600)
        return path


def _named(listed: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(each for each in listed if each["name"] == name)
