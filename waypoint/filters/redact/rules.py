"""The rules of all policies that concern one direction of one request, compiled together.

`Plan` is shared by all such requests; `Report` is one request's: counts of what was found, by rule
and location, for the audit record. It never holds a value.
"""

from __future__ import annotations

from dataclasses import dataclass

from mesh.errors import ConfigError
from mesh.model.l7_policy import RedactionPolicy, RedactionRule
from waypoint.filters.chain import Blocked, Respond
from waypoint.filters.redact.actions import Secret, replace
from waypoint.filters.redact.descriptors import DescriptorSets
from waypoint.filters.redact.path_tree import PathTree, Step
from waypoint.filters.redact.scanner import Scanner

FLAG = "REDACT"
"""The access log's response flag of what a redaction policy refused."""


@dataclass(frozen=True, slots=True)
class RuleKey:
    """What a record says of a rule."""

    policy: str
    rule: str
    detector: str
    action: str
    is_dry_run: bool
    audits: bool


@dataclass(frozen=True, slots=True)
class ActiveRule:
    """A rule with its policy and the policy's key."""

    policy: RedactionPolicy
    rule: RedactionRule
    secret: Secret | None
    key: RuleKey

    @property
    def policy_name(self) -> str:
        """`namespace/name`."""
        return f"{self.policy.namespace}/{self.policy.name}"

    def replacement(self, kind: str, value: bytes) -> bytes:
        """What stands for the value. Raises `Blocked`, `ConfigError`."""
        if self.rule.action.kind == "block":
            raise Blocked(self.refusal(f"{kind} found"))
        return replace(self.rule.action, kind, value, self.secret)

    def refusal(self, reason: str) -> Respond:
        """403, naming policy and rule, never the value."""
        return Respond(
            403,
            b"blocked by redaction policy\n",
            ((b"content-type", b"text/plain"),),
            flag=FLAG,
            policy=self.policy_name,
            rule=self.rule.name,
            reason=reason,
            grpc_status=7,
        )


class Report:
    """What was found in one request."""

    # Plain dictionaries, as one is made for each request and mostly stays empty: a Counter costs
    # twenty times as much.
    __slots__ = ("counts", "uninspected")

    def __init__(self) -> None:
        self.counts: dict[tuple[RuleKey, str], int] = {}
        """Rule and location -> how often."""
        self.uninspected: dict[str, int] = {}
        """Why something could not be looked into -> how often."""

    def count(self, key: RuleKey, location: str) -> None:
        """A value was found there."""
        self.counts[key, location] = self.counts.get((key, location), 0) + 1

    def unseen(self, why: str) -> None:
        """Something could not be looked into."""
        self.uninspected[why] = self.uninspected.get(why, 0) + 1


