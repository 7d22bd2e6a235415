"""Policies of waypoints as they are read: strict, with defaults, each mistake at its field."""

from __future__ import annotations

import base64

import pytest
from google.protobuf import descriptor_pb2

from mesh.cluster.api import ref_of
from mesh.cluster.descriptor_sets import field_names
from mesh.cluster.inventory import PARSERS
from mesh.errors import ConfigError
from mesh.model.l7_policy import (
    JwtRule,
    RateLimitKey,
    RateLimitOverride,
    RateLimitRule,
    RedactionAction,
    RequestCondition,
    SharedLimiter,
    TokenPlace,
)
from tests.support.gateways import OURS, SECURITY, obj, rate_limit, target


def parsed(raw):
    return PARSERS[ref_of(raw).kind](raw)


def limit(**spec):
    return parsed(rate_limit(**spec)).policy


def redaction(**spec):
    spec = {"targetRefs": [target()], "rules": [{"detector": "email"}], **spec}
    return parsed(obj("RedactionPolicy", "r", "shop", OURS, spec=spec)).policy


def tokens(*rules, **spec):
    spec = {"targetRefs": [target()], "jwtRules": list(rules), **spec}
    return parsed(obj("RequestAuthentication", "j", "shop", SECURITY, spec=spec)).policy


LIMIT = {"requests": 10, "window": "1m"}


def test_a_limit_with_its_defaults():
    assert limit().rules == (RateLimitRule("0", 10, 60.0),)
    assert limit().shared == SharedLimiter()


ASKED = {"type": "RateLimitService", "address": "limits.shop:8081"}


def test_a_limit_that_a_service_counts():
    (told,) = limit(rules=[{"limit": LIMIT}], shared=ASKED).rules
    assert (told.window_seconds, told.descriptor) == (60.0, None)
    rule = {
        "descriptor": [{"key": "plan", "value": "gold"}],
        "key": [{"type": "Method", "descriptorKey": "verb"}],
    }
    (told,) = limit(rules=[rule], shared={**ASKED, "onFailure": "Deny"}).rules
    assert (told.window_seconds, told.descriptor) == (0.0, (("plan", "gold"),))
    assert told.keys == (RateLimitKey("Method", "", "verb"),)


@pytest.mark.parametrize(
    ("rule", "shared", "field"),
    [
        ({}, ASKED, "rules[0].limit"),
        ({"limit": {"requests": 1, "window": "2s"}}, ASKED, "rules[0].limit.window"),
        ({"limit": {**LIMIT, "burst": 2}}, ASKED, "rules[0].limit.burst"),
        ({"limit": LIMIT, "descriptor": []}, ASKED, "rules[0].descriptor"),
        ({"limit": LIMIT, "descriptor": [{"key": "a"}]}, {}, "rules[0].descriptor"),
        ({"limit": LIMIT, "descriptor": [{"value": "a"}]}, ASKED, "rules[0].descriptor[0].key"),
        (
            {"limit": LIMIT, "key": [{"type": "Path", "descriptorKey": "p"}]},
            {},
            "rules[0].key[0].descriptorKey",
        ),
        (
            {"overrides": [{"key": [], "requests": 1}]},
            {**ASKED, "onFailure": "Deny"},
            "rules[0].overrides[0]",
        ),
        ({"limit": LIMIT}, {**ASKED, "address": "limits:8081"}, "shared.address"),
        ({"limit": LIMIT}, {**ASKED, "address": "limits.shop"}, "shared.address"),
    ],
)
def test_what_a_service_cannot_be_asked(rule, shared, field):
    with pytest.raises(ConfigError) as caught:
        limit(rules=[rule], shared=shared)
    assert caught.value.field == f"spec.{field}"


