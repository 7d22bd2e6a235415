"""Fields of heads and trailers, cookies and queries: by their names, and by detectors."""

from __future__ import annotations

from waypoint.filters.chain import Pair
from waypoint.filters.redact import views
from waypoint.filters.redact.rules import Plan, Report
from waypoint.filters.redact.text_body import redact_value

_NEVER_SEARCHED = frozenset((b"content-length", b"content-type", b"content-encoding", b"host",
                             b"date", b"etag", b"traceparent", b"tracestate", b"grpc-status",
                             b"content-range", b"range", b"last-modified"))  # fmt: skip
_PERCENT_ENCODED = frozenset((b"grpc-message", b"referer", b"location", b"content-location"))


def redact_pairs(plan: Plan, report: Report, pairs: list[Pair], where: str) -> list[Pair]:
    """Fields of a head or of trailers. Raises `Blocked`."""
    scanners = plan.scanners if _may_hold(plan, pairs) else ()
    if not scanners and not plan.headers and not plan.cookies:
        return pairs
    found = []
    for name, value in pairs:
        new: bytes | None = value
        index = plan.headers.get(name)
        location = ""
        if index is not None:
            new = _whole(plan, report, index, value, f"{where} header {name.decode('latin-1')}")
        elif plan.cookies and name in (b"cookie", b"set-cookie"):
            new = _redact_cookies(plan, report, name, value, where)
        if scanners and new is not None and index is None and name not in _NEVER_SEARCHED:
            syntax = views.FORM if name in _PERCENT_ENCODED else views.TEXT
            for scanner in scanners:
                location = location or f"{where} header {name.decode('latin-1')}"
                new = redact_value(plan, report, scanner, syntax, new, location)
        if new is value:
            found.append((name, value))
        elif new is not None:
            found.append((name, new.translate(None, b"\r\n\x00")))
    return found


def _may_hold(plan: Plan, pairs: list[Pair]) -> bool:
    """Whether any value has something that a detector wants."""
    if not plan.scanners:
        return False
    values, encoded = [], []
    for name, value in pairs:
        if name in _PERCENT_ENCODED:
            encoded.append(value)
        elif name not in _NEVER_SEARCHED:
            values.append(value)
    for scanner in plan.scanners:
        if not scanner.are_clean(views.TEXT, values) or not scanner.are_clean(views.FORM, encoded):
            return True
    return False


def _whole(plan: Plan, report: Report, index: int, value: bytes, location: str) -> bytes | None:
    """The whole value by its place; None: dropped."""
    put = plan.take(report, index, value, location)
    if put is None:
        return value
    return None if plan.drops(index) else put


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
        put = _whole(plan, report, index, content, f"{where} cookie {name.decode('latin-1')}")
        if put is not None:
            kept.append(name + b"=" + put + semicolon + attributes)
    return b"; ".join(kept) if kept else None


def redact_query(plan: Plan, report: Report, query: bytes) -> bytes:
    """The query's parameters by name, then all of it by detectors. Raises `Blocked`."""
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
            text = views.FORM.look(value).text
            put = _whole(plan, report, index, text, location)
            if put is not None:
                kept.append(name + equals + (value if put == text else views.write_form(put)))
        query = b"&".join(kept)
    for scanner in plan.scanners:
        query = redact_value(plan, report, scanner, views.FORM, query, "request query")
    return query