class Plan:
    """What `rules` ask of one direction. Names of headers, cookies, fields are by lower case."""

    __slots__ = (
        "cookies", "descriptors", "dry", "form_fields", "grpc_fields", "grpc_paths", "headers",
        "json_paths", "live", "max_body_bytes", "on_uninspectable", "policies", "query_params",
        "rules", "scanners",
    )  # fmt: skip

    def __init__(
        self,
        policies: list[tuple[RedactionPolicy, Secret | None]],
        descriptors: DescriptorSets | None = None,
    ) -> None:
        """Raises `ConfigError`: a rule is not understood, or needs a key that is not there."""
        self.policies = [policy for policy, _ in policies]
        self.rules = [
            ActiveRule(policy, rule, secret, _key(policy, rule))
            for policy, secret in policies
            for rule in policy.rules
        ]
        live = [each for each in enumerate(self.rules) if not each[1].policy.is_dry_run]
        dry = [each for each in enumerate(self.rules) if each[1].policy.is_dry_run]
        self.live = Scanner([(index, each.rule) for index, each in live])
        self.dry = Scanner([(index, each.rule) for index, each in dry])
        self.scanners = tuple(each for each in (self.dry, self.live) if each)
        ordered = live + dry
        self.headers = _by_name((each.rule.headers, index) for index, each in ordered)
        self.cookies = _by_name((each.rule.cookies, index) for index, each in ordered)
        self.query_params = _by_name((each.rule.query_params, index) for index, each in ordered)
        self.form_fields = _by_name((each.rule.form_fields, index) for index, each in ordered)
        paths = [(path, index) for index, each in ordered for path in each.rule.json_paths]
        self.json_paths = PathTree(paths) if paths else None
        self.descriptors = descriptors
        self.grpc_paths, self.grpc_fields = _grpc_fields(ordered, descriptors)
        self.on_uninspectable = "Pass"
        for policy in self.policies:
            if policy.on_uninspectable == "Block" and not policy.is_dry_run:
                self.on_uninspectable = "Block"
        sizes = [each.max_body_bytes for each in self.policies if each.max_body_bytes]
        self.max_body_bytes = min(sizes, default=0)

    def take(
        self, report: Report, index: int, value: bytes, location: str, kind: str = "value"
    ) -> bytes | None:
        """Count a value; what stands for it, None if it stays (dry run). Raises `Blocked`."""
        rule = self.rules[index]
        report.count(rule.key, location)
        return None if rule.policy.is_dry_run else rule.replacement(kind, value)

    def drops(self, index: int) -> bool:
        """Whether what that rule takes goes as a whole, with its name."""
        rule = self.rules[index]
        return rule.rule.action.kind == "drop" and not rule.policy.is_dry_run

    def pass_unseen(self, report: Report, why: str) -> None:
        """Something cannot be looked into: counted, and refused if a policy says so.

        Raises `Blocked`.
        """
        report.unseen(why)
        if self.on_uninspectable == "Block":
            raise self.refuse_uninspectable(why)

    @property
    def sees_bodies(self) -> bool:
        """Whether any rule concerns bodies."""
        by_place = self.json_paths or self.form_fields or self.grpc_paths
        return bool(self.scanners or by_place)

    def refuse_uninspectable(self, why: str) -> Blocked:
        """The answer for what cannot be looked into, in the name of the policy that says so."""
        for policy in self.policies:
            if policy.on_uninspectable == "Block" and not policy.is_dry_run:
                rule = policy.rules[0] if policy.rules else RedactionRule(name="")
                refused = ActiveRule(policy, rule, None, _key(policy, rule))
                return Blocked(refused.refusal(f"cannot be inspected: {why}"))
        return Blocked(Respond(403, flag=FLAG, reason=f"cannot be inspected: {why}"))


def _key(policy: RedactionPolicy, rule: RedactionRule) -> RuleKey:
    return RuleKey(
        f"{policy.namespace}/{policy.name}",
        rule.name,
        rule.detector or "place",
        rule.action.kind,
        policy.is_dry_run,
        policy.audits,
    )


def _grpc_fields(
    ordered: list[tuple[int, ActiveRule]], descriptors: DescriptorSets | None
) -> tuple[PathTree | None, dict[str, Step]]:
    """Paths from the method's message, and fields by their full names."""
    entries = [(name, index) for index, each in ordered for name in each.rule.grpc_fields]
    if not entries:
        return None, {}
    if descriptors is None:
        raise ConfigError("grpcFields need descriptors")
    tree = PathTree([entry for entry in entries if entry[0].startswith("$")])
    named: dict[str, Step] = {}
    for name, index in entries:
        if not name.startswith("$"):
            if not descriptors.has_field(name):
                raise ConfigError(f"{name} is no field that the descriptors know")
            named.setdefault(name, tree.named(name, index))
    return tree, named


def _by_name(named: object) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    for names, index in named:  # type: ignore[attr-defined]
        for name in names:
            found.setdefault(name.lower().encode("utf-8"), index)
    return found
