"""`ambit lab restart` and `kill`, and the page that is generated from all verbs."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from mesh.cli import lab, reference
from mesh.cli.main import ambit
from mesh.lab.control import LabClient, NotThere


class Daemons(LabClient):
    def __init__(self) -> None:
        super().__init__("x")
        self.asked: list[tuple[str, str]] = []

    def restart(self, daemon: str, *, timeout: float = 60.0) -> None:
        self.asked.append(("restart", daemon))

    def kill(self, daemon: str) -> None:
        if daemon != "istiod":
            raise NotThere(f"no daemon {daemon!r}", hint="daemons: istiod")
        self.asked.append(("kill", daemon))


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> tuple[Any, list[tuple[str, str]]]:
    client = Daemons()
    monkeypatch.setattr(lab, "lab_client", lambda name: client)
    return CliRunner().invoke(ambit, ["lab", *argv]), client.asked


def test_they_ask_the_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    done, asked = run(monkeypatch, "restart", "ztunnel@node1")
    assert (done.exit_code, done.stdout, asked) == (0, "", [("restart", "ztunnel@node1")])
    assert done.stderr == "ambit: ztunnel@node1 was restarted\n"
    done, asked = run(monkeypatch, "kill", "istiod")
    assert (done.exit_code, asked) == (0, [("kill", "istiod")])


def test_a_daemon_that_is_not_there_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    done, _ = run(monkeypatch, "kill", "envoy")
    assert done.exit_code == 3
    assert done.stderr == "ambit: no daemon 'envoy'\nambit: hint: daemons: istiod\n"


def test_page_of_a_small_command() -> None:
    @click.command(epilog="And so on.")
    @click.argument("what")
    @click.option("-n", "--number", type=int, default=3, show_default=True, help="How | many.")
    def small(what: str, number: int) -> None:
        """Do it.

        \b
        Examples:
          small one
          small two -n 4    twice as often
        """

    page = "".join(reference._sections(small, "small", None))
    assert page == (
        "\n## small\n\n    small [OPTIONS] WHAT\n\nDo it.\n\nAnd so on.\n\n"
        "| Option | Meaning |\n|---|---|\n"
        "| `-n, --number INTEGER` | How \\| many. [default: 3] |\n\n"
        "Examples:\n\n    small one\n    small two -n 4    twice as often\n"
    )


def test_page_names_every_verb_and_option() -> None:
    page = reference.render()
    for heading in ("ambit lab restart", "ambit workloads", "ambit check", "ambit lab up"):
        assert f"\n## {heading}\n" in page
    assert "`--replace DAEMON=PROGRAM`" in page
