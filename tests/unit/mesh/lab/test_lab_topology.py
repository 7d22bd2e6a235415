"""Plans: objects in, nodes, pods and addresses out; and what changes between two of them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import yaml

from mesh.lab.topology import Plan, diff, plan

DEPLOYMENT = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop, annotations: {ambit.dev/source: "web.yaml:3"}}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
        - name: main
          image: nginx
          command: [serve]
          ports: [{name: http, containerPort: 8080}, {name: admin, containerPort: 9090}]
"""
STATEFUL_SET = """
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db, namespace: shop}
spec:
  serviceName: db
  replicas: 2
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec:
      containers:
        - name: main
          command: [run]
          volumeMounts: [{name: data, mountPath: /data}]
  volumeClaimTemplates: [{metadata: {name: data}}]
"""
DAEMON_SET = """
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: agent, namespace: shop}
spec:
  selector: {matchLabels: {app: agent}}
  template:
    metadata: {labels: {app: agent}}
    spec: {containers: [{name: main, command: [run]}]}
"""
POD = """
apiVersion: v1
kind: Pod
metadata: {name: reader, namespace: shop, labels: {app: reader}}
spec:
  nodeSelector: {kubernetes.io/hostname: node2}
  containers: [{name: main, command: [sleep, infinity]}]
"""


def load(text: str, **spec: Any) -> dict[str, Any]:
    obj: dict[str, Any] = yaml.safe_load(text)
    obj["spec"].update(spec)
    return obj


def service(name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}], **spec},
    }


def test_two_nodes_by_default_and_as_many_as_asked() -> None:
    assert [node.name for node in plan([], Plan()).nodes] == ["node1", "node2"]
    assert len(plan([], Plan(), node_count=5).nodes) == 5
    first = plan([], Plan()).nodes[0]
    assert first.ips == ("172.18.0.1", "fd00:172:18::1")
    assert first.gateway_ips == ("10.244.1.1", "fd00:10:244:1::1")
    assert first.labels["kubernetes.io/hostname"] == "node1"


def test_node_objects_name_the_nodes_and_label_them() -> None:
    zone = "topology.kubernetes.io/zone"
    nodes = [
        {"apiVersion": "v1", "kind": "Node", "metadata": {"name": n, "labels": {zone: z}}}
        for n, z in (("alpha", "west"), ("beta", "east"))
    ]
    made = plan(nodes, Plan(), node_count=3).nodes
    assert [(node.name, node.labels[zone]) for node in made] == [
        ("alpha", "west"),
        ("beta", "east"),
        ("node3", "lab-3"),
    ]


def test_a_deployment_becomes_pods_of_a_replica_set_spread_over_nodes() -> None:
    made = plan([load(DEPLOYMENT)], Plan())
    pods = list(made.pods.values())
    assert [pod.node for pod in pods] == ["node1", "node2", "node1"]
    assert [pod.ips for pod in pods] == [
        ("10.244.1.10", "fd00:10:244:1::a"),
        ("10.244.2.10", "fd00:10:244:2::a"),
        ("10.244.1.11", "fd00:10:244:1::b"),
    ]
    assert len({pod.uid for pod in pods}) == len({pod.name for pod in pods}) == 3
    metadata = pods[0].object["metadata"]
    template_hash = metadata["labels"]["pod-template-hash"]
    owner = metadata["ownerReferences"][0]
    assert (owner["kind"], owner["name"]) == ("ReplicaSet", f"web-{template_hash}")
    assert pods[0].name.startswith(f"web-{template_hash}-")
    assert metadata["annotations"] == {"ambit.dev/source": "web.yaml:3"}
    assert pods[0].object["spec"]["nodeName"] == "node1"
    assert pods[0].spec.named_port("http") == 8080
    assert pods[0].spec.named_port("admin") == 9090
    assert made.notes == ("images are ignored: containers run their command from this machine",)


def test_a_plan_of_the_same_objects_is_the_same_plan() -> None:
    first = plan([load(DEPLOYMENT), load(POD), service("web")], Plan())
    second = plan([load(DEPLOYMENT), load(POD), service("web")], first)
    assert second == first
    changes = diff(first, second)
    assert (changes.start, changes.stop, changes.relabel) == ((), (), ())


def test_scaling_keeps_the_oldest() -> None:
    three = plan([load(DEPLOYMENT)], Plan())
    one = plan([load(DEPLOYMENT, replicas=1)], three)
    assert list(one.pods) == list(three.pods)[:1]
    assert [stop.pod.name for stop in diff(three, one).stop] == [
        pod.name for pod in list(three.pods.values())[1:]
    ]
    again = plan([load(DEPLOYMENT, replicas=2)], one)
    added = diff(one, again).start[0]
    # Neither names nor addresses come back at once.
    assert added.name not in {name for _, name in three.pods}
    assert added.ips[0] not in {pod.ips[0] for pod in three.pods.values()}


def test_a_changed_template_rolls_old_pods_out_after_new_ones() -> None:
    old = plan([load(DEPLOYMENT, replicas=2)], Plan())
    changed = load(DEPLOYMENT, replicas=2)
    changed["spec"]["template"]["spec"]["containers"][0]["command"] = ["serve", "v2"]
    new = plan([changed], old)
    changes = diff(old, new)
    assert len(changes.start) == len(changes.stop) == 2
    assert not {p.ips for p in changes.start} & {stop.pod.ips for stop in changes.stop}
    assert all(stop.after == tuple(pod.key for pod in changes.start) for stop in changes.stop)


