"""What the demo looks at behind a waypoint: routes, retries, policy, limits, redaction.

The steps write ordinary objects beside the example's own, as a person would, ask, compare what
came back with what must, and take the objects away again. `prices` is a service in two versions
that says what reached it.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import trio
from joserfc import jwt
from joserfc.jwk import ECKey

from mesh.lab.story import Failed, Story, expect, in_thread, ip_of
from mesh.lab.story_objects import COLLECTOR, POLICY, PRICES, ROUTE, SERVICE, VERSION
from mesh.runtime.tracing.received import ReceivedSpan, read_export

# One connection, `count` requests one after the other; a line of JSON for each answer.
ASK = """
import http.client, json, sys
asked = json.loads(sys.argv[1])
c = http.client.HTTPConnection("prices", 80, timeout=10)
for _ in range(asked["count"]):
    c.request("GET", asked["path"], headers=asked["headers"])
    r = c.getresponse()
    body = r.read().decode()
    print(json.dumps({"status": r.status, "body": body, "headers": dict(r.getheaders())}))
"""
ISSUER = "https://demo.ambit.example"
Answer = Mapping[str, Any]


Path = list[ReceivedSpan]


def backend(version: str, weight: int = 1) -> dict[str, Any]:
    """A backendRef."""
    return {"name": f"prices-{version}", "port": 80, "weight": weight}


class L7Story:
    """The steps behind the waypoint, told in the story's lab."""

    def __init__(self, story: Story) -> None:
        self._story = story

    async def ask(
        self, path: str = "/", *, pod: str = "reader", count: int = 1, **headers: str
    ) -> list[Answer]:
        """GETs of `path` at prices; status, body, headers of each answer."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        order = json.dumps({"path": path, "count": count, "headers": sent})
        argv = ["python3", "-c", ASK, order]
        done = await in_thread(self._story.client.run, "shop", pod, argv)
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        expect(len(answers) == count, f"GET {path} from {pod}: {said or answers}")
        return answers

    async def until_answer(
        self,
        what: str,
        wanted: Callable[[Answer], bool],
        path: str = "/",
        *,
        pod: str = "reader",
        **headers: str,
    ) -> float:
        """Ask until an answer is as wanted. Seconds taken."""

        async def probe() -> str | None:
            try:
                (answer,) = await self.ask(path, pod=pod, count=1, **headers)
            except Failed as failed:
                return str(failed)
            return None if wanted(answer) else f"HTTP {answer['status']}: {answer['body'][:200]}"

        return await self._story.until(what, probe)

    @contextmanager
    def written(self, name: str, text: str) -> Iterator[None]:
        """A file of the lab's directory, for as long as a step lasts."""
        path = self._story.directory / name
        path.write_text(text)
        try:
            yield
        finally:
            path.unlink()

    async def log_of_waypoint(self, wanted: Callable[[Answer], bool]) -> Answer:
        """The newest access record of the waypoint that fits."""
        found: list[Answer] = []

        async def look() -> str | None:
            pod = await self._waypoint()
            name = pod["metadata"]["name"]
            lines = await in_thread(
                lambda: b"".join(self._story.client.logs(pod=("shop", name), tail=500)).splitlines()
            )
            records = [json.loads(line) for line in lines if line.startswith(b"{")]
            found.extend(each for each in records if wanted(each))
            return None if found else "no such record"

        await self._story.until("access log of the waypoint", look, 5)
        return found[-1]

    async def log_of_servers(self) -> str:
        """What both versions printed: the paths as they came."""
        client = self._story.client
        chunks: list[bytes] = []
        for pod in ("prices-v1", "prices-v2"):
            chunks += await in_thread(lambda: list(client.logs(pod=("shop", pod))))  # noqa: B023
        return b"".join(chunks).decode(errors="replace")

    async def _waypoint(self) -> dict[str, Any]:
        pods = await self._story.pods(**{"gateway.networking.k8s.io/gateway-name": "waypoint"})
        expect(bool(pods), "the shop has no pod of a waypoint")
        return pods[0]

    async def waypoint_apply(self) -> str:
        """One command gives the shop a waypoint; what is asked for passes it from then on."""
        versions = [VERSION.format(version=f"v{n}", node=f"node{n}") for n in (1, 2)]
        path = self._story.directory / "70-prices.yaml"
        path.write_text(PRICES + "".join(versions) + SERVICE)
        started = trio.current_time()
        argv = [sys.executable, "-m", "mesh.cli", "waypoint", "apply", "-n", "shop"]
        argv += ["--enroll-namespace", "--wait", "--lab", self._story.client.address.name]
        done = await trio.run_process(
            argv, check=False, capture_stdout=True, stderr=subprocess.STDOUT
        )
        expect(done.returncode == 0, done.stdout.decode(errors="replace").strip())
        address = ip_of(await self._waypoint())
        await self.until_answer(
            "the waypoint",
            lambda each: each["status"] == 200 and json.loads(each["body"])["sees"] == address,
        )
        taken = trio.current_time() - started
        return f"up after {taken:.1f} s; the server is called by the waypoint, {address}"

    async def route_split(self) -> str:
        """Weights of an HTTPRoute."""
        async with self.route("split", {"backendRefs": [backend("v1", 80), backend("v2", 20)]}):
            counts = versions_of(await self.ask(count=200))
        expect(120 < counts["v1"] < 198, f"of 200 requests, weighed 80 to 20: {dict(counts)}")
        return f"weighed 80 to 20, of 200 requests v1 had {counts['v1']} and v2 {counts['v2']}"

    async def route_by_header(self) -> str:
        """A header decides; without it the other rule does."""
        beta = [{"headers": [{"name": "x-beta", "value": "yes"}]}]
        by_header = {"matches": beta, "backendRefs": [backend("v2")]}
        async with self.route("by-header", by_header, {"backendRefs": [backend("v1")]}):
            with_header = versions_of(await self.ask(count=20, x_beta="yes"))
            without = versions_of(await self.ask(count=20))
        expect(
            (dict(with_header), dict(without)) == ({"v2": 20}, {"v1": 20}),
            f"with the header {dict(with_header)}, without {dict(without)}",
        )
        return "20 requests with x-beta: yes all reach v2, 20 without it v1"

    async def retry_hides_failure(self) -> str:
        """What fails two times of three answers every time, once the route retries."""
        rule: dict[str, Any] = {"backendRefs": [backend("v1")]}
        async with self.route("plain", rule):
            before = [each["status"] for each in await self.ask("/flaky", count=6)]
        rule["retry"] = {"codes": [503], "attempts": 3, "backoff": "5ms"}
        async with self.route("retrying", rule):
            after = [each["status"] for each in await self.ask("/flaky", count=6)]
            record = await self.log_of_waypoint(lambda each: each.get("tries", 0) > 1)
        expect(before.count(503) == 4, f"without retries: {before}")
        expect(after == [200] * 6, f"with retries: {after}")
        return f"without retries 4 of 6 fail, with them none does ({record['tries']} tries for one)"

    async def l7_deny(self) -> str:
        """A policy by path and caller; the denial is explained in the access log."""
        rule = {
            "from": [{"source": {"notServiceAccounts": ["reader"]}}],
            "to": [{"operation": {"paths": ["/admin*"]}}],
        }
        text = policy("security.istio.io/v1", "AuthorizationPolicy", "admins-only",
                      action="DENY", rules=[rule])  # fmt: skip
        with self.written("72-policy.yaml", text):
            await self.until_answer(
                "policy", lambda each: each["status"] == 403, "/admin", pod="stranger"
            )
            statuses = [
                (await self.ask(path, pod=pod))[0]["status"]
                for pod, path in (("stranger", "/"), ("reader", "/admin"), ("reader", "/"))
            ]
            (twisted,) = await self.ask("/x/../%61dmin/users", pod="stranger")
            record = await self.log_of_waypoint(lambda each: each.get("status") == 403)
        expect(statuses == [200, 200, 200], f"others were not served: {statuses}")
        expect(twisted["status"] == 403, f"/x/../%61dmin/users: HTTP {twisted['status']}")
        expect(record.get("policy") == "shop/admins-only", f"the log names {record.get('policy')}")
        return (
            "the stranger gets 403 at /admin, however it is spelled, and 200 at /; the log names "
            f"{record['policy']}, rule {record['rule']}"
        )

    async def jwt(self) -> str:
        """Without a token, with a forged one, with a good one."""
        good, forged = ECKey.generate_key("P-256"), ECKey.generate_key("P-256")
        keys = json.dumps({"keys": [good.as_dict(private=False)]})
        ends = datetime.now(UTC) + timedelta(minutes=10)
        tokens = {
            name: jwt.encode(
                {"alg": "ES256"},
                {"iss": ISSUER, "sub": "alice", "exp": int(ends.timestamp())},
                key,
            )
            for name, key in (("good", good), ("forged", forged))
        }
        texts = (
            policy("security.istio.io/v1", "RequestAuthentication", "demo",
                   jwtRules=[{"issuer": ISSUER, "jwks": keys}]),
            policy("security.istio.io/v1", "AuthorizationPolicy", "token-holders",
                   action="ALLOW", rules=[{"from": [{"source": {"requestPrincipals": ["*"]}}]}]),
        )  # fmt: skip
        with self.written("72-policy.yaml", "---\n".join(texts)):
            await self.until_answer("policy", lambda each: each["status"] == 403)
            await self.until_answer(
                "token", lambda each: each["status"] == 200,
                authorization=f"Bearer {tokens['good']}",
            )  # fmt: skip
            (refused,) = await self.ask(authorization=f"Bearer {tokens['forged']}")
            expect(refused["status"] == 401, f"the forged token: HTTP {refused['status']}")
        await self.until_answer("policy removal", lambda each: each["status"] == 200)
        return "no token 403, one signed by somebody else 401, a good one 200"

    async def rate_limited(self) -> str:
        """Five for each client, then 429 and when to come back."""
        rule = {
            "name": "five-each",
            "limit": {"requests": 5, "window": "1h"},
            "key": [{"type": "Header", "name": "x-client"}],
        }
        text = policy("ambit.dev/v1alpha1", "RateLimitPolicy", "calm", rules=[rule])
        with self.written("73-limit.yaml", text):
            await self.until_answer(
                "limit",
                lambda each: "ratelimit" in headers_of(each),
                x_client="probe",
            )
            answers = await self.ask(count=8, x_client="alice")
            (other,) = await self.ask(x_client="bob")
        statuses = [each["status"] for each in answers]
        expect(statuses == [200] * 5 + [429] * 3, f"eight requests: {statuses}")
        expect(other["status"] == 200, f"another client: HTTP {other['status']}")
        wait = headers_of(answers[-1]).get("retry-after", "")
        expect(wait.isdigit(), f"429 without Retry-After: {answers[-1]}")
        return f"of eight requests three get 429, Retry-After: {wait}; another client is served"

    async def redacted_request(self) -> str:
        """The server never sees the address that the caller sent; nor does the access log."""
        text = redaction("Request", {"detector": "email", "action": {"type": "mask"}})
        with self.written("74-redaction.yaml", text):
            await self.until_answer("redaction", is_masked, "/of/bob@example.com")
            await self.ask("/of/eve@example.com?by=jo@example.com", x_from="max@example.com")
            record = await self.log_of_waypoint(
                lambda each: str(each.get("path", "")).startswith("/of/") and "redactions" in each
            )
            seen = await self.log_of_servers()
        expect("eve@" not in seen, "a server's log has the address")
        expect("@" not in json.dumps(record["path"]), f"the access log has {record['path']}")
        return f"/of/bob@example.com arrives as {record['path']}, and is logged so"

    async def redacted_response(self) -> str:
        """Card numbers leave with their last four digits only."""
        action = {"type": "mask", "keepLast": 4}
        text = redaction("Response", {"detector": "payment-card", "action": action})
        with self.written("74-redaction.yaml", text):
            await self.until_answer("redaction", lambda each: "4111 1111" not in each["body"])
            (answer,) = await self.ask()
        card = json.loads(answer["body"])["card"]
        expect(card.endswith("1111") and "4111" not in card, f"the card came as {card}")
        return f"4111 1111 1111 1111 arrives as {card}"

    async def trace_joined(self) -> str:
        """Spans of both node proxies, the waypoint and what the application saw are one tree."""
        with self.written("75-collector.yaml", COLLECTOR):
            found: list[Path] = []

            async def probe() -> str | None:
                # The first answers end connections whose spans belong to earlier requests.
                (answer,) = await self.ask("/last")
                seen = json.loads(answer["body"])["headers"].get("traceparent", "")
                path = await self._path_to(seen)
                names = [each.name for each in path]
                if len(path) < 4:
                    return f"{seen} is reached by {names or 'no span'}"
                found.append(path)
                return None

            await self._story.until("the tree", probe)
        path = found[-1]
        services = [each.service for each in path]
        expect(services == ["ztunnel", "waypoint", "waypoint", "ztunnel"], f"spans of {services}")
        return f"{' > '.join(f'{a.service}: {a.name}' for a in path)}; the server saw the third"

    async def _path_to(self, traceparent: str) -> Path:
        """The spans of a trace from its root to the children of the span that was passed on."""
        if traceparent.count("-") != 3:
            return []
        _, trace, parent, _ = traceparent.split("-")
        path: Path = []
        with trio.move_on_after(3):
            # A span is told when it is over, and a moment later.
            while len(path) < 4:
                await trio.sleep(0.1)
                log = await self._log_of_collector()
                lines = (line.partition(b" ") for line in log.splitlines())
                spans = (read_export(base64.b64decode(text), kind) for kind, _, text in lines)
                known = {
                    each.span_id: each for some in spans for each in some if each.trace_id == trace
                }
                path = [known[parent]] if parent in known else []
                while path and path[0].parent_id in known:
                    path.insert(0, known[path[0].parent_id])
                path += [each for each in known.values() if each.parent_id == parent]
        return path

    async def _log_of_collector(self) -> bytes:
        client = self._story.client
        return await in_thread(lambda: b"".join(client.logs(pod=("outside", "collector"))))

    @asynccontextmanager
    async def route(self, name: str, *rules: dict[str, Any]) -> AsyncIterator[None]:
        """An HTTPRoute for as long as a step lasts, once it is in force: it marks its answers."""
        added = {"set": [{"name": "x-route", "value": name}]}
        mark = {"type": "ResponseHeaderModifier", "responseHeaderModifier": added}
        marked = [{**each, "filters": [mark]} for each in rules]
        with self.written("71-route.yaml", ROUTE.format(rules=json.dumps(marked))):
            await self.until_answer("route", lambda each: headers_of(each).get("x-route") == name)
            yield


