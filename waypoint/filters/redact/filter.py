"""RedactionPolicy as a filter: heads, queries, trailers and bodies of requests and responses.

Compiled when policies change. A policy that cannot be carried out (its own `problem`, no key, a
pattern that is no RE2, descriptors that are none) answers 500 to what it targets. What cannot be
inspected is refused or passed as the policies say, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mesh.errors import ConfigError
from mesh.model.l7_policy import RedactionPolicy
from waypoint.filters.chain import (
    Blocked,
    BodyFilter,
    Filter,
    Pair,
    Request,
    Respond,
    Response,
    Verdict,
)
from waypoint.filters.condition import Test, compile_condition
from waypoint.filters.redact import views
from waypoint.filters.redact.actions import KEY_SECONDS, Secret
from waypoint.filters.redact.bodies import open_body
from waypoint.filters.redact.descriptors import Descriptors, DescriptorSets, decode
from waypoint.filters.redact.heads import redact_pairs, redact_query
from waypoint.filters.redact.rules import FLAG, Plan, Report
from waypoint.filters.redact.text_body import redact_value

ReadKey = Callable[[str], bytes]
"""The bytes of a file of keys or descriptors by its name. Raises `ConfigError`."""
HIDDEN = b"[redacted]"
HIDE_ALL = Plan([])
"""Stands for a policy that is not understood: it could be about anything."""
_Known = tuple[Test, RedactionPolicy, Secret | None, Descriptors | None]


class RedactionFilter:
    """All redaction policies of one service. `problem`s refuse what they target."""

    name = "redaction"

    def __init__(self, policies: Sequence[RedactionPolicy], read_key: ReadKey) -> None:
        self._read_key = read_key
        self._lacking: list[tuple[Test, RedactionPolicy, str]] = []
        """Policies whose files are not there yet, and what is said of that."""
        self._tried_at = 0.0
        self._refusals: list[tuple[Test, Respond]] = []
        self._known: list[_Known] = []
        self._plans: dict[tuple[str, tuple[int, ...]], Plan] = {}
        for policy in policies:
            try:
                test = compile_condition(policy.condition)
            except ConfigError as exc:
                self._refusals.append((lambda _: True, _refusal(policy, str(exc))))
                continue
            self._add(test, policy)

    def _add(self, test: Test, policy: RedactionPolicy) -> None:
        try:
            secret, descriptors = _prepare(policy, self._read_key)
            Plan([(policy, secret)], _together([descriptors] if descriptors else []))
        except ConfigError as exc:
            if exc.field == "keyFile":  # the file may come later
                self._lacking.append((test, policy, str(exc)))
            else:
                self._refusals.append((test, _refusal(policy, str(exc))))
        else:
            self._known.append((test, policy, secret, descriptors))

    def _try_again(self, now: float) -> None:
        if now - self._tried_at >= KEY_SECONDS:
            self._tried_at = now
            lacking, self._lacking = self._lacking, []
            for test, policy, _ in lacking:
                self._add(test, policy)

    def on_request(self, request: Request) -> Verdict:
        """Refuse what a broken policy targets; redact headers, cookies and query."""
        for test, respond in self._refusals:
            if test(request):
                return respond
        if self._lacking:
            self._try_again(request.now)
            for test, policy, reason in self._lacking:
                if test(request):
                    return _refusal(policy, reason)
        chosen = tuple(index for index, each in enumerate(self._known) if each[0](request))
        if not chosen:
            return None
        for index in chosen:
            secret = self._known[index][2]
            if secret is not None:
                secret.refresh(request.now)
        # What a header says may be redacted below; the response is judged by what was sent.
        request.notes[self.name] = chosen
        plan = self._plan("Request", chosen)
        if plan is None:
            return None
        report = self.report(request)
        try:
            headers = request.headers
            headers.pairs = redact_pairs(plan, report, headers.pairs, "request")
            if request.query:
                request.query = redact_query(plan, report, request.query)
            for scanner in plan.scanners:
                request.path = redact_value(
                    plan, report, scanner, views.FORM, request.path, "request path"
                )
        except Blocked as blocked:
            return blocked.respond
        return None

    def on_response(self, request: Request, response: Response) -> Respond | None:
        """Redact the response's headers."""
        plan = self._plan("Response", request.notes.get(self.name, ()))
        if plan is not None:
            try:
                headers = response.headers
                headers.pairs = redact_pairs(plan, self.report(request), headers.pairs, "response")
            except Blocked as blocked:
                return blocked.respond
        return None

    def open_request_body(self, request: Request) -> BodyFilter | None:
        """What redacts the request's body."""
        plan = self._plan("Request", request.notes.get(self.name, ()))
        if plan is None:
            return None
        return open_body(plan, self.report(request), request, request.headers, is_request=True)

    def open_response_body(self, request: Request, response: Response) -> BodyFilter | None:
        """What redacts the response's body."""
        plan = self._plan("Response", request.notes.get(self.name, ()))
        if plan is None or request.method == b"HEAD" or response.status in (204, 304):
            return None
        return open_body(plan, self.report(request), request, response.headers, is_request=False)

    def redact_trailers(
        self, request: Request, pairs: Sequence[Pair], *, is_request: bool
    ) -> Sequence[Pair]:
        """Trailers as heads are. Raises `Blocked`."""
        direction = "Request" if is_request else "Response"
        plan = self._plan(direction, request.notes.get(self.name, ()))
        if plan is None:
            return pairs
        return redact_pairs(plan, self.report(request), list(pairs), f"{direction.lower()} trailer")

    def policies_of(self, request: Request) -> list[RedactionPolicy]:
        """The policies that concern a request, for its audit record."""
        return [self._known[index][1] for index in request.notes.get(self.name, ())]

    def report(self, request: Request) -> Report:
        """What was found in this request so far."""
        found: Report | None = request.notes.get("redaction report")
        if found is None:
            found = request.notes["redaction report"] = Report()
        return found

    def redact_texts(self, request: Request, texts: list[bytes]) -> list[bytes]:
        """The same values taken out of texts for the access log or the audit, also when the
        request was answered before it came here.
        """
        plan = self._telemetry_plan(request)
        if plan is None:
            return texts
        if plan is HIDE_ALL:
            return [HIDDEN for _ in texts]
        if plan.live.are_clean(views.FORM, texts):
            return texts
        return [_hidden(plan, text) for text in texts]

    def _telemetry_plan(self, request: Request) -> Plan | None:
        """Of both directions: what must not be seen in one is not written down from the other."""
        if self._refusals or self._lacking:
            broken = [test for test, _ in self._refusals] + [each[0] for each in self._lacking]
            if any(test(request) for test in broken):
                return HIDE_ALL
        chosen = request.notes.get(self.name)
        if chosen is None:
            chosen = tuple(index for index, each in enumerate(self._known) if each[0](request))
        return self._plan("Any", chosen)

    def _plan(self, direction: str, chosen: tuple[int, ...]) -> Plan | None:
        if not chosen:
            return None
        key = direction, chosen
        plan = self._plans.get(key)
        if plan is None:
            used = [
                self._known[index]
                for index in chosen
                if direction == "Any" or self._known[index][1].direction in (direction, "Both")
            ]
            sets = [each[3] for each in used if each[3] is not None]
            plan = Plan([(policy, secret) for _, policy, secret, _ in used], _together(sets))
            self._plans[key] = plan
        return plan if plan.policies else None


