from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from mesh.errors import ConfigError
from mesh.runtime import config
from mesh.runtime.config import setting
from mesh.runtime.config_docs import render


@dataclass(frozen=True, slots=True)
class Example:
    """An example daemon."""

    xds_address: str = setting(env="XDS_ADDRESS", default="https://istiod:15012", doc="Where.")
    node_name: str = setting(env=("NODE_NAME", "OLD_NODE"), doc="This node.")
    port: int = setting(env="PORT", default=15000, doc="A port.")
    ttl_seconds: float = setting(env="SECRET_TTL", default=86400.0, doc="Lifetime.")
    ratio: float = setting(default=0.5, doc="A share.")
    dns_capture: bool = setting(env="DNS", default=True, doc="Capture | DNS.")
    run_dir: Path = setting(default=Path("/run"), doc="Directory.")
    audiences: tuple[str, ...] = setting(env="AUDIENCES", default=("istio-ca",), doc="Accepted.")
    ca: str | None = setting(env="CA", default=None, doc="Other CA.")
    log_format: str = setting(default="json", choices=("json", "plain"), doc="Form.")

    def __post_init__(self) -> None:
        if self.port > 65535:
            raise ConfigError("must be below 65536", field="port")


NODE = {"NODE_NAME": "node1"}


def fails(argv: list[str], environ: dict[str, str], file: str | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        config.load(Example, argv, environ, file)
    return caught.value


def test_defaults_with_only_what_is_required() -> None:
    assert config.load(Example, [], NODE) == Example(node_name="node1")


def test_flag_wins_over_environment_over_file_over_default(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("xds_address: from-file\nport: 3\nratio: 0.25\n")
    resolved = config.resolve(
        Example,
        ["--xds-address", "from-flag"],
        NODE | {"XDS_ADDRESS": "from-env", "PORT": "2"},
        str(path),
    )
    assert resolved.config == Example(
        xds_address="from-flag", node_name="node1", port=2, ratio=0.25
    )
    origins = {name: str(origin) for name, origin in resolved.origins.items()}
    assert origins["xds_address"] == "flag --xds-address"
    assert origins["port"] == "environment PORT"
    assert origins["ratio"] == f"file {path}:3: ratio"
    assert origins["run_dir"] == "default"


def test_first_variable_that_is_set_wins() -> None:
    assert config.load(Example, [], {"OLD_NODE": "b"}).node_name == "b"
    assert config.load(Example, [], {"OLD_NODE": "b", "NODE_NAME": "a"}).node_name == "a"


def test_required_setting_is_named_by_its_variable() -> None:
    error = fails([], {})
    assert str(error) == "NODE_NAME: is required but not set"
    assert error.hint == "set NODE_NAME: This node."


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("PORT", "http", "PORT: 'http' is not a whole number"),
        ("PORT", "", "PORT: is empty, expected integer"),
        ("PORT", "٣", "PORT: '٣' is not a whole number"),
        ("PORT", "70000", "PORT: must be below 65536"),
        ("SECRET_TTL", "1 day", "SECRET_TTL: '1 day' is not a duration"),
        ("SECRET_TTL", "-5", "SECRET_TTL: '-5' is not a duration"),
        ("DNS", "maybe", "DNS: 'maybe' is not a boolean (write true or false)"),
    ],
)
def test_error_names_the_variable(variable: str, value: str, message: str) -> None:
    assert str(fails([], NODE | {variable: value})).startswith(message)


@pytest.mark.parametrize("value", ["nan", "inf", "1e400", "0x10", ""])
def test_numbers_are_plain(value: str) -> None:
    assert str(fails([f"--ratio={value}"], NODE)).startswith("--ratio: ")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("24h", 86400.0), ("1m30s", 90.0), ("250ms", 0.25), ("30", 30.0), ("1.5h", 5400.0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert config.load(Example, [], NODE | {"SECRET_TTL": text}).ttl_seconds == seconds


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--dns-capture"], True),
        (["--no-dns-capture"], False),
        (["--dns-capture=off"], False),
        (["--dns-capture=TRUE"], True),
    ],
)
def test_boolean_flags(argv: list[str], expected: bool) -> None:
    assert config.load(Example, argv, NODE).dns_capture is expected