def test_a_limit_in_full():
    rule = {
        "name": "per-user",
        "limit": {**LIMIT, "burst": 5},
        "when": {"paths": ["/api/*"], "headers": [{"name": "X-Tier", "value": "free"}]},
        "key": [{"type": "Identity"}, {"type": "Header", "name": "X-User"}],
        "overrides": [{"key": ["a", "b"], "requests": 99}],
        "cost": 2,
        "costHeader": "X-Cost",
        "shadow": True,
    }
    shared = {
        "type": "Redis",
        "address": "redis://r:6379/0",
        "timeout": "20ms",
        "onFailure": "Deny",
    }
    found = limit(rules=[rule], shared=shared, headers=False)
    (told,) = found.rules
    assert told.condition == RequestCondition(paths=("/api/*",), headers=(("x-tier", "free"),))
    assert told.keys == (RateLimitKey("Identity"), RateLimitKey("Header", "x-user"))
    assert told.overrides == (RateLimitOverride(("a", "b"), 99),)
    assert (told.burst, told.cost, told.cost_header, told.is_shadow) == (5, 2, "x-cost", True)
    assert found.shared.timeout_seconds == 0.02
    assert (found.shared.on_failure, found.sends_headers) == ("Deny", False)


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"rules": []}, "spec.rules"),
        ({"refs": []}, "spec.targetRefs"),
        ({"rules": [{"limit": {"requests": 1}}]}, "spec.rules[0].limit.window"),
        ({"rules": [{"limit": {"window": "1s"}}]}, "spec.rules[0].limit.requests"),
        ({"rules": [{"limit": {**LIMIT, "window": "0s"}}]}, "spec.rules[0].limit.window"),
        ({"rules": [{"limit": {**LIMIT, "requests": -1}}]}, "spec.rules[0].limit.requests"),
        ({"rules": [{"limit": LIMIT, "key": [{}]}]}, "spec.rules[0].key[0].type"),
        ({"rules": [{"limit": LIMIT, "key": [{"type": "Shoe"}]}]}, "spec.rules[0].key[0].type"),
        ({"rules": [{"limit": LIMIT, "key": [{"type": "Header"}]}]}, "spec.rules[0].key[0].name"),
        (
            {"rules": [{"limit": LIMIT, "key": [{"type": "Path", "name": "x"}]}]},
            "spec.rules[0].key[0].name",
        ),
        (
            {"rules": [{"limit": LIMIT, "overrides": [{"key": ["a"], "requests": 1}]}]},
            "spec.rules[0].overrides[0].key",
        ),
        ({"rules": [{"limit": LIMIT, "when": {"paths": []}}]}, "spec.rules[0].when.paths"),
        ({"rules": [{"limit": LIMIT, "name": "a"}] * 2}, "spec.rules"),
        ({"shared": {"type": "Redis"}}, "spec.shared.address"),
        ({"shared": {"type": "Redis", "address": "a b"}}, "spec.shared.address"),
        ({"shared": {"onFailure": "Shrug"}}, "spec.shared.onFailure"),
        ({"typo": 1}, "spec.typo"),
        ({"refs": [{**target(), "sectionName": "http"}]}, "spec.targetRefs[0].sectionName"),
        ({"refs": [target(str(i)) for i in range(17)]}, "spec.targetRefs"),
    ],
)
def test_limits_that_are_refused(spec, field):
    with pytest.raises(ConfigError) as caught:
        limit(**spec)
    assert caught.value.field == field


_FILE = descriptor_pb2.FileDescriptorProto(name="a.proto", package="a")
_FILE.message_type.add(name="B").field.add(name="c")
_RAW = descriptor_pb2.FileDescriptorSet(file=[_FILE]).SerializeToString()
SET = base64.b64encode(_RAW).decode()


def test_fields_that_descriptors_know():
    assert field_names(_RAW) == {"a.B.c"}
    found = redaction(rules=[{"grpcFields": ["a.B.c", "$..c"]}], descriptors=SET)
    assert found.rules[0].grpc_fields == ("a.B.c", "$..c")


