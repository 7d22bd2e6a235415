"""The text of the rules, pinned by golden files, and the properties that matter most.

To write the golden files anew: `AMBIT_WRITE_GOLDEN=1 pytest tests/unit/netconfig`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from netconfig import ruleset
from netconfig.ruleset import Capture

GOLDEN = Path(__file__).parents[2] / "golden"
PROBES = ("169.254.7.127", "10.244.1.1", "fd00:10:244:1::1")

VARIANTS = {
    "ruleset_default": ruleset.for_pod(Capture(exempt=PROBES)),
    "ruleset_no_dns": ruleset.for_pod(Capture(dns=False)),
    "ruleset_no_ipv6": ruleset.for_pod(Capture(ipv6=False, exempt=PROBES)),
    "ruleset_no_inbound": ruleset.for_pod(Capture(inbound=False)),
    "ruleset_drain": ruleset.draining(Capture(exempt=PROBES)),
    "ruleset_delete": ruleset.DELETE,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_golden(name: str) -> None:
    path = GOLDEN / f"{name}.nft"
    if os.environ.get("AMBIT_WRITE_GOLDEN"):
        path.write_text(VARIANTS[name])
    assert VARIANTS[name] == path.read_text()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_text_replaces_the_table_whole(name: str) -> None:
    lines = VARIANTS[name].splitlines()
    assert lines[:2] == ["table inet ambient", "delete table inet ambient"]


@pytest.mark.parametrize("name", VARIANTS)
def test_tcp_is_redirected_by_its_first_packet_only(name: str) -> None:
    redirects = [line for line in VARIANTS[name].splitlines() if "redirect" in line]
    assert all("== syn" in line for line in redirects if "udp" not in line)


def test_draining_is_the_same_without_the_redirects() -> None:
    capture = Capture(exempt=PROBES)
    kept = [line for line in ruleset.for_pod(capture).splitlines() if "redirect" not in line]
    assert ruleset.draining(capture).splitlines() == kept


@pytest.mark.parametrize("name", VARIANTS)
def test_interfaces_are_matched_by_name_never_by_index(name: str) -> None:
    assert " iif " not in VARIANTS[name]
    assert " oif " not in VARIANTS[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_looked_up_that_threads_must_not_look_up(name: str) -> None:
    assert "l4proto" not in VARIANTS[name]


def test_without_dns_nothing_mentions_its_ports() -> None:
    text = ruleset.for_pod(Capture(dns=False))
    assert "15053" not in text
    assert " 53 " not in text


def test_overlapping_exemptions_are_merged() -> None:
    text = ruleset.for_pod(
        Capture(exempt=("10.0.0.1", "10.0.0.1", "10.0.0.0/24", "fd00::1", "fd00::/64"))
    )
    assert "elements = { 10.0.0.0/24 }" in text
    assert "elements = { fd00::/64 }" in text


def test_an_exemption_that_is_no_address_is_refused() -> None:
    for bad in ("10.0.0.1; }", "web", "10.0.0.1/33"):
        with pytest.raises(ValueError, match="does not appear"):
            ruleset.for_pod(Capture(exempt=(bad,)))
