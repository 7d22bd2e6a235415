"""What one filter would do with a request, as a step of an explanation.

The filter itself decides, on a copy of the request; only rate limits rehearse instead (nothing is
taken), faults are told and not drawn, and code that is not ours is not run. A filter of a kind
that is not listed here is not asked: it might wait for somebody, or count.
"""

from __future__ import annotations

from typing import Any

from mesh.model.l7_policy import RedactionRule
from waypoint.filters.authorize import Authorize
from waypoint.filters.chain import Filter, Request, Respond, Wait
from waypoint.filters.cors import CorsFilter
from waypoint.filters.ext_authz import ExternalAuthorization
from waypoint.filters.fault import FaultFilter
from waypoint.filters.jwt import Jwt
from waypoint.filters.rate_limit.filter import RateLimits
from waypoint.filters.rate_limit.gcra import NEVER
from waypoint.filters.rate_limit.shared import SharedLimits
from waypoint.filters.redact.filter import RedactionFilter

Step = dict[str, Any]


def explain_filter(each: Filter, request: Request) -> tuple[Step, Respond | None]:
    """The step, and the answer if the filter gives one.

    `outcome` is `passes`, `answers`, `may answer` (chance), or `not asked`; `policy` and `rule` are
    what decided, where something did.
    """
    match each:
        case FaultFilter():
            return _fault(each)
        case RateLimits():
            return _limits(each, request)
        case Authorize() | Jwt() | CorsFilter() | RedactionFilter():
            verdict = each.on_request(request)
        case SharedLimits():
            return _step(
                each, "not asked", reason=f"{each.where} counts, and nothing is taken"
            ), None
        case ExternalAuthorization():
            return _authorizers(each, request), None
        case _:
            return _step(each, "not asked", reason="a custom filter decides by itself"), None
    if isinstance(verdict, Wait):
        return _step(each, "not asked", reason="it would ask somebody, and wait"), None
    if verdict is not None:
        return _refused(each, verdict), verdict
    step = _step(each, "passes")
    match each:
        case Authorize():
            policy, rule = request.notes.get("authorization.policy", (None, None))
            reason = "an ALLOW rule matches" if policy else "no policy restricts it"
            noted = list(request.notes.get("authorization.noted", ()))
            step |= {"policy": policy, "rule": rule, "reason": reason, "noted": noted}
        case Jwt():
            told = f"the token of {request.principal} counts" if request.principal else ""
            step["reason"] = told or ("a token counts" if request.claims else "no token is sent")
        case RedactionFilter():
            _add_redactions(step, each, request)
    return step, None


def _authorizers(each: ExternalAuthorization, request: Request) -> Step:
    """Whom it would ask; nobody is."""
    found = each.would_ask(request)
    listed = [
        {"policy": policy, "rule": rule, "provider": provider} for policy, rule, provider in found
    ]
    if not found:
        return _step(each, "passes", reason="no rule of its policies matches", asks=listed)
    policy, rule, _ = found[0]
    names = ", ".join(dict.fromkeys(provider for _, _, provider in found))
    reason = f"the external authorizer {names} would be asked"
    return _step(each, "not asked", policy=policy, rule=rule, reason=reason, asks=listed)


def _step(each: Filter, outcome: str, **facts: object) -> Step:
    step = {"filter": each.name, "outcome": outcome, "policy": None, "rule": None, "reason": ""}
    return step | facts


def _refused(each: Filter, respond: Respond) -> Step:
    return _step(
        each,
        "answers",
        policy=respond.policy or None,
        rule=respond.rule or None,
        reason=respond.reason or f"answered {respond.status}",
    )


def _fault(each: FaultFilter) -> tuple[Step, Respond | None]:
    fault = each.fault
    told = []
    if fault.delay_seconds and fault.delay_percent:
        told.append(f"{fault.delay_percent:g} % wait {fault.delay_seconds:g} s")
    may = bool(fault.abort_status and fault.abort_percent)
    if may:
        told.append(f"{fault.abort_percent:g} % are answered {fault.abort_status}")
    return _step(each, "may answer" if may else "passes", reason=", ".join(told)), None


def _limits(each: RateLimits, request: Request) -> tuple[Step, Respond | None]:
    verdict, asked = each.rehearse(request)
    step = _refused(each, verdict) if verdict is not None else _step(each, "passes")
    step["limits"] = [
        {
            "policy": one.policy,
            "rule": one.rule.name,
            "key": list(one.key),
            "requests": one.rate.requests,
            "windowSeconds": one.rate.window_seconds,
            "allowed": one.verdict.is_allowed,
            "remaining": one.verdict.remaining,
            "retrySeconds": (
                None if one.verdict.retry_seconds == NEVER else one.verdict.retry_seconds
            ),
            "shadow": one.rule.is_shadow,
        }
        for one in asked
    ]
    if not step["reason"]:
        step["reason"] = _concern(len(asked), "limit")
    return step, verdict


def _add_redactions(step: Step, each: RedactionFilter, request: Request) -> None:
    """What was found in this head, and the rules that bodies and the response meet."""
    step["found"] = [
        {"policy": key.policy, "rule": key.rule, "action": key.action, "location": where,
         "count": count, "dryRun": key.is_dry_run}
        for (key, where), count in sorted(
            each.report(request).counts.items(), key=lambda item: str(item[0])
        )
    ]  # fmt: skip
    step["rules"] = [
        {
            "policy": f"{policy.namespace}/{policy.name}",
            "rule": rule.name,
            "direction": policy.direction,
            "looksFor": _looks_for(rule),
            "action": rule.action.kind,
            "dryRun": policy.is_dry_run,
            "uninspectable": policy.on_uninspectable,
        }
        for policy in each.policies_of(request)
        for rule in policy.rules
    ]
    step["reason"] = _concern(len(step["rules"]), "rule")


def _concern(number: int, what: str) -> str:
    return f"{number} {what}s concern it" if number > 1 else f"{number or 'no'} {what} concerns it"


def _looks_for(rule: RedactionRule) -> list[str]:
    places = {
        "header": rule.headers,
        "cookie": rule.cookies,
        "query": rule.query_params,
        "json": rule.json_paths,
        "form": rule.form_fields,
        "grpc": rule.grpc_fields,
    }
    found = [f"{kind} {name}" for kind, names in places.items() for name in names]
    return ([rule.detector] if rule.detector else []) + found
