"""Schema and reader of our own policies agree: on every field, every sample, and most mistakes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from mesh.cluster.fields import Reader
from mesh.cluster.inventory import PARSERS
from mesh.cluster.l7_schema import rate_limit_spec, redaction_spec
from mesh.errors import ConfigError
from tests.support.l7_samples import ACCEPTED, REFUSED_BY_RULES, REFUSED_BY_SHAPE, policy

SCHEMAS = {"RateLimitPolicy": rate_limit_spec(), "RedactionPolicy": redaction_spec()}


def faults(schema: dict[str, Any], value: Any, path: str = "spec") -> Iterator[str]:
    """What a structural schema finds, its expressions left out."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    kind = kinds[schema["type"]]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        yield f"{path}: is no {schema['type']}"
        return
    if isinstance(value, dict):
        yield from (
            f"{path}.{each}: missing" for each in schema.get("required", ()) if each not in value
        )
        for name, each in value.items():
            if name in schema["properties"]:
                yield from faults(schema["properties"][name], each, f"{path}.{name}")
    elif isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema["maxItems"]:
            yield f"{path}: {len(value)} items"
        for each in value:
            yield from faults(schema["items"], each, f"{path}[]")
    elif isinstance(value, str):
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 99):
            yield f"{path}: length {len(value)}"
        if value not in schema.get("enum", (value,)):
            yield f"{path}: {value!r} is not one of {schema['enum']}"
        if not re.search(schema.get("pattern", ""), value):
            yield f"{path}: {value!r} does not match"
    elif kind is int and not schema["minimum"] <= value <= schema["maximum"]:
        yield f"{path}: {value}"


def objects(schema: dict[str, Any], path: str = "spec") -> Iterator[tuple[str, set[str]]]:
    if schema["type"] == "array":
        yield from objects(schema["items"], f"{path}[]")
    elif schema["type"] == "object":
        yield path, set(schema["properties"])
        for name, each in schema["properties"].items():
            yield from objects(each, f"{path}.{name}")


def read(kind: str, spec: Any) -> None:
    PARSERS[kind](policy(kind, spec))


@pytest.mark.parametrize("kind", SCHEMAS)
def test_every_field_of_the_reader_is_in_the_schema(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new field of a policy: add it to `mesh.cluster.l7_schema`, and to a sample."""
    known: dict[str, set[str]] = {}
    plain = Reader.only

    def only(self: Reader, *names: str) -> Reader:
        path = ""
        for step in self.path:
            path += "[]" if isinstance(step, int) else f".{step}" if path else step
        known.setdefault(path, set()).update(names)
        return plain(self, *names)

    monkeypatch.setattr(Reader, "only", only)
    for found, spec in ACCEPTED:
        if found == kind:
            read(kind, spec)
    known.pop("")
    # Accepted of old, not written in any new policy.
    known["spec"].discard("targetRef")
    assert known == dict(objects(SCHEMAS[kind]))


@pytest.mark.parametrize(("kind", "spec"), ACCEPTED)
def test_what_is_accepted_fits(kind: str, spec: Any) -> None:
    read(kind, spec)
    assert list(faults(SCHEMAS[kind], spec)) == []


def test_samples_use_every_field() -> None:
    for kind, schema in SCHEMAS.items():
        used: set[str] = set()

        def walk(value: Any, path: str, used: set[str] = used) -> None:
            if isinstance(value, dict):
                for name, each in value.items():
                    used.add(f"{path}.{name}")
                    walk(each, f"{path}.{name}")
            elif isinstance(value, list):
                for each in value:
                    walk(each, f"{path}[]")

        for found, spec in ACCEPTED:
            if found == kind:
                walk(spec, "spec")
        wanted = {f"{path}.{name}" for path, names in objects(schema) for name in names}
        rare = {"spec.targetRefs[].namespace", "spec.targetRefs[].sectionName"}
        assert wanted - used - rare == set()


@pytest.mark.parametrize(("kind", "spec"), REFUSED_BY_SHAPE)
def test_what_has_the_wrong_shape_is_refused_by_both(kind: str, spec: Any) -> None:
    with pytest.raises(ConfigError):
        read(kind, spec)
    assert list(faults(SCHEMAS[kind], spec))


@pytest.mark.parametrize(("kind", "spec"), REFUSED_BY_RULES)
def test_what_contradicts_itself_is_refused(kind: str, spec: Any) -> None:
    with pytest.raises(ConfigError):
        read(kind, spec)


def test_words_come_from_the_model() -> None:
    rule = SCHEMAS["RedactionPolicy"]["properties"]["rules"]["items"]["properties"]
    assert {"email", "custom", "payment-card"} <= set(rule["detector"]["enum"])
    assert rule["validator"]["enum"] == ["luhn", "mod97"]
