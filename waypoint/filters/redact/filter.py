"""RedactionPolicy as a filter: heads, queries and bodies of requests and responses.

Compiled when policies change. A policy that cannot be carried out (its own `problem`, no key, a
pattern that is no RE2, a part that this build does not do) answers 500 to what it targets.
Not done yet: JSON paths, form fields by name, gRPC, multipart, charsets that are no superset of
ASCII. The first two fail closed; bodies of the others are uninspectable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mesh.errors import ConfigError
from mesh.model.l7_policy import RedactionPolicy
from waypoint.filters.chain import Blocked, BodyFilter, Headers, Request, Respond, Response, Verdict
from waypoint.filters.condition import Test, compile_condition
from waypoint.filters.redact import views
from waypoint.filters.redact.actions import Secret
from waypoint.filters.redact.encoded_body import CODINGS, Recoded, Refused, Seen
from waypoint.filters.redact.rules import FLAG, Plan, Report
from waypoint.filters.redact.text_body import TextRedactor, redact_value

_ASCII_CHARSETS = frozenset((b"utf-8", b"utf8", b"us-ascii", b"ascii", b"iso-8859-1",
                             b"iso-8859-15", b"windows-1252", b"latin1", b"latin-1"))  # fmt: skip
_NEVER_SEARCHED = frozenset((b"content-length", b"content-type", b"content-encoding", b"host",
                             b"date", b"etag", b"traceparent", b"tracestate"))  # fmt: skip
ReadKey = Callable[[str], bytes]
"""The bytes of a key file by its path. Raises `ConfigError`."""


class RedactionFilter:
    """All redaction policies of one service. `problem`s refuse what they target."""

    name = "redaction"

    def __init__(self, policies: Sequence[RedactionPolicy], read_key: ReadKey) -> None:
        self._refusals: list[tuple[Test, Respond]] = []
        self._known: list[tuple[Test, RedactionPolicy, Secret | None]] = []
        self._plans: dict[tuple[str, tuple[int, ...]], Plan] = {}
        for policy in policies:
            try:
                test = compile_condition(policy.condition)
            except ConfigError as exc:
                self._refusals.append((lambda _: True, _refusal(policy, str(exc))))
                continue
            try:
                secret = _prepare(policy, read_key)
                Plan([(policy, secret)])
            except ConfigError as exc:
                self._refusals.append((test, _refusal(policy, str(exc))))
            else:
                self._known.append((test, policy, secret))

    def on_request(self, request: Request) -> Verdict:
        """Refuse what a broken policy targets; redact headers, cookies and query."""
        for test, respond in self._refusals:
            if test(request):
                return respond
        chosen = tuple(index for index, each in enumerate(self._known) if each[0](request))
        if not chosen:
            return None
        # What a header says may be redacted below; the response is judged by what was sent.
        request.notes[self.name] = chosen
        plan = self._plan("Request", chosen)
        if plan is None:
            return None
        report = self.report(request)
        try:
            _redact_headers(plan, report, request.headers, "request")
            if request.query:
                request.query = _redact_query(plan, report, request.query)
            request.path = redact_value(plan, report, plan.live, views.FORM, request.path, "path")
        except Blocked as blocked:
            return blocked.respond
        return None

    def on_response(self, request: Request, response: Response) -> Respond | None:
        """Redact the response's headers."""
        plan = self._plan("Response", request.notes.get(self.name, ()))
        if plan is not None:
            try:
                _redact_headers(plan, self.report(request), response.headers, "response")
            except Blocked as blocked:
                return blocked.respond
        return None

    def open_request_body(self, request: Request) -> BodyFilter | None:
        """What redacts the request's body."""
        plan = self._plan("Request", request.notes.get(self.name, ()))
        return self._open(plan, request, request.headers, "request body")

    def open_response_body(self, request: Request, response: Response) -> BodyFilter | None:
        """What redacts the response's body."""
        plan = self._plan("Response", request.notes.get(self.name, ()))
        if request.method == b"HEAD" or response.status in (204, 304):
            return None
        return self._open(plan, request, response.headers, "response body")

    def report(self, request: Request) -> Report:
        """What was found in this request so far."""
        found: Report = request.notes.setdefault("redaction report", Report())
        return found

    def redact_text(self, request: Request, text: bytes) -> bytes:
        """The same values taken out of a line for the access log or a span, also when the request
        was answered before it came here.
        """
        chosen = request.notes.get(self.name)
        if chosen is None:
            chosen = tuple(index for index, each in enumerate(self._known) if each[0](request))
        plan = self._plan("Request", chosen)
        if plan is None:
            return text
        try:
            return redact_value(plan, Report(), plan.live, views.FORM, text, "log")
        except Blocked:
            return b"[redacted]"

    def _plan(self, direction: str, chosen: tuple[int, ...]) -> Plan | None:
        if not chosen:
            return None
        key = direction, chosen
        if key not in self._plans:
            used = [self._known[index][1:] for index in chosen]
            self._plans[key] = Plan(
                [each for each in used if each[0].direction in (direction, "Both")]
            )
        plan = self._plans[key]
        return plan if plan.policies else None

    def _open(
        self, plan: Plan | None, request: Request, headers: Headers, location: str
    ) -> BodyFilter | None:
        if plan is None or not plan.sees_bodies:
            return None
        why, syntax = _kind(headers.get(b"content-type") or b"")
        if request.is_grpc:
            why = "gRPC"
        coding = (headers.get(b"content-encoding") or b"identity").strip().lower()
        if coding != b"identity" and coding not in CODINGS:
            why = "content coding is not known"
        if headers.get(b"content-range") is not None:
            why = "a part of a body"
        report = self.report(request)
        if why:
            if plan.on_uninspectable == "Block":
                return Refused(plan, why)
            report.uninspected[0, why] += 1
            return None
        # The text is changed, so what was computed over it is no longer true.
        for stale in (b"etag", b"digest", b"content-digest", b"content-md5", b"accept-ranges"):
            headers.remove(stale)
        inner: BodyFilter = TextRedactor(plan, report, syntax, location)
        if plan.on_uninspectable == "Block":
            inner = Seen(plan, inner)
        return inner if coding == b"identity" else Recoded(plan, coding, inner)