def headers_of(answer: Answer) -> dict[str, str]:
    """By names in lower case."""
    return {name.lower(): value for name, value in answer["headers"].items()}


def is_masked(answer: Answer) -> bool:
    """Whether the server saw no address."""
    return answer["status"] == 200 and "@" not in json.loads(answer["body"])["path"]


def versions_of(answers: list[Answer]) -> Counter[str]:
    """Who answered how often."""
    return Counter(
        json.loads(each["body"])["version"] if each["status"] == 200 else f"HTTP {each['status']}"
        for each in answers
    )


def policy(api: str, kind: str, name: str, **spec: object) -> str:
    """A policy of `prices`, as YAML."""
    fields = "\n  ".join(f"{key}: {json.dumps(value)}" for key, value in spec.items())
    return POLICY.format(api=api, kind=kind, name=name, spec=fields)


def redaction(direction: str, rule: Mapping[str, object]) -> str:
    """A RedactionPolicy of one rule."""
    return policy(
        "ambit.dev/v1alpha1", "RedactionPolicy", "hide", direction=direction, rules=[rule]
    )


def _step(tell: Callable[[L7Story], Awaitable[str]]) -> Callable[[Story], Awaitable[str]]:
    return lambda story: tell(L7Story(story))


L7_STEPS: tuple[tuple[str, Callable[[Story], Awaitable[str]]], ...] = (
    ("waypoint-apply", _step(L7Story.waypoint_apply)),
    ("route-split", _step(L7Story.route_split)),
    ("route-by-header", _step(L7Story.route_by_header)),
    ("retry-hides-failure", _step(L7Story.retry_hides_failure)),
    ("l7-deny", _step(L7Story.l7_deny)),
    ("jwt", _step(L7Story.jwt)),
    ("rate-limited", _step(L7Story.rate_limited)),
    ("redacted-request", _step(L7Story.redacted_request)),
    ("redacted-response", _step(L7Story.redacted_response)),
    ("trace-joined", _step(L7Story.trace_joined)),
)
