"""Conditions of rate limits and redactions: every set field must hold."""

from __future__ import annotations

from typing import Any

import pytest

from mesh.identity import SpiffeId
from mesh.model.l7_policy import RequestCondition
from waypoint.filters.chain import Headers, Request
from waypoint.filters.condition import compile_condition

REQUEST = Request(
    method=b"POST",
    scheme=b"http",
    authority=b"Api.shop:8080",
    path=b"/v1/orders",
    headers=Headers([(b"x-team", b"red"), (b"x-team", b"blue")]),
    source=SpiffeId("cluster.local", "shop", "web"),
    route="shop/orders",
    rule="create",
)


@pytest.mark.parametrize(
    ("fields", "holds"),
    [
        ({}, True),
        ({"methods": ("POST",)}, True),
        ({"methods": ("GET",)}, False),
        ({"paths": ("/v1/*",)}, True),
        ({"paths": ("/{*}/orders",)}, True),
        ({"hosts": ("api.shop",)}, True),
        ({"hosts": ("api.shop:8080",)}, True),
        ({"hosts": ("other",)}, False),
        ({"headers": (("X-Team", "blue"),)}, True),
        ({"headers": (("X-Team", "*"),)}, True),
        ({"headers": (("X-Team", "green"),)}, False),
        ({"principals": ("*/sa/web",)}, True),
        ({"not_principals": ("*/sa/web",)}, False),
        ({"namespaces": ("shop",)}, True),
        ({"route_rules": ("shop/orders",)}, True),
        ({"route_rules": ("shop/orders/create",)}, True),
        ({"route_rules": ("shop/orders/delete",)}, False),
        ({"methods": ("POST",), "namespaces": ("other",)}, False),
    ],
)
def test_conditions(fields: dict[str, Any], holds: bool) -> None:
    assert compile_condition(RequestCondition(**fields))(REQUEST) is holds