def _refusal(policy: RedactionPolicy, reason: str) -> Respond:
    name = f"{policy.namespace}/{policy.name}"
    return Respond(500, flag=FLAG, policy=name, reason=reason, grpc_status=13)


def _prepare(policy: RedactionPolicy, read_key: ReadKey) -> Secret | None:
    if policy.problem:
        raise ConfigError(policy.problem)
    for rule in policy.rules:
        if rule.json_paths or rule.form_fields:
            raise ConfigError(f"rule {rule.name}: jsonPaths and formFields are not carried out yet")
    if any(rule.action.kind in ("hash", "tokenize") for rule in policy.rules):
        if not policy.key_file:
            raise ConfigError("hash and tokenize need a key", hint="set keyFile")
        return Secret(read_key(policy.key_file))
    return None


def _kind(content_type: bytes) -> tuple[str, views.Syntax]:
    """Why a type cannot be inspected (empty: it can), and how its text is escaped."""
    kind, _, rest = content_type.lower().partition(b";")
    kind = kind.strip()
    for part in rest.split(b";"):
        name, _, value = part.strip().partition(b"=")
        if name == b"charset" and value.strip(b' "') not in _ASCII_CHARSETS:
            return "charset is not known", views.TEXT
    if kind.endswith((b"/json", b"+json", b"/x-ndjson", b"/ndjson", b"/jsonl", b"json-seq")):
        return "", views.JSON
    if kind == b"application/x-www-form-urlencoded":
        return "", views.FORM
    if kind.endswith((b"/xml", b"+xml")) or kind == b"text/html":
        return "", views.XML
    if kind.startswith(b"text/") or kind in (b"application/javascript", b"application/yaml"):
        return "", views.TEXT
    return f"content type {kind.decode('ascii', 'replace') or 'is missing'}", views.TEXT


def _redact_headers(plan: Plan, report: Report, headers: Headers, where: str) -> None:
    pairs = []
    for name, value in headers.pairs:
        location = f"{where} header {name.decode('latin-1')}"
        index = plan.headers.get(name)
        new: bytes | None = value
        if index is not None:
            new = _whole(plan, report, index, value, location)
        elif name in (b"cookie", b"set-cookie") and plan.cookies:
            new = _redact_cookies(plan, report, name, value, where)
        if new is not None and name not in _NEVER_SEARCHED and index is None:
            for scanner in (plan.dry, plan.live):
                if scanner:
                    new = redact_value(plan, report, scanner, views.TEXT, new, location)
        if new is not None:
            pairs.append((name, new.translate(None, b"\r\n\x00")))
    headers.pairs = pairs


def _whole(plan: Plan, report: Report, index: int, value: bytes, location: str) -> bytes | None:
    """The whole value by its place; None: dropped."""
    rule = plan.rules[index]
    report.counts[index, location] += 1
    if rule.policy.is_dry_run:
        return value
    put = rule.replacement("value", value)
    return None if rule.rule.action.kind == "drop" else put


def _redact_cookies(
    plan: Plan, report: Report, header: bytes, value: bytes, where: str
) -> bytes | None:
    parts = [value] if header == b"set-cookie" else value.split(b";")
    kept = []
    for part in parts:
        pair, semicolon, attributes = part.partition(b";")
        name, _, content = pair.strip().partition(b"=")
        index = plan.cookies.get(name.lower())
        if index is None:
            kept.append(part.strip())
            continue
        location = f"{where} cookie {name.decode('latin-1')}"
        put = _whole(plan, report, index, content, location)
        if put is not None:
            kept.append(name + b"=" + put + semicolon + attributes)
    return b"; ".join(kept) if kept else None


def _redact_query(plan: Plan, report: Report, query: bytes) -> bytes:
    if plan.query_params:
        kept = []
        for part in query.split(b"&"):
            name, equals, value = part.partition(b"=")
            shown = views.FORM.look(name).text.lower()
            index = plan.query_params.get(shown)
            if index is None:
                kept.append(part)
                continue
            location = f"request query {shown.decode('latin-1')}"
            put = _whole(plan, report, index, views.FORM.look(value).text, location)
            if put is not None:
                kept.append(name + equals + (value if put == value else views.write_form(put)))
        query = b"&".join(kept)
    for scanner in (plan.dry, plan.live):
        if scanner:
            query = redact_value(plan, report, scanner, views.FORM, query, "request query")
    return query
