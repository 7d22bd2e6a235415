"""A lab without daemons: nodes, pods, Services and names, in real namespaces.

Every test runs as root (if we are) and in a user namespace, which needs no privilege.
"""

from __future__ import annotations

import pytest

from mesh.errors import Unavailable
from mesh.lab.control import NotThere
from tests.support.bare_labs import BareLab

pytestmark = [pytest.mark.lab, pytest.mark.timeout(90)]


def test_everything_is_ready(lab: BareLab) -> None:
    status = lab.client.wait_ready()
    assert status["phase"] == "ready"
    assert not status["faults"]
    assert {pod["node"] for pod in status["pods"] if pod["owner"].startswith("Deploy")} == {
        "node1",
        "node2",
    }
    assert [node["name"] for node in status["nodes"]] == ["node1", "node2"]


def test_pods_reach_each_other_and_see_each_other(lab: BareLab) -> None:
    own = {ip["ip"] for ip in lab.pods("caller")[0]["status"]["podIPs"]}
    for pod in lab.pods("web"):
        for entry in pod["status"]["podIPs"]:
            who, port, sees, peer = lab.answer(entry["ip"], 8080)
            assert (who, port, peer) == (pod["metadata"]["name"], "8080", entry["ip"])
            assert sees in own


def test_cluster_ips_of_both_families_reach_every_endpoint_and_port(lab: BareLab) -> None:
    names = {pod["metadata"]["name"] for pod in lab.pods("web")}
    web = lab.client.get("Service", "shop", "web")[0]
    assert web["spec"]["ipFamilies"] == ["IPv4", "IPv6"]
    for vip in web["spec"]["clusterIPs"]:
        answers = [lab.answer(vip, 80) for _ in range(12)]
        assert {answer[0] for answer in answers} == names
        assert {answer[3] for answer in answers} == {vip}
        assert lab.answer(vip, 81)[1] == "9000"


def test_an_ipv6_only_service_has_no_ipv4(lab: BareLab) -> None:
    six = lab.client.get("Service", "shop", "six")[0]["spec"]
    assert (len(six["clusterIPs"]), six["ipFamilies"]) == (1, ["IPv6"])
    assert ":" in lab.answer("six", 80)[3]
    found = lab.shell("getent ahostsv4 six")
    assert found.code != 0


def test_a_pod_reaches_itself_through_its_service(lab: BareLab) -> None:
    """Hairpin, of both families: the pod sees its node as the other side."""
    pod = lab.pods("web")[0]
    name = pod["metadata"]["name"]
    web = lab.client.get("Service", "shop", "web")[0]
    for vip in web["spec"]["clusterIPs"]:
        answers = [lab.answer(vip, 80, name) for _ in range(10)]
        mine = [answer for answer in answers if answer[0] == name]
        assert mine
        assert {answer[2] for answer in mine} <= {"10.244.1.1", "10.244.2.1"} | {
            "fd00:10:244:1::1",
            "fd00:10:244:2::1",
        }


def test_a_service_without_endpoints_refuses_at_once(lab: BareLab) -> None:
    vip = lab.client.get("Service", "shop", "nobody")[0]["spec"]["clusterIP"]
    # `ask` gives up after 4 s with another word.
    assert b"refused" in lab.ask(vip, 80).stderr


def test_the_node_itself_reaches_services(lab: BareLab) -> None:
    web = lab.client.get("Service", "shop", "web")[0]
    for vip in web["spec"]["clusterIPs"]:
        # The server speaks no HTTP: that it answers at all is what counts.
        with pytest.raises(Unavailable, match=r"no HTTP|no answer|broke"):
            lab.client.http_get("node2", "/", host=vip, port=80)


@pytest.mark.parametrize(
    "name",
    ["web", "web.shop", "web.shop.svc.cluster.local", "db-1.db", "db.shop"],
)
def test_names(lab: BareLab, name: str) -> None:
    assert lab.answer(name, 9000 if name.startswith("db") else 80)


def test_names_that_do_not_exist_fail_fast(lab: BareLab) -> None:
    # A question that nobody answered would be a "temporary failure".
    assert b"Name or service not known" in lab.ask("absent", 80).stderr
    assert b"Name or service not known" in lab.ask("example.com", 80).stderr


def test_the_dns_server_answers_over_tcp(lab: BareLab) -> None:
    done = lab.shell("echo 'options use-vc' >> /etc/resolv.conf; getent hosts web")
    assert done.code == 0, done


def test_a_tap_sees_the_wire_between_nodes_only(lab: BareLab) -> None:
    lab.client.wait_ready()
    tap = lab.client.tap_start()
    by_node = {pod["spec"]["nodeName"]: pod for pod in lab.pods("web")}
    for node in ("node1", "node2"):
        lab.answer(by_node[node]["status"]["podIP"], 8080)
    needles = [by_node[node]["metadata"]["name"].encode() for node in ("node1", "node2")]
    report = lab.client.tap_stop(tap, needles)
    assert list(report.seen.values()) == [False, True]
    flows = [flow for flow in report.flows if flow.port == 8080]
    assert {flow.destination for flow in flows if flow.source.startswith("10.244.1.")} == {
        by_node["node2"]["status"]["podIP"]
    }
    with pytest.raises(NotThere):
        lab.client.tap_read(tap)
