"""Which cluster a daemon works on: the Kubernetes API, or a directory instead of it.

The `kubernetes` package costs 40 MiB and most of a second, so it is imported only by who
uses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mesh.cluster.api import Cluster
from mesh.cluster.directory import DirectoryCluster
from mesh.cluster.reflector import Report
from mesh.errors import ConfigError

KUBERNETES = "kubernetes"
DIRECTORY = "directory"
SOURCES = ("", KUBERNETES, DIRECTORY)


@dataclass(frozen=True, slots=True)
class ClusterChoice:
    """The settings CLUSTER_SOURCE, CLUSTER_DIR, KUBECONFIG and KUBE_CONTEXT.

    Without a source, a directory is taken if one is named. Raises ConfigError if a directory
    is asked for and none is named.
    """

    source: str = ""
    directory: Path | None = None
    kubeconfig: Path | None = None
    context: str = ""

    def __post_init__(self) -> None:
        if self.source == DIRECTORY and self.directory is None:
            raise ConfigError("is needed when the source is a directory", field="cluster_dir")
        if self.source == KUBERNETES and self.directory is not None:
            raise ConfigError("is of no use when the source is Kubernetes", field="cluster_dir")

    @property
    def is_kubernetes(self) -> bool:
        """Whether the source is a Kubernetes API server."""
        return self.directory is None


def open_cluster(
    choice: ClusterChoice,
    *,
    kinds: Sequence[str] = (),
    selectors: Mapping[str, str] | None = None,
    homes: Mapping[str, str] | None = None,
    manager: str,
    report: Report,
) -> Cluster:
    """The cluster that was chosen; nothing is read yet. See `KubernetesCluster` for the rest."""
    if choice.directory is not None:
        return DirectoryCluster(choice.directory, writable=True)
    from mesh.cluster.api_server import Access
    from mesh.cluster.kubernetes import KubernetesCluster

    return KubernetesCluster(
        Access(choice.kubeconfig, choice.context or None),
        kinds=kinds,
        selectors=selectors,
        homes=homes,
        manager=manager,
        report=report,
    )
