"""Which filters a body needs: by its content type, its codings, and what the policies ask for.

    multipart/*                          part by part, each as its own type says
    *json, *+json, newline-delimited     by path, then by detector
    text/event-stream                    lines that carry JSON by path, then by detector
    application/x-www-form-urlencoded    by field, then by detector
    text, XML, HTML, YAML, JavaScript    by detector; by path if it turns out to be JSON
    application/grpc*                    by field, if the descriptors know the method

Everything else cannot be inspected. What is given back is `None` where no rule concerns bodies.
"""

from __future__ import annotations

from waypoint.filters.chain import BodyFilter, Headers, Request
from waypoint.filters.redact import views
from waypoint.filters.redact.encoded_body import CODINGS, Chained, Inspectable, Recoded, Refused
from waypoint.filters.redact.event_body import EventRedactor, Sniffed
from waypoint.filters.redact.form_body import FormRedactor
from waypoint.filters.redact.grpc_body import GrpcRedactor
from waypoint.filters.redact.json_body import JsonRedactor
from waypoint.filters.redact.multipart_body import MultipartRedactor, boundary_of
from waypoint.filters.redact.rules import Plan, Report
from waypoint.filters.redact.text_body import TextRedactor

MAX_CODINGS = 3
_MAX_KINDS, _MAX_KIND_BYTES = 256, 128
_UTF8 = frozenset((b"utf-8", b"utf8", b"us-ascii", b"ascii"))
_BYTES = frozenset((b"iso-8859-1", b"iso-8859-15", b"windows-1252", b"latin1", b"latin-1"))
_JSON = (b"/json", b"+json", b"/x-ndjson", b"/ndjson", b"/jsonl", b"json-seq", b"json-lines")
_GRPC_KINDS = (b"application/grpc", b"application/grpc+proto", b"application/grpc-web",
               b"application/grpc-web+proto")  # fmt: skip
_STALE = frozenset((b"etag", b"digest", b"content-digest", b"repr-digest", b"content-md5",
                    b"accept-ranges"))  # fmt: skip


def open_body(
    plan: Plan, report: Report, request: Request, headers: Headers, *, is_request: bool
) -> BodyFilter | None:
    """What redacts a body with these headers; None: nothing looks at bodies."""
    if not plan.sees_bodies:
        return None
    location = "request body" if is_request else "response body"
    if headers.get(b"content-range") is not None:
        return Refused(plan, report, "a part of a body")
    codings = [
        each.strip()
        for each in (headers.get(b"content-encoding") or b"").lower().split(b",")
        if each.strip() not in (b"", b"identity")
    ]
    if len(codings) > MAX_CODINGS or not CODINGS.issuperset(codings):
        return Refused(plan, report, "content coding is not known")
    kind = (headers.get(b"content-type") or b"").lower()
    if kind.startswith(b"application/grpc"):
        inner = _grpc(plan, report, request, headers, kind, location, is_request=is_request)
    else:
        inner = open_text(plan, report, headers.get(b"content-type") or b"", location)
    if isinstance(inner, Refused):
        if plan.on_uninspectable == "Pass" and headers.get(b"content-length") == b"0":
            return None
        return inner
    # The text is changed, so what was computed over it is no longer true.
    headers.remove_all(_STALE)
    for coding in codings:
        inner = Recoded(plan, report, coding, inner)
    return inner


def open_text(plan: Plan, report: Report, content_type: bytes, location: str) -> BodyFilter:
    """What looks into text of that type, without its codings."""
    known = _kinds.get(content_type)
    if known is None:
        known = _Kind(content_type)
        if len(content_type) <= _MAX_KIND_BYTES:
            if len(_kinds) >= _MAX_KINDS:
                _kinds.clear()
            _kinds[content_type] = known
    if known.is_multipart:
        return _multipart(plan, report, content_type, location)
    syntax = known.syntax
    if syntax is None:
        return Refused(plan, report, known.problem)
    filters: list[BodyFilter] = []
    if syntax is views.FORM:
        if plan.form_fields:
            filters.append(FormRedactor(plan, report, location))
    elif plan.json_paths is not None:
        if syntax is views.JSON:
            filters.append(JsonRedactor(plan, report, location))
        else:
            is_events = known.is_events
            filters.append((EventRedactor if is_events else Sniffed)(plan, report, location))
    if plan.live or plan.dry:
        filters.append(TextRedactor(plan, report, syntax, location))
    inner = filters[0] if len(filters) == 1 else Chained(filters)
    return Inspectable(plan, report, inner, is_utf8=known.is_utf8)


class _Kind:
    """What a Content-Type means for us."""

    __slots__ = ("is_events", "is_multipart", "is_utf8", "problem", "syntax")

    def __init__(self, content_type: bytes) -> None:
        kind, _, parameters = content_type.lower().partition(b";")
        kind = kind.strip()
        charset = _charset(parameters)
        self.is_multipart = kind.startswith(b"multipart/")
        self.is_events = kind == b"text/event-stream"
        self.is_utf8 = charset in _UTF8
        self.syntax: views.Syntax | None = None
        self.problem = ""
        if charset and charset not in _UTF8 and charset not in _BYTES:
            self.problem = "charset is not known"
        elif kind.endswith(_JSON):
            self.syntax, self.is_utf8 = views.JSON, charset not in _BYTES
        elif kind == b"application/x-www-form-urlencoded":
            self.syntax = views.FORM
        else:
            self.syntax = _text_syntax(kind)
            name = kind.decode("ascii", "replace")
            self.problem = f"content type {name or 'is missing'}"


_kinds: dict[bytes, _Kind] = {}
"""As few services send many."""


def _charset(parameters: bytes) -> bytes:
    for part in parameters.split(b";"):
        name, _, value = part.strip().partition(b"=")
        if name == b"charset":
            return value.strip(b' "')
    return b""


def _text_syntax(kind: bytes) -> views.Syntax | None:
    if kind.endswith((b"/xml", b"+xml")) or kind == b"text/html":
        return views.XML
    if kind.startswith(b"text/"):
        return views.TEXT
    known = (b"application/javascript", b"application/yaml", b"application/x-yaml",
             b"application/graphql", b"application/sql", b"application/toml")  # fmt: skip
    return views.TEXT if kind in known else None


def _multipart(plan: Plan, report: Report, content_type: bytes, location: str) -> BodyFilter:
    boundary = boundary_of(content_type)
    if boundary is None:
        return Refused(plan, report, "multipart without a boundary")

    def open_part(kind: bytes, is_file: bool, where: str) -> BodyFilter | None:
        if kind.lower().startswith(b"multipart/"):
            return Refused(plan, report, "multipart within multipart")
        # RFC 7578 section 4.4: a part without a type is text; a file without one could be anything.
        if not kind and is_file:
            return Refused(plan, report, "a file without a content type")
        return open_text(plan, report, kind or b"text/plain", where)

    return MultipartRedactor(plan, report, boundary, open_part, location)


def _grpc(
    plan: Plan, report: Report, request: Request, headers: Headers, kind: bytes, location: str,
    *, is_request: bool,
) -> BodyFilter:  # fmt: skip
    if kind.partition(b";")[0].strip() not in _GRPC_KINDS:
        return Refused(plan, report, "gRPC that is not protobuf")
    if plan.descriptors is None:
        return Refused(plan, report, "gRPC without descriptors")
    method = plan.descriptors.of_method(request.path)
    if method is None:
        return Refused(plan, report, "a gRPC method that the descriptors do not know")
    coding = (headers.get(b"grpc-encoding") or b"identity").strip().lower()
    return GrpcRedactor(plan, report, method[0 if is_request else 1], coding, location)
