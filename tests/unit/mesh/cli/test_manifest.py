"""The files in manifests/ are what the code says, and what it says is safe and consistent."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from istiod_lite.config import IstiodConfig
from istiod_lite.index import KINDS
from istiod_lite.root_certificate import NAME
from istiod_lite.seat import LEASE
from mesh.cli import chart, definitions, manifest, values
from mesh.cluster.api import Object, group_of
from mesh.runtime.config import load
from netconfig.config import NetconfigConfig
from tests.support.tree import ROOT
from ztunnel.config import ZtunnelConfig

ALL = manifest.objects(values.Values())


def find(kind: str, name: str) -> Object:
    (found,) = [each for each in ALL if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


def container(kind: str, name: str) -> dict[str, Any]:
    (only,) = find(kind, name)["spec"]["template"]["spec"]["containers"]
    return dict(only)


@pytest.mark.parametrize("name", chart.files())
def test_files_are_up_to_date(name: str) -> None:
    path = ROOT / "manifests" / name
    assert path.read_text() == chart.files()[name], "run: make manifests"


def test_no_file_is_left_over() -> None:
    there = {
        str(path.relative_to(ROOT / "manifests"))
        for path in (ROOT / "manifests").rglob("*")
        if path.is_file() and "examples" not in path.parts
    }
    assert there == set(chart.files())


def test_the_chart_with_its_defaults_is_the_rendered_yaml() -> None:
    files = chart.files()
    given = yaml.safe_load(files["chart/values.yaml"])
    text = files["chart/templates/ambit.yaml"].replace(
        "{{ .Release.Namespace }}", values.Values().namespace
    )
    text = re.sub(r"\{\{ (?:int )?\.Values\.(\w+) \}\}", lambda found: str(given[found[1]]), text)
    assert "{{" not in text
    rendered = [
        each
        for each in yaml.safe_load_all(files["install.yaml"])
        if each["kind"] not in ("CustomResourceDefinition", "Namespace", "GatewayClass")
    ]
    assert list(yaml.safe_load_all(text)) == rendered


@pytest.mark.parametrize(
    ("kind", "name", "config"),
    [
        ("Deployment", "istiod", IstiodConfig),
        ("DaemonSet", "ztunnel", ZtunnelConfig),
        ("DaemonSet", "netconfig", NetconfigConfig),
    ],
)
def test_daemons_take_their_environment(kind: str, name: str, config: type) -> None:
    given = {each["name"]: each.get("value", "x") for each in container(kind, name)["env"]}
    load(config, [], given)
    known = str([field.metadata for field in config.__dataclass_fields__.values()])
    assert [each for each in given if f"'{each}'" not in known] == []


def test_the_controller_is_restricted() -> None:
    spec = find("Deployment", "istiod")["spec"]["template"]["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    only = container("Deployment", "istiod")
    assert only["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"readinessProbe", "livenessProbe", "startupProbe"} <= set(only)
    assert find("Deployment", "istiod")["spec"]["replicas"] == 2
    assert find("PodDisruptionBudget", "istiod")["spec"]["minAvailable"] == 1


def test_nothing_is_privileged_and_no_right_is_a_wildcard() -> None:
    for name in ("ztunnel", "netconfig"):
        assert container("DaemonSet", name)["securityContext"]["privileged"] is False
    rules = [rule for each in ALL for rule in each.get("rules", ())]
    assert rules
    for rule in rules:
        named = ("apiGroups", "resources", "nonResourceURLs", "verbs")
        assert not any("*" in part for key in named for part in rule.get(key, ()))
        assert not set(rule["verbs"]) & {"*", "escalate", "bind", "impersonate"}
    bindings = [each for each in ALL if each["kind"].endswith("Binding")]
    assert "ztunnel" not in {each["subjects"][0]["name"] for each in bindings}


def test_the_controller_may_read_what_it_watches() -> None:
    rules = find("ClusterRole", "ambit-istiod")["rules"]
    at_home = find("Role", "istiod")["rules"]
    listed = [each for each in at_home if each["resources"] == ["configmaps"]]
    assert listed == [
        {
            "apiGroups": [""],
            "resources": ["configmaps"],
            "verbs": ["list", "watch"],
            "resourceNames": ["istio"],
        }
    ]
    may = {
        (rule.get("apiGroups", [""])[0], resource)
        for rule in rules
        for resource in rule.get("resources", ())
        if {"get", "list", "watch"} <= set(rule["verbs"])
    }
    for kind in KINDS:
        if kind == "ConfigMap":
            continue  # one, at home
        name = kind.lower()
        plural = f"{name[:-1]}ies" if name.endswith(("cy", "entry")) else f"{name}s"
        plural = {"gatewayclasss": "gatewayclasses", "xmeshs": "xmeshes"}.get(plural, plural)
        assert (group_of(kind), plural) in may, kind


def test_names_are_those_of_the_code() -> None:
    assert (NAME, LEASE) == (values.ROOT_CERTIFICATE, values.LEASE)


def test_definitions_have_columns_status_and_one_stored_version() -> None:
    for each in (*definitions.ours(), *definitions.istios()):
        versions = each["spec"]["versions"]
        assert [version["storage"] for version in versions].count(True) == 1
        for version in versions:
            assert version["subresources"] == {"status": {}}
            assert version["additionalPrinterColumns"]
