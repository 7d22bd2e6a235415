"""The last-known-good state as bytes: what goes in comes out, and nothing else is believed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from istiod_lite import saved_state
from istiod_lite.saved_state import SavedState, TokenKeys, decode, encode
from istiod_lite.snapshot import build, diff
from mesh.cluster.api import Ref
from mesh.cluster.objects import Pod
from mesh.errors import ConfigError
from mesh.model.authorization import Action, Authorization, PolicyScope
from mesh.model.l7_policy import TrafficConfig
from mesh.model.service import Service
from mesh.model.workload import NetworkAddress, Workload

NOW = 1_900_000_000.0
WORKLOAD = Workload(uid="c//Pod/demo/a", name="a", namespace="demo", addresses=("10.0.0.1",))
SERVICE = Service(
    name="web", namespace="demo", hostname="web.demo", addresses=(NetworkAddress("", "10.96.0.1"),)
)
POLICY = Authorization("p", "demo", PolicyScope.NAMESPACE, Action.DENY, ())
TRAFFIC = TrafficConfig("demo/waypoint", "demo/web.demo")
SNAPSHOT = build(
    {WORKLOAD.uid: WORKLOAD, str(SERVICE.key): SERVICE},
    {"demo/p": POLICY},
    None,
    {TRAFFIC.key: TRAFFIC},
)
POD = Pod(ref=Ref("Pod", "demo", "a"), uid="u", service_account="web", node="n1", phase="Running")
STATE = SavedState("c", "td", NOW, SNAPSHOT, (POD,), TokenKeys("https://issuer", b'{"keys":[]}'))


def read(content: bytes, now: float = NOW, age: float = 60.0, domain: str = "td") -> SavedState:
    return decode(content, cluster_id="c", trust_domain=domain, now=now, max_age_seconds=age)


def test_what_goes_in_comes_out_with_the_same_versions() -> None:
    found = read(encode(STATE))
    assert replace(found, snapshot=SNAPSHOT) == STATE
    assert found.snapshot == SNAPSHOT
    assert diff(SNAPSHOT, found.snapshot) == {}
    # Only the models are compared by ==; the bytes that go on the wire must be the same too.
    for type_url, entries in SNAPSHOT.resources.items():
        for name, entry in entries.items():
            assert found.snapshot.of(type_url)[name].message == entry.message
    # What comes of the source afterwards is shared where it is the same.
    again = build({WORKLOAD.uid: WORKLOAD}, {}, found.snapshot)
    type_url = next(iter(SNAPSHOT.resources))
    assert again.of(type_url)[WORKLOAD.uid] is found.snapshot.of(type_url)[WORKLOAD.uid]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: b"", "no last-known-good"),
        (lambda content: b"\x00" * 400, "no last-known-good"),
        (lambda content: content.replace(b"good 1 ", b"good 0 ", 1), "schema 0, understood is 1"),
        (lambda content: content[:-1], "damaged"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "damaged"),
        (lambda content: content + b"x", "damaged"),
        (lambda content: content + b"\0" * saved_state.MAX_BYTES, "larger"),
    ],
)
def test_anything_else_is_refused(change, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        read(change(encode(STATE)))


def test_another_mesh_and_another_time() -> None:
    content = encode(STATE)
    with pytest.raises(ConfigError, match="not of this mesh"):
        read(content, domain="other")
    assert read(content, now=NOW + 59)
    with pytest.raises(ConfigError, match="61 s old, accepted are 60 s"):
        read(content, now=NOW + 61)


def sealed(payload: bytes) -> bytes:
    return saved_state._header(saved_state.SCHEMA, payload) + payload


def test_a_good_digest_alone_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    import msgspec
    import zstandard

    compress = zstandard.ZstdCompressor().compress
    with pytest.raises(ConfigError, match="damaged"):
        read(sealed(b"no frame"))
    with pytest.raises(ConfigError, match="damaged"):
        read(sealed(compress(msgspec.msgpack.encode({"cluster_id": 7}))))
    odd = {
        "cluster_id": "c", "trust_domain": "td", "saved_at": NOW, "pods": [], "issuer": "",
        "jwks": b"", "resources": {"no.such/Type": {"a": b""}},
    }  # fmt: skip
    with pytest.raises(ConfigError, match="unknown type"):
        read(sealed(compress(msgspec.msgpack.encode(odd))))
    monkeypatch.setattr(saved_state, "MAX_UNPACKED_BYTES", 10)
    with pytest.raises(ConfigError, match="too much"):
        read(encode(STATE))
    monkeypatch.setattr(saved_state, "MAX_BYTES", 10)
    with pytest.raises(ConfigError, match="more than"):
        encode(STATE)