def test_a_stateful_set_has_ordinals_host_names_and_claims() -> None:
    made = plan([load(STATEFUL_SET)], Plan())
    assert list(made.pods) == [("shop", "db-0"), ("shop", "db-1")]
    pod = made.pods["shop", "db-1"]
    assert (pod.spec.hostname, pod.spec.subdomain) == ("db-1", "db")
    assert pod.labels["apps.kubernetes.io/pod-index"] == "1"
    assert [volume.path for volume in pod.spec.volumes] == ["data-db-1"]
    assert pod.object["metadata"]["ownerReferences"][0]["kind"] == "StatefulSet"


def test_a_changed_stateful_set_replaces_under_the_same_name() -> None:
    old = plan([load(STATEFUL_SET)], Plan())
    changed = load(STATEFUL_SET)
    changed["spec"]["template"]["spec"]["containers"][0]["command"] = ["run", "v2"]
    changes = diff(old, plan([changed], old))
    assert [pod.name for pod in changes.start] == ["db-0", "db-1"]
    assert [(stop.pod.name, stop.after) for stop in changes.stop] == [("db-0", ()), ("db-1", ())]


def test_a_daemon_set_has_one_pod_per_fitting_node() -> None:
    made = plan([load(DAEMON_SET)], Plan(), node_count=3)
    assert [pod.node for pod in made.pods.values()] == ["node1", "node2", "node3"]
    fitting = load(DAEMON_SET)
    fitting["spec"]["template"]["spec"]["nodeSelector"] = {"kubernetes.io/hostname": "node3"}
    assert [pod.node for pod in plan([fitting], Plan(), node_count=3).pods.values()] == ["node3"]


def test_a_bare_pod_goes_where_it_asks() -> None:
    assert plan([load(POD)], Plan()).pods["shop", "reader"].node == "node2"
    named = load(POD, nodeSelector=None, nodeName="node1")
    assert plan([named], Plan()).pods["shop", "reader"].node == "node1"


def test_a_pod_that_fits_nowhere_is_a_fault_of_its_field() -> None:
    made = plan([load(POD, nodeName="moon")], Plan())
    assert not made.pods
    assert [(fault.field, fault.hint) for fault in made.faults] == [
        ("spec.nodeName", "nodes: node1, node2")
    ]


def test_new_labels_of_a_bare_pod_do_not_restart_it_but_a_new_command_does() -> None:
    first = plan([load(POD)], Plan())
    relabelled = load(POD)
    relabelled["metadata"]["labels"] = {"app": "other"}
    second = plan([relabelled], first)
    changes = diff(first, second)
    assert (changes.start, changes.stop) == ((), ())
    assert [dict(pod.labels) for pod in changes.relabel] == [{"app": "other"}]
    assert changes.relabel[0].ips == first.pods["shop", "reader"].ips
    third = plan([load(POD, containers=[{"name": "main", "command": ["true"]}])], second)
    assert [pod.name for pod in diff(second, third).start] == ["reader"]
    assert [stop.pod.name for stop in diff(second, third).stop] == ["reader"]


def test_what_worked_stays_when_an_object_goes_bad() -> None:
    first = plan([load(DEPLOYMENT), service("web")], Plan())
    broken = load(DEPLOYMENT)
    del broken["spec"]["template"]["spec"]["containers"][0]["command"]
    second = plan([broken, service("web", ipFamilyPolicy="Both")], first)
    assert second.pods == first.pods
    assert second.services == first.services
    assert sorted(fault.field for fault in second.faults) == [
        "spec.ipFamilyPolicy",
        "spec.template.spec.containers[0].command",
    ]
    assert {fault.file for fault in second.faults} == {"web.yaml", "Service shop/web"}


def test_a_deleted_pod_of_an_owner_is_replaced() -> None:
    first = plan([load(DEPLOYMENT)], Plan())
    victim = next(iter(first.pods.values()))
    second = plan([load(DEPLOYMENT)], first, deleted=frozenset({victim.uid}))
    assert len(second.pods) == 3
    assert victim.key not in second.pods
    assert [stop.pod.name for stop in diff(first, second).stop] == [victim.name]


def test_addresses_of_pods_still_stopping_are_not_given_out() -> None:
    made = plan([load(POD)], Plan(), busy=frozenset({"10.244.2.10"}))
    assert made.pods["shop", "reader"].ips[0] == "10.244.2.11"


def test_a_full_node_is_a_fault() -> None:
    made = plan([load(DEPLOYMENT, replicas=250)], Plan(), node_count=1)
    assert len(made.pods) == 240
    assert "full" in str(made.faults[0])


def test_a_host_network_pod_has_its_nodes_addresses() -> None:
    pod = plan([load(POD, hostNetwork=True)], Plan()).pods["shop", "reader"]
    assert pod.ips == ("172.18.0.2", "fd00:172:18::2")


def test_a_selector_that_misses_its_template_is_a_fault() -> None:
    wrong = load(DEPLOYMENT, selector={"matchLabels": {"app": "wrong"}})
    assert plan([wrong], Plan()).faults[0].field == "spec.selector.matchLabels"


def test_other_kinds_are_carried_and_jobs_noted() -> None:
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j"}, "spec": {}}
    policy = {"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy"}
    policy["metadata"] = {"name": "p"}  # type: ignore[assignment]
    made = plan([job, policy], Plan())
    assert made.notes == ("Job default/j is carried along; the lab does not run it",)
    assert not made.faults


def test_planning_changes_no_object() -> None:
    objects = [load(STATEFUL_SET), load(POD), service("web")]
    before = deepcopy(objects)
    plan(objects, plan(objects, Plan()))
    assert objects == before