def redact_trailers(
    filters: Sequence[Filter], request: Request, pairs: Sequence[Pair], *, is_request: bool
) -> Sequence[Pair]:
    """Trailers, as the redactions among the filters want them. Raises `Blocked`."""
    for each in filters:
        if isinstance(each, RedactionFilter) and pairs:
            pairs = each.redact_trailers(request, pairs, is_request=is_request)
    return pairs


def _hidden(plan: Plan, text: bytes) -> bytes:
    try:
        return redact_value(plan, Report(), plan.live, views.FORM, text, "log")
    except Blocked:
        return HIDDEN


def _together(sets: Sequence[Descriptors]) -> DescriptorSets | None:
    return DescriptorSets(sets) if sets else None


def _refusal(policy: RedactionPolicy, reason: str) -> Respond:
    name = f"{policy.namespace}/{policy.name}"
    return Respond(500, flag=FLAG, policy=name, reason=reason, grpc_status=13)


def _prepare(
    policy: RedactionPolicy, read_key: ReadKey
) -> tuple[Secret | None, Descriptors | None]:
    if policy.problem:
        raise ConfigError(policy.problem)
    secret = descriptors = None
    if any(rule.action.kind in ("hash", "tokenize") for rule in policy.rules):
        if not policy.key_file:
            raise ConfigError("hash and tokenize need a key", hint="set keyFile")
        name = policy.key_file
        secret = Secret(read_key(name), lambda: read_key(name))
    if policy.descriptors:
        descriptors = Descriptors(decode(policy.descriptors))
    elif policy.descriptor_file:
        descriptors = Descriptors(read_key(policy.descriptor_file))
    return secret, descriptors