def test_lists_from_environment_and_repeated_flags() -> None:
    assert config.load(Example, [], NODE | {"AUDIENCES": "a, b,,"}).audiences == ("a", "b")
    argv = ["--audiences", "a", "--audiences=b,c"]
    assert config.load(Example, argv, NODE).audiences == ("a", "b", "c")


def test_empty_text_is_a_value_but_empty_optional_is_none() -> None:
    loaded = config.load(Example, [], NODE | {"XDS_ADDRESS": "", "CA": ""})
    assert loaded.xds_address == ""
    assert loaded.ca is None


def test_unknown_flag_is_refused_with_a_guess() -> None:
    error = fails(["--xds-adress=x"], NODE)
    assert str(error) == "unknown flag --xds-adress"
    assert error.hint == "did you mean --xds-address?"
    assert str(fails(["stray"], NODE)) == "unexpected argument stray"


def test_flag_twice_or_without_value_is_refused() -> None:
    assert str(fails(["--port=1", "--port=2"], NODE)) == "--port: is given twice"
    assert str(fails(["--port"], NODE)) == "--port: needs a value"


def test_choice_is_enforced() -> None:
    assert str(fails(["--log-format=xml"], NODE)) == (
        "--log-format: 'xml' is not one of json, plain"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prt: 1\n", "{path}:1: unknown setting prt"),
        ("port: 1\nport: 2\n", "{path}:2: port is given twice"),
        ("- port\n", "{path}:1: must be a mapping of settings"),
        ("\nport: [1]\n", "{path}:2: port is no list of scalars"),
        ("audiences: [[a]]\n", "{path}:1: audiences is no list of scalars"),
        ("port: {a: 1}\n", "{path}:1: port must be a scalar or a list"),
        ("port: x\n", "{path}:1: port: 'x' is not a whole number"),
        ("port: 'x\n", "{path}:2: found unexpected end of stream"),
    ],
)
def test_error_in_a_file_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert str(fails([], NODE, str(path))) == message.format(path=path)


def test_file_flag_lists_and_limits(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("audiences: [a, b]\nca: null\n")
    loaded = config.load(Example, [f"--config={path}"], NODE)
    assert loaded.audiences == ("a", "b")
    assert loaded.ca is None
    assert "No such file" in str(fails(["--config", str(tmp_path / "no")], NODE))
    path.write_bytes(b"#" * (config.MAX_FILE_BYTES + 1))
    assert "larger than" in str(fails(["--config", str(path)], NODE))
    path.write_bytes(b"port: \xff")
    assert "is not UTF-8" in str(fails(["--config", str(path)], NODE))


def test_print_config_shows_every_value_with_its_origin() -> None:
    with pytest.raises(config.Shown) as shown:
        config.load(Example, ["--print-config", "--port=7"], NODE)
    lines = [line.split("#") for line in str(shown.value).splitlines()]
    shown_values = {left.strip(): right.strip() for left, right in lines}
    assert shown_values["port = 7"] == "flag --port"
    assert shown_values["node_name = node1"] == "environment NODE_NAME"
    assert shown_values["ca = unset"] == "default"
    assert shown_values["dns_capture = true"] == "default"
    assert len(lines) == len(config.describe(Example))


def test_help_lists_every_flag() -> None:
    with pytest.raises(config.Shown) as shown:
        config.load(Example, ["--help"], {})
    for row in config.describe(Example):
        assert f"  {row.flag} {row.type}" in str(shown.value)


def test_field_without_setting_is_a_bug() -> None:
    @dataclass(frozen=True)
    class Bare:
        port: int = 1

    with pytest.raises(TypeError, match="not declared with setting"):
        config.load(Bare, [], {})


def test_reference_page_has_a_row_for_each_setting() -> None:
    page = render({"example": Example})
    assert "## example" in page
    assert (
        "| `node_name` | `--node-name` | `NODE_NAME`, `OLD_NODE` | text | *required* | This node. |"
    ) in page
    assert "| `ttl_seconds` | `--ttl-seconds` | `SECRET_TTL` | duration | `86400.0` |" in page
    assert "Capture \\| DNS." in page
    assert "`json` \\| `plain`" in page
