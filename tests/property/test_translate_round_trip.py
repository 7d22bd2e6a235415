"""What is written is what is read back, for every field; and bytes that anyone may send."""

from __future__ import annotations

import contextlib
from dataclasses import fields

from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import ConfigError
from mesh.model.authorization import Authorization
from mesh.model.service import Service
from mesh.model.workload import Workload
from mesh.xds.translate import decode_address, decode_authorization, encode
from tests.support import models


@given(st.one_of(models.workloads, models.services))
def test_addresses_round_trip(resource: Workload | Service) -> None:
    data = encode(resource)
    assert decode_address(data) == resource
    assert encode(decode_address(data)) == data


@given(models.authorizations)
def test_policies_round_trip(policy: Authorization) -> None:
    data = encode(policy)
    assert decode_authorization(data) == policy
    assert encode(decode_authorization(data)) == data


@given(models.workloads)
def test_equal_workloads_have_equal_bytes(workload: Workload) -> None:
    """The order of a mapping is no part of the value, and so no part of the version."""
    values = {f.name: getattr(workload, f.name) for f in fields(Workload)}
    values["services"] = {
        key: dict(reversed(ports.items())) for key, ports in reversed(workload.services.items())
    }
    assert encode(Workload(**values)) == encode(workload)


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_read_or_refused(data: bytes, is_policy: bool) -> None:
    with contextlib.suppress(ConfigError):
        decode_authorization(data) if is_policy else decode_address(data)


@given(st.one_of(models.workloads, models.services), st.data())
def test_damaged_resources_are_read_or_refused(
    resource: Workload | Service, data: st.DataObject
) -> None:
    damaged = bytearray(encode(resource))
    for _ in range(data.draw(st.integers(1, 3))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(ConfigError):
        decode_address(bytes(damaged))
