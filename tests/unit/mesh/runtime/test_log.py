from __future__ import annotations

import io
import json
from collections.abc import Iterator

import pytest
import structlog

from mesh.runtime import log


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = structlog.get_config()
    yield
    structlog.configure(**before)
    log.set_level("info")


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_line_has_event_level_time_and_scope() -> None:
    stream = io.StringIO()
    log.configure(json=True, stream=stream)
    log.get("xds").info("resource_rejected", name="a/b")
    (line,) = lines(stream)
    assert line["event"] == "resource_rejected"
    assert line["level"] == "info"
    assert line["scope"] == "xds"
    assert line["name"] == "a/b"
    assert str(line["time"]).endswith("Z")


@pytest.mark.parametrize(
    "key",
    ["token", "auth_token", "key", "private_key", "Authorization", "headers.cookie", "key_pem"],
)
def test_secret_values_are_redacted_at_any_depth(key: str) -> None:
    stream = io.StringIO()
    log.configure(json=True, stream=stream)
    log.get("x").info("e", **{key: "hunter2"}, outer={"inner": {key: "hunter2"}})
    assert "hunter2" not in stream.getvalue()
    assert lines(stream)[0][key] == log.REDACTED


def test_redaction_leaves_the_callers_mapping_alone() -> None:
    log.configure(json=True, stream=io.StringIO())
    fields = {"token": "kept"}
    log.get("x").info("e", request=fields)
    assert fields == {"token": "kept"}


@pytest.mark.parametrize("key", ["keyboard", "monkey", "tokens_left", "policy", "public_key_id"])
def test_ordinary_keys_stay(key: str) -> None:
    stream = io.StringIO()
    log.configure(json=True, stream=stream)
    log.get("x").info("e", **{key: "shown"})
    assert lines(stream)[0][key] == "shown"


def test_level_by_scope_and_while_running() -> None:
    stream = io.StringIO()
    log.configure(json=True, level="warning,xds=debug", stream=stream)
    xds, dns = log.get("xds"), log.get("dns")
    xds.debug("one")
    dns.info("hidden")
    log.set_level("off")
    xds.error("hidden")
    log.set_level("info")
    dns.info("two")
    assert [line["event"] for line in lines(stream)] == ["one", "two"]


def test_level_text_reads_back() -> None:
    log.set_level("debug,xds=error,a.b=off")
    text = log.level_text()
    log.set_level("info")
    log.set_level(text)
    assert log.level_text() == text == "debug,a.b=off,xds=error"


@pytest.mark.parametrize("text", ["loud", "xds=loud", "=info"])
def test_bad_level_changes_nothing(text: str) -> None:
    log.set_level("error")
    with pytest.raises(ValueError, match="no log level"):
        log.set_level(text)
    assert log.level_text() == "error"


def test_exception_is_one_json_line() -> None:
    stream = io.StringIO()
    log.configure(json=True, stream=stream)
    try:
        raise ValueError("boom")
    except ValueError as exc:
        log.get("x").error("bug", exc_info=exc)
    (line,) = lines(stream)
    assert "ValueError: boom" in str(line["exception"])


def test_plain_text_for_people() -> None:
    stream = io.StringIO()
    log.configure(json=False, stream=stream)
    log.get("x").info("started", port=15008)
    assert "started" in stream.getvalue()
    assert "port=15008" in stream.getvalue()
    assert not stream.getvalue().startswith("{")


def test_reader_that_went_away_does_no_harm() -> None:
    class Gone(io.StringIO):
        def write(self, _text: str) -> int:
            raise BrokenPipeError

    log.configure(json=True, stream=Gone())
    log.get("x").info("nobody_reads_this")


def test_the_level_goes_back_to_what_was_configured() -> None:
    log.configure(json=True, level="warning,xds=debug", stream=io.StringIO())
    log.set_level("trace")
    log.reset_level()
    assert log.level_text() == "warn,xds=debug"
    log.set_level("info")
