"""RequestAuthentication with real keys and a real key server: what counts, and what is refused."""

from __future__ import annotations

import base64
import contextlib
import functools
import gzip
import http.server
import json
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import trio
from joserfc import jws
from joserfc.jwk import ECKey, KeySet, OctKey, RSAKey
from joserfc.jws import JWSRegistry

from mesh.errors import ConfigError, Unavailable
from mesh.model.l7_policy import JwtRule, RequestAuthentication, TokenPlace
from waypoint.filters import jwks
from waypoint.filters.chain import Headers, Request, Respond, Wait
from waypoint.filters.jwt import Jwt

ISSUER = "https://issuer.example"
EC, OTHER = (ECKey.generate_key("P-256", {"kid": kid}) for kid in ("one", "two"))
RSA = RSAKey.generate_key(2048, {"kid": "three"})


def public(*keys: Any) -> str:
    return json.dumps(KeySet(list(keys)).as_dict(private=False))


def token(key: Any = EC, algorithm: str = "ES256", header: Any = None, **claims: Any) -> str:
    told = {"iss": ISSUER, "sub": "me", "exp": int(time.time()) + 10**6, **claims}
    told = {name: value for name, value in told.items() if value is not None}
    head = {"alg": algorithm, "kid": key.kid, **(header or {})}
    return jws.serialize_compact(head, json.dumps(told).encode(), key, algorithms=[algorithm])


def request(text: str | None = None, **fields: Any) -> Request:
    pairs = [(b"authorization", b"Bearer " + text.encode())] if text is not None else []
    given: dict[str, Any] = {"headers": Headers(pairs), **fields}
    return Request(method=b"GET", scheme=b"http", authority=b"api", path=b"/", **given)


def filter_for(*rules: JwtRule, fetch: Any = jwks.fetch) -> Jwt:
    policy = RequestAuthentication("shop", "tokens", rules)
    return Jwt([policy], jwks.sources(fetch), time.time)


RULE = JwtRule(ISSUER, jwks=public(EC, RSA))


def refused(made: Jwt, asked: Request) -> str:
    answer = made.on_request(asked)
    assert isinstance(answer, Respond)
    assert (answer.status, answer.grpc_status, answer.policy) == (401, 16, "shop/tokens")
    return answer.body.decode()


def test_a_good_token_tells_who_it_is_and_does_not_go_on() -> None:
    asked = request(token(scope="read write", groups=["ops"]))
    assert filter_for(RULE).on_request(asked) is None
    assert asked.principal == f"{ISSUER}/me"
    assert asked.claims is not None
    assert (asked.claims["scope"], asked.claims["groups"]) == (["read", "write"], ["ops"])
    assert asked.headers.get(b"authorization") is None
    assert filter_for(RULE).on_request(request(token(RSA, "RS256"))) is None


def test_without_a_token_there_are_no_claims_and_no_forged_headers() -> None:
    rule = JwtRule(
        ISSUER, jwks=public(EC), claim_headers=(("X-User", "sub"),), payload_header="X-P"
    )
    forged = [(b"x-user", b"root"), (b"x-p", b"e30")]
    asked = request(headers=Headers(list(forged)))
    assert filter_for(rule).on_request(asked) is None
    assert (asked.claims, asked.headers.pairs) == (None, [])
    asked = request(headers=Headers([*forged, (b"authorization", b"Bearer " + token().encode())]))
    assert filter_for(rule).on_request(asked) is None
    assert asked.headers.get_all(b"x-user") == [b"me"]
    payload = asked.headers.get(b"x-p") or b""
    assert json.loads(base64.urlsafe_b64decode(payload + b"==="))["sub"] == "me"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense", "Header.Payload.Signature"),
        ("a.b.c", "base64url"),
        (token(exp=int(time.time()) - 120), "Jwt is expired"),
        (token(nbf=int(time.time()) + 10**5), "Jwt not yet valid"),
        (token(exp="soon"), "is no number"),
        (token(iss="https://evil.example"), "Jwt issuer is not configured"),
        (token(OTHER), "doesn't have key to match"),
        (token(OTHER, header={"kid": "one"}), "Jwt verification fails"),
        (token(EC, header={"kid": "two"}), "doesn't have key to match"),
        (token()[:-4] + "AAAA", "Jwt verification fails"),
        (token(x="y" * 17_000), "Header.Payload.Signature"),
    ],
)
def test_bad_tokens(text: str, said: str) -> None:
    assert said in refused(filter_for(RULE), request(text))


