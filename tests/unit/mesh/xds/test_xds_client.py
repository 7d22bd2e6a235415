"""What a node proxy says of itself, and the metadata of its calls."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf.json_format import MessageToDict

from mesh import __version__
from mesh.errors import ConfigError
from mesh.xds.client import NodeInfo, call_metadata


def test_the_node_is_told_as_istio_reads_it() -> None:
    node = NodeInfo(
        "ztunnel-node1",
        "istio-system",
        "node1",
        addresses=("172.18.0.1", "fd00:172:18::1"),
        metadata={"NETWORK": "", "LABELS": {"app": "ztunnel"}},
    ).message()
    assert node.id == (
        "ztunnel~172.18.0.1~ztunnel-node1.istio-system~istio-system.svc.cluster.local"
    )
    assert MessageToDict(node.metadata) == {
        "NAME": "ztunnel-node1",
        "NAMESPACE": "istio-system",
        "INSTANCE_IPS": "172.18.0.1,fd00:172:18::1",
        "NODE_NAME": "node1",
        "AMBIT_VERSION": __version__,
        "NETWORK": "",
        "LABELS": {"app": "ztunnel"},
    }


def test_the_token_is_read_anew_for_each_call_and_stripped(tmp_path: Path) -> None:
    token = tmp_path / "istio-token"
    token.write_text("first\n")
    provide = call_metadata(str(token), "Kubernetes", {"x-tenant": "a"})
    assert provide() == {
        "authorization": "Bearer first",
        "clusterid": "Kubernetes",
        "x-tenant": "a",
    }
    token.write_text("second")
    assert provide()["authorization"] == "Bearer second"


def test_without_a_token_file_there_is_no_claim(tmp_path: Path) -> None:
    assert call_metadata(str(tmp_path / "absent"), "Kubernetes")() == {}


def test_a_literal_token_is_taken_as_it_is() -> None:
    assert call_metadata("aaa.bbb.c-c", "c")()["authorization"] == "Bearer aaa.bbb.c-c"


@pytest.mark.parametrize("content", [b"two tokens", b"a\nb", b"\xff", b"x" * 20_000])
def test_a_file_that_holds_no_token_is_refused(tmp_path: Path, content: bytes) -> None:
    token = tmp_path / "istio-token"
    token.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        call_metadata(str(token), "c")()
    assert "xxx" not in str(refused.value)
