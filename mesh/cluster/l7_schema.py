"""The OpenAPI schemas of RateLimitPolicy and RedactionPolicy, made from the model. Pure.

Words that may be chosen are read from the types of `mesh.model.l7_policy`, numbers and patterns
from the reader (`mesh.cluster.l7_policies`); a test compares every field name with those that
the reader knows. The schema refuses at admission what it can see is wrong; the reader, which
the controller trusts alone, refuses the rest and is never laxer.

Fields that are not known here are kept, not pruned: a misspelt one then reaches the reader,
which refuses the policy by that name, instead of half a policy coming into force in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, get_args, get_type_hints

from mesh.cluster import l7_policies as reader
from mesh.cluster.api import Object
from mesh.cluster.descriptor_sets import MAX_DESCRIPTORS
from mesh.cluster.policies import MAX_TARGETS
from mesh.cluster.route_filters import MAX_EXPRESSION
from mesh.model import l7_policy as model

_DURATION = "^([0-9]{1,5}(h|ms|m|s)){1,4}$"
_MAX_TEXT = 1024
_MAX_NUMBER = 1_000_000_000


def rate_limit_spec() -> Object:
    """The schema of `spec` of a RateLimitPolicy."""
    window = _text("Length of the window, such as 1s, 1m, 1h.", pattern=_DURATION)
    limit = _object(
        "How many requests in which time.",
        required=("requests", "window"),
        requests=_number("Requests in a window.", 0),
        window=window,
        burst=_number("Requests at once; as many as `requests` if left out.", 0),
    )
    key = _object(
        "A part of what buckets are counted by.",
        required=("type",),
        rules=[
            (
                f"(self.type in {_list(reader.NAMED_KEYS)}) == (has(self.name) && self.name != '')",
                "a name belongs to Header and Claim, and to them alone",
            )
        ],
        type=_choice("What it is.", model.RateLimitKey, "kind"),
        name=_text("Of the header or claim."),
        descriptorKey=_text("What a rate-limit service calls it; its name or type if left out."),
    )
    entry = _object(
        "What a rate-limit service is always told.",
        required=("key", "value"),
        key=_text("Its key."),
        value=_text("Its value.", empty=True),
    )
    override = _object(
        "Another limit for one key.",
        required=("key", "requests"),
        key=_list_of(_text("", empty=True), "The values, in the order of the rule's key.", 16),
        requests=_number("Requests in a window.", 0),
    )
    rule = _object(
        "One limit.",
        rules=[
            (
                "!has(self.overrides) || self.overrides.all(o, "
                "size(o.key) == (has(self.key) ? size(self.key) : 0))",
                "an override has a value for every part of the key",
            )
        ],
        name=_text("Its name in metrics and responses; its number if left out.", empty=True),
        limit=limit,
        when=_condition("Which requests count; all if left out."),
        key=_list_of(key, "What is counted apart; everything together if left out.", 16),
        overrides=_list_of(override, "Keys that have a limit of their own.", reader.MAX_ENTRIES),
        cost=_number("What one request counts.", 0),
        costHeader=_text("Header of the request that says what it counts.", empty=True),
        shadow={"type": "boolean", "description": "Count and tell, but throttle nobody."},
        descriptor=_list_of(
            entry,
            "Told a rate-limit service before the key; generic_key, the name, if left out.",
            16,
        ),
    )
    shared = _object(
        "Where buckets are kept.",
        rules=[
            (
                "(has(self.type) && self.type != 'Local') == "
                "(has(self.address) && self.address != '')",
                "a store that is shared has an address, and Local has none",
            )
        ],
        type=_choice("Which store.", model.SharedLimiter, "kind"),
        address=_text(
            "redis://host:port/db, or name.namespace:port of a rate-limit service.", empty=True
        ),
        domain=_text("The domain that a rate-limit service is asked in.", empty=True),
        timeout=_text("How long it is waited for.", pattern=_DURATION),
        onFailure=_choice("While it does not answer.", model.SharedLimiter, "on_failure"),
        replicas=_number("By how many LocalShare divides.", 1),
    )
    return _spec(
        "How many requests may come.",
        rule,
        rules=[
            (
                "(has(self.shared) && has(self.shared.type) && "
                "self.shared.type == 'RateLimitService') || self.rules.all(r, has(r.limit))",
                "only a rate-limit service has limits of its own",
            )
        ],
        shared=shared,
        headers={"type": "boolean", "description": "Whether responses say what is left."},
    )


def redaction_spec() -> Object:
    """The schema of `spec` of a RedactionPolicy."""
    action = _object(
        "What happens to what is found.",
        rules=[
            (
                "!has(self.type) || self.type == 'mask' "
                "|| (!has(self.keepLast) && !has(self.mask))",
                "only mask keeps something and has a mask",
            )
        ],
        type=_choice("How.", model.RedactionAction, "kind"),
        keepLast=_number("How many characters stay.", 0),
        mask={**_text("What stands for a character."), "maxLength": 64},
    )
    places = {
        "headers": "Names of headers.",
        "cookies": "Names of cookies.",
        "queryParams": "Names of query parameters.",
        "jsonPaths": "Such as $.a.b[*].c or $..name.",
        "formFields": "Names of form fields.",
        "grpcFields": "Such as shop.v1.User.email or $.buyer.email; needs descriptors.",
    }
    somewhere = " || ".join(f"has(self.{each})" for each in ("detector", *places))
    lists = {name: _list_of(_text(""), says, reader.MAX_ENTRIES) for name, says in places.items()}
    rule = _object(
        "One search.",
        lists,
        rules=[
            (somewhere, "a rule names a detector or a place"),
            (
                "(has(self.detector) && self.detector == 'custom') == "
                "(has(self.pattern) && self.pattern != '')",
                "a pattern goes with detector custom",
            ),
        ],
        name=_text("Its name in the audit; its number if left out.", empty=True),
        detector=_choice("What is looked for.", model.RedactionRule, "detector"),
        pattern={**_text("RE2.", empty=True), "maxLength": MAX_EXPRESSION},
        validator=_choice("What a match must satisfy.", model.RedactionRule, "validator"),
        action=action,
    )
    keyed = (
        "(has(self.keyFile) && self.keyFile != '') || !self.rules.exists(r, has(r.action) && "
        "has(r.action.type) && r.action.type in ['hash', 'tokenize'])"
    )
    return _spec(
        "What is taken out of requests and responses.",
        rule,
        rules=[(keyed, "hash and tokenize need a keyFile")],
        direction=_choice("What is looked through.", model.RedactionPolicy, "direction"),
        when=_condition("Which requests it concerns; all if left out."),
        onUninspectable=_choice(
            "What happens to what cannot be looked into.", model.RedactionPolicy, "on_uninspectable"
        ),
        maxBodyBytes={
            "type": "integer",
            "format": "int64",
            "minimum": 0,
            "maximum": reader.MAX_BODY_BYTES,
            "description": "Bodies larger than this cannot be looked into; 0: any length.",
        },
        dryRun={"type": "boolean", "description": "Tell what would be redacted; change nothing."},
        keyFile=_text("File of the mounted secret of hash and tokenize.", empty=True),
        descriptors={
            "type": "string",
            "maxLength": MAX_DESCRIPTORS,
            "description": "What grpcFields are looked up in: a FileDescriptorSet in base64.",
        },
        descriptorFile=_text("The same as a file beside the keys.", empty=True),
        audit={"type": "boolean", "description": "Whether findings are told in the audit log."},
    )


def _spec(
    about: str, rule: Object, rules: list[tuple[str, str]] | None = None, **more: Object
) -> Object:
    targets = _list_of(_target_ref(), "What the policy is for.", MAX_TARGETS)
    listed = _list_of(rule, "What it does.", reader.MAX_RULES)
    own = {"targetRefs": {**targets, "minItems": 1}, "rules": {**listed, "minItems": 1}}
    return _object(about, {**own, **more}, required=("targetRefs", "rules"), rules=rules)


def _target_ref() -> Object:
    return _object(
        "A Service, a Gateway, a GatewayClass or a route.",
        required=("kind", "name"),
        rules=[
            (
                "!has(self.sectionName) || self.kind.endsWith('Route')",
                "only rules of routes can be named",
            )
        ],
        group={**_text("", empty=True), "maxLength": 253},
        kind={**_text(""), "maxLength": 63},
        name={**_text(""), "maxLength": 253},
        namespace={**_text("", empty=True), "maxLength": 63},
        sectionName={**_text("", empty=True), "maxLength": 253},
    )


def _condition(about: str) -> Object:
    header = _object(
        "A header and its value.",
        required=("name",),
        name=_text("Of the header."),
        value=_text("exact, prefix*, *suffix, or * for any.", empty=True),
    )
    names = ("methods", "paths", "hosts", "principals", "notPrincipals", "namespaces")
    texts = {each: {**_list_of(_text(""), "", reader.MAX_ENTRIES), "minItems": 1} for each in names}
    return _object(about, {**texts, "headers": _list_of(header, "", reader.MAX_RULES)})


def _object(
    about: str,
    properties: Mapping[str, Object] = MappingProxyType({}),
    /,
    *,
    required: tuple[str, ...] = (),
    rules: list[tuple[str, str]] | None = None,
    **more: Object,
) -> Object:
    """A mapping. `rules` are expressions of CEL with what to say when one does not hold."""
    named = {**properties, **more}
    found: dict[str, Any] = {"type": "object", "description": about}
    if required:
        found["required"] = list(required)
    found["x-kubernetes-preserve-unknown-fields"] = True
    found["properties"] = named
    if rules:
        found["x-kubernetes-validations"] = [
            {"rule": rule, "message": message} for rule, message in rules
        ]
    return found


def _list_of(items: Object, about: str, most: int) -> Object:
    found: Object = {"type": "array", "maxItems": most, "items": items}
    return {**found, "description": about} if about else found


def _text(about: str, *, pattern: str = "", empty: bool = False) -> Object:
    found: Object = {"type": "string", "maxLength": _MAX_TEXT}
    if pattern:
        found["pattern"] = pattern
    elif not empty:
        found["minLength"] = 1
    return {**found, "description": about} if about else found


def _number(about: str, least: int) -> Object:
    return {
        "type": "integer",
        "format": "int64",
        "minimum": least,
        "maximum": _MAX_NUMBER,
        "description": about,
    }


def _choice(about: str, owner: type, field: str) -> Object:
    """One of the words that a field of the model can hold."""
    words: list[str] = []
    for each in (hint := get_type_hints(owner)[field], *get_args(hint)):
        words += [word for word in get_args(each) if isinstance(word, str) and word]
    return {"type": "string", "enum": list(dict.fromkeys(words)), "description": about}


def _list(words: tuple[str, ...]) -> str:
    return "[" + ", ".join(f"'{each}'" for each in words) + "]"