def test_algorithms_that_prove_nothing() -> None:
    def unsigned(part: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")

    claims = unsigned({"iss": ISSUER, "sub": "me"})
    none = f"{unsigned({'alg': 'none'})}.{claims}."
    assert "alg" in refused(filter_for(RULE), request(none))
    secret = OctKey.import_key(public(EC))
    told = json.dumps({"iss": ISSUER}).encode()
    confused = jws.serialize_compact({"alg": "HS256"}, told, secret, algorithms=["HS256"])
    assert "alg" in refused(filter_for(RULE), request(confused))


def test_audiences_and_places() -> None:
    rule = JwtRule(
        ISSUER,
        audiences=("shop",),
        jwks=public(EC),
        places=(TokenPlace("cookie", "session"), TokenPlace("param", "t")),
    )
    made = filter_for(rule)
    good = token(aud=["x", "shop"])
    asked = request(query=f"a=1&t={good}&b=2".encode())
    assert made.on_request(asked) is None
    assert asked.query == b"a=1&b=2"
    asked = request(headers=Headers([(b"cookie", f"a=1; session={good}; b=2".encode())]))
    assert made.on_request(asked) is None
    assert asked.headers.get(b"cookie") == b"a=1; b=2"
    assert asked.principal
    wrong = request(query=f"t={token(aud='other')}".encode())
    assert refused(made, wrong) == "Audiences in Jwt are not allowed"
    ignored = request(token())  # not a place of this rule
    assert made.on_request(ignored) is None
    assert ignored.claims is None


def test_two_different_tokens_are_a_riddle() -> None:
    asked = request(token(), query=b"access_token=" + token(sub="you").encode())
    assert "several" in refused(filter_for(RULE), asked)


def test_keys_that_cannot_be_read_accept_nothing() -> None:
    broken = filter_for(JwtRule(ISSUER, jwks='{"keys": [{"kty": "EC"}]}'))
    answer = broken.on_request(request(token()))
    assert isinstance(answer, Wait)
    ended = trio.run(answer.ask)
    assert ended is not None
    assert (ended.status, ended.body) == (401, b"Jwks remote fetch is failed")


class Issuer:
    """A key server on the loopback, which counts."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.keys = public(EC)
        self.is_up = True

    def serve(self) -> Iterator[str]:
        issuer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.asked.append(self.path)
                body = issuer.keys.encode()
                if self.path.endswith("openid-configuration"):
                    base = f"http://127.0.0.1:{server.server_port}"
                    body = json.dumps({"issuer": base, "jwks_uri": f"{base}/keys"}).encode()
                self.send_response(200 if issuer.is_up else 503)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=functools.partial(server.serve_forever, 0.01))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


@pytest.fixture
def issuer() -> Issuer:
    return Issuer()


@pytest.fixture
def address(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    async def anything(uri: str) -> tuple[str, int | None, list[str]]:
        parts = urlsplit(uri)
        return parts.hostname or "", parts.port, ["127.0.0.1"]

    monkeypatch.setattr(jwks, "check_address", anything)
    yield from issuer.serve()


async def accepted(made: Jwt, text: str) -> Respond | None:
    answer = made.on_request(request(text))
    return await answer.ask() if isinstance(answer, Wait) else answer


async def test_keys_are_fetched_once_for_everybody(issuer: Issuer, address: str) -> None:
    made = filter_for(JwtRule(ISSUER, jwks_uri=f"{address}/keys"))
    answers: list[Respond | None] = []

    async def one() -> None:
        answers.append(await accepted(made, token()))

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(one)
    assert answers == [None] * 20
    assert issuer.asked == ["/keys"]
    assert made.on_request(request(token())) is None


async def test_discovery(issuer: Issuer, address: str) -> None:
    made = filter_for(JwtRule(address))
    assert await accepted(made, token(iss=address)) is None
    assert issuer.asked == ["/.well-known/openid-configuration", "/keys"]


async def test_an_issuer_that_is_gone_accepts_nobody(issuer: Issuer, address: str) -> None:
    issuer.is_up = False
    made = filter_for(JwtRule(ISSUER, jwks_uri=f"{address}/keys"))
    answer = await accepted(made, token())
    assert answer is not None
    assert answer.body == b"Jwks remote fetch is failed"


async def test_new_keys_are_found_and_made_up_names_do_not_flood(autojump_clock: Any) -> None:
    asked, keys = [], [public(EC)]

    async def fetch(uri: str) -> bytes:
        asked.append(uri)
        return keys[0].encode()

    made = filter_for(JwtRule(ISSUER, jwks_uri="https://x/keys"), fetch=fetch)
    assert await accepted(made, token()) is None
    keys[0] = public(EC, OTHER)
    assert await accepted(made, token(OTHER)) is not None  # too soon to look again
    await trio.sleep(11)
    assert await accepted(made, token(OTHER)) is None
    for number in range(50):
        assert await accepted(made, token(header={"kid": f"made-up-{number}"})) is not None
    assert len(asked) == 2


async def test_known_keys_outlive_a_failing_issuer_for_a_day(autojump_clock: Any) -> None:
    is_up = [True]

    async def fetch(uri: str) -> bytes:
        if not is_up[0]:
            raise Unavailable(uri)
        return public(EC).encode()

    lasting = token()
    made = filter_for(JwtRule(ISSUER, jwks_uri="https://x/keys"), fetch=fetch)
    assert await accepted(made, lasting) is None
    is_up[0] = False
    await trio.sleep(3600)
    assert await accepted(made, lasting) is None
    await trio.sleep(25 * 3600)
    assert await accepted(made, lasting) is not None


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1/keys",
        "http://[::1]/keys",
        "http://[::ffff:127.0.0.1]/keys",
        "http://169.254.169.254/latest/meta-data",
        "http://0.0.0.0/",
        "http://224.0.0.1/",
        "file:///etc/passwd",
        "gopher://10.0.0.1/",
        "http:///keys",
        "http://[::ffff:169.254.169.254]/",
        "http://[64:ff9b::a9fe:a9fe]/",
        "http://[2002:a9fe:a9fe::1]/",
        "http://[::169.254.169.254]/",
        "http://[fe80::1]/",
        "http://[fe80::1%25lo]/",
        "http://[fd00:ec2::254]/latest",
        "http://100.100.100.200/",
        "http://168.63.129.16/",
        "http://192.0.0.192/",
        "http://2852039166/",
        "http://0xa9fea9fe/",
        "http://0251.0376.0251.0376/",
        "http://169.254.43518/",
        "http://localhost/",
        "http://10.0.0.1@169.254.169.254/",
        "http://169.254.169.254@10.0.0.1/",
        "http://[::]/",
        "http://0.1.2.3/",
        "http://255.255.255.255/",
    ],
)
async def test_addresses_that_policies_may_not_name(uri: str) -> None:
    with pytest.raises(ConfigError):
        await jwks.check_address(uri)


async def test_a_name_that_leads_to_forbidden_addresses_among_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = [["10.0.0.1", "169.254.169.254"], ["10.0.0.1"]]
    asked: list[str] = []

    class Names(trio.abc.HostnameResolver):
        async def getaddrinfo(self, host: Any, port: Any, *_: Any) -> Any:
            asked.append(host)
            found = answers.pop(0)
            return [(2, 1, 6, "", (each, port)) for each in found]

        async def getnameinfo(self, *_: Any) -> Any:
            raise NotImplementedError

    before = trio.socket.set_custom_hostname_resolver(Names())
    try:
        with pytest.raises(ConfigError, match="169"):
            await jwks.check_address("http://issuer.example/keys")
        found = await jwks.check_address("http://issuer.example:81/keys")
    finally:
        trio.socket.set_custom_hostname_resolver(before)
    assert found == ("issuer.example", 81, ["10.0.0.1"])


async def test_the_address_that_was_judged_is_the_one_that_is_asked(
    issuer: Issuer, address: str
) -> None:
    """The name does not resolve at all: it is not looked up a second time."""
    port = urlsplit(address).port
    body = await jwks.fetch(f"http://keys.invalid:{port}/keys")
    assert body == issuer.keys.encode()


ANSWERS = {
    "a redirect": (302, [("location", "http://169.254.169.254/")], b""),
    "too much": (200, [], b"x" * (jwks.MAX_JWKS_BYTES + 1)),
    "an encoding": (200, [("content-encoding", "gzip")], gzip.compress(b"x" * 10_000_000)),
    "an error": (500, [], b"{}"),
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_what_key_servers_may_not_answer(address: str, name: str) -> None:
    del address  # addresses are not judged
    status, headers, body = ANSWERS[name]
    head = [f"HTTP/1.1 {status} x", f"content-length: {len(body)}"]
    head += [f"{key}: {value}" for key, value in headers]

    async def answer(stream: trio.SocketStream) -> None:
        await stream.receive_some(65536)
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all("\r\n".join([*head, "", ""]).encode() + body)
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, answer, listeners)
        port = listeners[0].socket.getsockname()[1]
        with pytest.raises(Unavailable):
            await jwks.fetch(f"http://127.0.0.1:{port}/keys")
        nursery.cancel_scope.cancel()


async def test_a_key_server_that_never_answers_costs_its_time_only(autojump_clock: Any) -> None:
    async def fetch(uri: str) -> bytes:
        await trio.sleep_forever()
        raise Unavailable(uri)

    made = filter_for(JwtRule(ISSUER, jwks_uri="https://x/", timeout_seconds=5), fetch=fetch)
    began = trio.current_time()
    answers: list[Respond | None] = []

    async def one() -> None:
        answers.append(await accepted(made, token()))

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(one)
    assert [each.status for each in answers if each is not None] == [401] * 20
    assert trio.current_time() - began == pytest.approx(5)


def signed(header: str, claims: str) -> str:
    """A token whose parts are these very texts, signed by the issuer."""
    sides = (header.encode(), claims.encode())
    parts = [base64.urlsafe_b64encode(each).decode().rstrip("=") for each in sides]
    made = JWSRegistry.algorithms["ES256"].sign(".".join(parts).encode(), EC)
    return ".".join([*parts, base64.urlsafe_b64encode(made).decode().rstrip("=")])


HEADER = '{"alg": "ES256", "kid": "one"}'
CLAIMS = f'"iss": "{ISSUER}", "sub": "me"'


def test_our_own_signature_is_good() -> None:
    assert filter_for(RULE).on_request(request(signed(HEADER, "{" + CLAIMS + "}"))) is None


@pytest.mark.parametrize(
    ("header", "claims"),
    [
        (HEADER, f'{{{CLAIMS}, "sub": "root"}}'),
        (HEADER, f'{{{CLAIMS}, "exp": NaN}}'),
        (HEADER, f'{{{CLAIMS}, "exp": Infinity}}'),
        (HEADER, f'{{{CLAIMS}, "exp": 1e400}}'),
        (HEADER, f'{{{CLAIMS}, "exp": {10**400}}}'),
        (HEADER, f'{{{CLAIMS}, "nbf": -{10**400}}}'),
        (HEADER, f'{{{CLAIMS}, "exp": {"9" * 5000}}}'),
        (HEADER, f'{{{CLAIMS}, "exp": true}}'),
        (HEADER, f'{{{CLAIMS}, "x": {"[" * 6000}{"]" * 6000}}}'),
        (HEADER, f"[{{{CLAIMS}}}]"),
        ('{"alg": "none", "kid": "one"}', f"{{{CLAIMS}}}"),
        ('{"alg": "none", "alg": "ES256", "kid": "one"}', f"{{{CLAIMS}}}"),
        ('{"alg": ["ES256"], "kid": "one"}', f"{{{CLAIMS}}}"),
        ('{"alg": "ES256", "kid": "one", "crit": ["b64"], "b64": false}', f"{{{CLAIMS}}}"),
        ('{"alg": "ES256", "kid": "/dev/null"}', f"{{{CLAIMS}}}"),
        ('{"alg": "ES256", "kid": "one\' or 1=1"}', f"{{{CLAIMS}}}"),
    ],
)
def test_tokens_that_are_signed_and_yet_read_in_two_ways(header: str, claims: str) -> None:
    refused(filter_for(RULE), request(signed(header, claims)))


@pytest.mark.parametrize("kid", ["{}", "[1]", "7", "null"])
def test_a_key_name_of_another_type_names_no_key(kid: str) -> None:
    """As if there were none: every key of the issuer is tried, and only those."""
    made = filter_for(JwtRule(ISSUER, jwks=public(OTHER)))
    refused(made, request(signed(f'{{"alg": "ES256", "kid": {kid}}}', f"{{{CLAIMS}}}")))


def test_keys_in_the_token_itself_do_not_count() -> None:
    own = json.loads(public(OTHER))["keys"][0]
    for header in ({"jwk": own}, {"jku": "https://evil.example"}, {"x5c": ["AAAA"]}):
        refused(filter_for(RULE), request(token(OTHER, header={**header, "kid": "one"})))


def test_a_set_of_very_many_keys_is_not_taken() -> None:
    key = json.loads(public(EC))["keys"][0]
    many = json.dumps({"keys": [{**key, "kid": str(number)} for number in range(10_000)]})
    answer = filter_for(JwtRule(ISSUER, jwks=many)).on_request(request(token()))
    assert isinstance(answer, Wait)


def test_other_parameters_go_on_byte_for_byte() -> None:
    rest = b"a=%ff+%2B&&b&c=%E4;d=1&e=a%20b"
    asked = request(query=rest + b"&access%5Ftoken=" + token().encode())
    assert filter_for(RULE).on_request(asked) is None
    assert asked.principal
    assert asked.query == rest


def test_the_same_token_twice_is_one_and_none_is_left_for_the_endpoint() -> None:
    text = token()
    asked = request(text, query=b"access_token=" + text.encode())
    assert filter_for(RULE).on_request(asked) is None
    assert asked.headers.get(b"authorization") is None
    assert asked.query == b""
