"""One API server for all tests of this directory; each test works in namespaces of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.kube import BINARY, GIVEN, KubeServer, running_kube
from tests.support.kube_mesh import Daemon, install, start_istiod


@pytest.fixture(scope="session")
def kube(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeServer]:
    """A kube-apiserver and an etcd; skips what wants one where none has been built."""
    directory: Path = tmp_path_factory.mktemp("kube")
    with running_kube(directory) as server:
        yield server


@pytest.fixture(autouse=True)
def _is_up(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test did to the server, the next one finds it running. A test that asks for it
    only as it runs is skipped here, where the reason is not lost.
    """
    if request.node.get_closest_marker("kube") is not None and not (GIVEN or BINARY.exists()):
        pytest.skip("no kube-apiserver has been built: make kube")
    yield
    if "kube" in request.fixturenames:
        server: KubeServer = request.getfixturevalue("kube")
        if server.is_given:
            return
        assert server.process is not None
        server.resume()
        if server.process.poll() is not None:
            server.start()


@pytest.fixture
def stoppable(kube: KubeServer) -> KubeServer:
    """The server, for tests that stop it, pause it, or make it forget."""
    if kube.is_given:
        pytest.skip("a cluster that was given to us is not ours to stop")
    return kube


@pytest.fixture(scope="session")
def installed(kube: KubeServer) -> KubeServer:
    """The mesh, with Gateway API and the objects of a small node."""
    install(kube)
    return kube


@pytest.fixture
def replicas(installed: KubeServer, tmp_path: Path) -> Iterator[list[tuple[Daemon, int]]]:
    """Two controllers of the same mesh, ready."""
    both = [start_istiod(installed, tmp_path, f"istiod-{number}") for number in range(2)]
    try:
        for daemon, _ in both:
            daemon.wait_ready("/ready")
        yield both
    finally:
        for daemon, _ in both:
            daemon.end()