def test_a_redaction_in_full():
    rule = {
        "name": "card",
        "detector": "custom",
        "pattern": "[0-9]{16}",
        "validator": "luhn",
        "jsonPaths": ["$.a.b[*].c", "$..card"],
        "headers": ["X-Card"],
        "action": {"type": "mask", "keepLast": 4, "mask": "#"},
    }
    found = redaction(rules=[rule], direction="Response", dryRun=True, audit=False)
    (told,) = found.rules
    assert told.action == RedactionAction("mask", 4, "#")
    assert (told.headers, told.json_paths) == (("x-card",), ("$.a.b[*].c", "$..card"))
    assert (found.direction, found.is_dry_run, found.audits) == ("Response", True, False)
    assert (found.on_uninspectable, found.max_body_bytes) == ("Block", 0)


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"rules": []}, "spec.rules"),
        ({"rules": [{}]}, "spec.rules[0]"),
        ({"rules": [{"action": {"type": "drop"}}]}, "spec.rules[0]"),
        ({"rules": [{"detector": "custom"}]}, "spec.rules[0].pattern"),
        ({"rules": [{"detector": "email", "pattern": "x"}]}, "spec.rules[0].pattern"),
        ({"rules": [{"detector": "custom", "pattern": "("}]}, "spec.rules[0].pattern"),
        ({"rules": [{"jsonPaths": ["a.b"]}]}, "spec.rules[0].jsonPaths[0]"),
        ({"rules": [{"jsonPaths": ["$.ok", "$.a[-1]"]}]}, "spec.rules[0].jsonPaths[1]"),
        ({"rules": [{"jsonPaths": ["$.a[?@.b]"]}]}, "spec.rules[0].jsonPaths[0]"),
        ({"rules": [{"grpcFields": ["$.a"]}]}, "spec.rules[0].grpcFields"),
        (
            {"rules": [{"grpcFields": ["email"]}], "descriptorFile": "a.pb"},
            "spec.rules[0].grpcFields[0]",
        ),
        (
            {"rules": [{"grpcFields": ["a.B.d"]}], "descriptors": SET},
            "spec.rules[0].grpcFields[0]",
        ),
        ({"rules": [{"jsonPaths": ["$.a"]}], "descriptors": "?"}, "spec.descriptors"),
        ({"rules": [{"jsonPaths": ["$.a"]}], "descriptors": "bm9uZQ=="}, "spec.descriptors"),
        (
            {"rules": [{"jsonPaths": ["$.a"]}], "descriptors": SET, "descriptorFile": "a.pb"},
            "spec.descriptorFile",
        ),
        ({"rules": [{"jsonPaths": ["$.a"]}], "keyFile": "../etc/passwd"}, "spec.keyFile"),
        ({"rules": [{"detector": "shoe-size"}]}, "spec.rules[0].detector"),
        ({"rules": [{"detector": "email", "action": {"type": "hash"}}]}, "spec.keyFile"),
        (
            {"rules": [{"detector": "email", "action": {"type": "drop", "keepLast": 1}}]},
            "spec.rules[0].action.type",
        ),
        ({"maxBodyBytes": 1 << 40}, "spec.maxBodyBytes"),
        ({"direction": "Up"}, "spec.direction"),
        ({"when": {"path": ["/"]}}, "spec.when.path"),
    ],
)
def test_redactions_that_are_refused(spec, field):
    with pytest.raises(ConfigError) as caught:
        redaction(**spec)
    assert caught.value.field == field


def test_tokens_in_full():
    rule = {
        "issuer": "me",
        "audiences": ["a"],
        "jwksUri": "https://me/keys",
        "fromHeaders": [{"name": "X-Jwt", "prefix": "T "}],
        "fromParams": ["t"],
        "fromCookies": ["c"],
        "forwardOriginalToken": True,
        "outputPayloadToHeader": "X-Payload",
        "outputClaimToHeaders": [{"header": "X-Sub", "claim": "sub"}],
        "timeout": "2s",
    }
    assert tokens(rule).rules == (
        JwtRule(
            issuer="me",
            audiences=("a",),
            jwks_uri="https://me/keys",
            places=(
                TokenPlace("header", "X-Jwt", "T "),
                TokenPlace("param", "t"),
                TokenPlace("cookie", "c"),
            ),
            forwards_token=True,
            payload_header="X-Payload",
            claim_headers=(("X-Sub", "sub"),),
            timeout_seconds=2.0,
        ),
    )


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"issuer": "me", "jwks": "{}", "jwksUri": "https://x"},
        {"issuer": "me", "jwksUri": "file:///etc"},
        {"issuer": "me", "fromHeaders": [{"prefix": "x"}]},
        {"issuer": "me", "audience": "x"},
    ],
)
def test_tokens_that_are_refused(rule):
    with pytest.raises(ConfigError):
        tokens(rule)


def test_a_selector_beside_targets():
    with pytest.raises(ConfigError):
        tokens(selector={"matchLabels": {"a": "b"}})
