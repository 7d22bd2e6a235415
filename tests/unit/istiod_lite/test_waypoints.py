"""What a waypoint consists of, and the steps that lead there."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest

from istiod_lite.waypoints import (
    Make,
    Mend,
    Remove,
    WaypointSettings,
    desired,
    difference,
    is_ours,
    plan,
)
from mesh.cluster.api import Ref, merge_patch, ref_of
from mesh.cluster.gateways import parse_gateway
from mesh.cluster.validate import Severity, check
from tests.support.gateways import gateway
from waypoint.config import WaypointConfig

SETTINGS = WaypointSettings(command="python3 -m waypoint --x 'a b'")
WP = parse_gateway(gateway())


def live():
    return {ref_of(each): copy.deepcopy(each) for each in desired(WP, SETTINGS)}


def test_what_a_waypoint_consists_of():
    account, service, deployment = desired(WP, SETTINGS)
    assert [each["kind"] for each in (account, service, deployment)] == [
        "ServiceAccount", "Service", "Deployment",
    ]  # fmt: skip
    assert all(is_ours(each) for each in (account, service, deployment))
    assert {port["name"]: port["port"] for port in service["spec"]["ports"]} == {
        "status-port": 15021,
        "mesh": 15008,
    }
    template = deployment["spec"]["template"]
    assert template["metadata"]["labels"]["istio.io/dataplane-mode"] == "none"
    selector = deployment["spec"]["selector"]["matchLabels"]
    assert selector.items() <= template["metadata"]["labels"].items()
    assert service["spec"]["selector"] == selector
    (container,) = template["spec"]["containers"]
    assert container["command"] == ["python3", "-m", "waypoint", "--x", "a b"]
    variables = {each["name"]: each for each in container["env"]}
    assert variables["GATEWAY_NAME"]["value"] == "wp"
    assert variables["INSTANCE_IP"]["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP"
    assert template["spec"]["serviceAccountName"] == "wp"


def test_variables_of_traces_follow_the_address_that_they_name():
    told = (("OTEL_EXPORTER_OTLP_ENDPOINT", "http://$(HOST_IP):4318"),)
    deployment = next(
        each for each in desired(WP, replace(SETTINGS, traces=told)) if each["kind"] == "Deployment"
    )
    names = [
        each["name"] for each in deployment["spec"]["template"]["spec"]["containers"][0]["env"]
    ]
    assert names[-2:] == ["HOST_IP", "OTEL_EXPORTER_OTLP_ENDPOINT"]


def test_it_is_what_a_cluster_would_take():
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}
    found = check([(each, None) for each in (namespace, *desired(WP, SETTINGS))])
    assert [each for each in found if each.severity is Severity.ERROR] == []
    assert [each for each in found if "unknown field" in each.message] == []


def test_a_new_gateway_is_made_in_order_and_then_all_is_well():
    steps = plan([WP], {}, SETTINGS)
    assert [each.object["kind"] for each in steps if isinstance(each, Make)] == [
        "ServiceAccount", "Service", "Deployment",
    ]  # fmt: skip
    assert plan([WP], live(), SETTINGS) == []


def test_what_others_add_is_no_drift_and_what_they_change_is():
    objects = live()
    deployment = objects[Ref("Deployment", "shop", "wp")]
    deployment["spec"]["replicas"] = 3
    deployment["status"] = {"replicas": 3}
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    container["imagePullPolicy"] = "Always"
    service = objects[Ref("Service", "shop", "wp")]
    service["spec"] |= {"clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9"]}
    assert plan([WP], objects, SETTINGS) == []
    container["image"] = "evil"
    service["metadata"]["labels"].pop("gateway.networking.k8s.io/gateway-name")
    steps = plan([WP], objects, SETTINGS)
    assert {each.ref.kind for each in steps if isinstance(each, Mend)} == {"Service", "Deployment"}
    for step in steps:
        assert isinstance(step, Mend)
        objects[step.ref] = merge_patch(objects[step.ref], step.patch)
    assert plan([WP], objects, SETTINGS) == []
    assert deployment["spec"]["replicas"] == 3
    assert objects[Ref("Service", "shop", "wp")]["spec"]["clusterIP"] == "10.96.0.9"


@pytest.mark.parametrize(
    "gateways", [[], [parse_gateway(gateway(class_name="nginx"))], [parse_gateway(gateway("b"))]]
)
def test_what_no_gateway_asks_for_is_removed(gateways):
    removed = [each.ref for each in plan(gateways, live(), SETTINGS) if isinstance(each, Remove)]
    assert set(removed) == set(live())


def test_a_mistake_in_a_gateway_takes_nothing_down_and_makes_nothing():
    bad = parse_gateway(gateway(listeners=[{"name": "m", "port": 80, "protocol": "HTTP"}]))
    assert plan([bad], {}, SETTINGS) == []
    assert plan([bad], live(), SETTINGS) == []


def test_a_difference_is_the_least_that_has_to_change():
    have = {"a": {"b": 1, "c": [1, {"x": 1, "more": 2}]}, "other": True}
    assert difference(have, {"a": {"b": 1, "c": [1, {"x": 1}]}}) == {}
    assert difference(have, {"a": {"b": 2}}) == {"a": {"b": 2}}
    assert difference(have, {"a": {"c": [1]}}) == {"a": {"c": [1]}}
    assert difference(have, {"n": {"m": 1}}) == {"n": {"m": 1}}
    assert difference({"a": 1}, {"a": True}) == {"a": True}


def test_secrets_are_mounted_where_a_waypoint_looks_and_need_not_be_there():
    spec = desired(WP, SETTINGS)[2]["spec"]["template"]["spec"]
    mounts = {each["name"]: each["mountPath"] for each in spec["containers"][0]["volumeMounts"]}
    config = WaypointConfig()
    assert mounts["ambit-redaction"] == str(config.redaction_keys)
    assert mounts["ambit-rate-limit"] == str(Path(config.rate_limit_credentials).parent)
    secrets = [each["secret"] for each in spec["volumes"] if "secret" in each]
    assert secrets == [
        {"secretName": "ambit-rate-limit", "optional": True},
        {"secretName": "ambit-redaction", "optional": True},
    ]
