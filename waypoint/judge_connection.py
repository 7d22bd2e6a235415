"""Whether a connection that nobody looks into may pass. Pure.

AuthorizationPolicy is judged by what is known of a connection. Whatever else a service's policies
ask for needs the requests in it: they refuse it, as do tokens where the port could speak HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable

from mesh.errors import Refusal
from mesh.model.service import AppProtocol
from waypoint.filters.authorize import Authorize
from waypoint.filters.chain import Filter, Request
from waypoint.filters.jwt import Jwt

_NEVER_HTTP = frozenset({AppProtocol.TCP, AppProtocol.TLS})


def judge_connection(
    filters: Iterable[Filter], facts: Request, protocol: AppProtocol
) -> Refusal | None:
    """The refusal of the first filter that has one. `facts` is a request without its HTTP."""
    for each in filters:
        if isinstance(each, Authorize):
            decision = each.connections.judge(facts)
            if not decision.is_allowed:
                name = f"{decision.policy} {decision.rule}".strip()
                return Refusal("DENY", f"{decision.reason} ({name})", http_status=403)
        elif isinstance(each, Jwt) and protocol in _NEVER_HTTP:
            continue  # there are no tokens here
        else:
            said = f"{each.name} cannot judge a connection that is not HTTP"
            return Refusal("DENY", said, http_status=403)
    return None
