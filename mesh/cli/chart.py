"""Writes `manifests/`: rendered YAML, and the same as a Helm chart. Run by `make manifests`.

The chart's templates are the objects of `manifest` with Helm's expressions as values, so
there is one source. What YAML must not quote (numbers) is unquoted afterwards.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from mesh import __version__
from mesh.cli import definitions, manifest
from mesh.cli.install import as_yaml
from mesh.cli.values import Values

_DEFAULTS = Values()
_TEMPLATES = Values(
    namespace="{{ .Release.Namespace }}",
    image="{{ .Values.image }}",
    pull_policy="{{ .Values.imagePullPolicy }}",
    replicas="{{ int .Values.replicas }}",
    trust_domain="{{ .Values.trustDomain }}",
    cluster_id="{{ .Values.clusterId }}",
    cluster_domain="{{ .Values.clusterDomain }}",
    log_level="{{ .Values.logLevel }}",
)
_HEADER = "# Made by `make manifests`; edit mesh/cli instead.\n"


def files() -> Mapping[str, str]:
    """Every file below `manifests/`, by its path there."""
    everything = [*definitions.ours(), *definitions.istios(), *manifest.objects(_DEFAULTS)]
    # Helm makes the namespace itself (--create-namespace).
    templates = [each for each in manifest.objects(_TEMPLATES) if each["kind"] != "Namespace"]
    classless = [each for each in templates if each["kind"] != "GatewayClass"]
    gateway_class = [each for each in templates if each["kind"] == "GatewayClass"]
    has_gateways = "gateway.networking.k8s.io/v1/GatewayClass"
    return {
        "install.yaml": _HEADER + as_yaml(everything),
        "chart/Chart.yaml": _HEADER + _chart(),
        "chart/values.yaml": _HEADER + _values(),
        "chart/crds/ambit.yaml": _HEADER + as_yaml(definitions.ours()),
        "chart/crds/istio.yaml": _HEADER + as_yaml(definitions.istios()),
        "chart/templates/ambit.yaml": _HEADER + _unquoted(as_yaml(classless)),
        "chart/templates/gatewayclass.yaml": (
            _HEADER
            + f'{{{{- if .Capabilities.APIVersions.Has "{has_gateways}" }}}}\n'
            + as_yaml(gateway_class)
            + "{{- end }}\n"
        ),
    }


def _chart() -> str:
    return (
        "apiVersion: v2\nname: ambit\ndescription: An ambient service mesh\ntype: application\n"
        f"version: {__version__}\nappVersion: {__version__}\n"
    )


def _values() -> str:
    return f"""\
# Image of all daemons.
image: {_DEFAULTS.image}
imagePullPolicy: {_DEFAULTS.pull_policy}
# Controllers; one of them writes, all of them serve.
replicas: {_DEFAULTS.replicas}
trustDomain: {_DEFAULTS.trust_domain}
clusterId: {_DEFAULTS.cluster_id}
clusterDomain: {_DEFAULTS.cluster_domain}
logLevel: {_DEFAULTS.log_level}
"""


def _unquoted(text: str) -> str:
    return re.sub(r"'(\{\{ int [^']*\}\})'", r"\1", text)


def write(directory: Path) -> None:
    """Write all of them below `directory`."""
    for name, content in files().items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, "utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
