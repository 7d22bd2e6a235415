"""Settings of a daemon: one frozen dataclass, filled by flag > environment > file > default.

A field is declared with `setting(env=..., default=..., doc=...)`; its unit is in its name
(`drain_seconds`). `resolve` reads plain mappings, never `os.environ`, and remembers where
every value came from, so that an error says `XDS_ADDRESS: ...` and `--print-config` can show
it. Unknown flags and unknown keys of a file are refused; unknown variables cannot be.

A file is YAML (so also JSON): one flat mapping from field names to scalars or lists.
Numbers whose name ends in `_seconds` also take `90s`, `1m30s`, `24h`.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from mesh.errors import ConfigError

T = TypeVar("T")

_KEY = "mesh.setting"
MAX_FILE_BYTES = 1 << 20
_TRUE = frozenset({"1", "t", "true", "y", "yes", "on"})
_FALSE = frozenset({"0", "f", "false", "n", "no", "off"})
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ns|us|µs|ms|s|m|h)")


class Shown(Exception):
    """Not an error: `--help` or `--print-config` asked for this text instead of a start."""


@dataclass(frozen=True, slots=True)
class _Setting:
    env: tuple[str, ...]
    flag: str | None
    doc: str
    choices: tuple[str, ...]
    is_secret: bool


@dataclass(frozen=True, slots=True)
class SettingDoc:
    """One row of the reference table; `default` is text, empty when `required`."""

    name: str
    flag: str
    env: tuple[str, ...]
    type: str
    default: str
    required: bool
    doc: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from: `kind` is `flag`, `environment`, `file` or `default`."""

    kind: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" if self.name else self.kind


@dataclass(frozen=True, slots=True)
class Resolved(Generic[T]):
    """A filled configuration and the origin of each of its fields, by name."""

    config: T
    origins: Mapping[str, Origin]

    def describe(self) -> str:
        """What `--print-config` prints: `name = value  # origin`, one field a line."""
        values = shown(self.config)
        lines = [
            (f"{name} = {_show(values[name])}", str(origin))
            for name, origin in self.origins.items()
        ]
        width = max((len(text) for text, _ in lines), default=0)
        return "\n".join(f"{text:<{width}}  # {origin}" for text, origin in lines)


def setting(
    *,
    env: str | tuple[str, ...] = (),
    default: Any = dataclasses.MISSING,
    doc: str,
    flag: str | None = None,
    choices: Sequence[str] = (),
    is_secret: bool = False,
) -> Any:
    """A field of a daemon's configuration; without `default` it is required.

    `env` names one variable or several, of which the first that is set wins. `flag` is the
    name without dashes, by default the field's name in kebab case. What `is_secret` is never
    printed.
    """
    names = (env,) if isinstance(env, str) else tuple(env)
    metadata = {_KEY: _Setting(names, flag, doc, tuple(choices), is_secret)}
    return dataclasses.field(default=default, metadata=metadata, kw_only=True)


def load(
    cls: type[T], argv: Sequence[str], environ: Mapping[str, str], file: str | None = None
) -> T:
    """The filled configuration. `argv` has no program name.

    Raises ConfigError naming the origin of what is wrong, and Shown for `--help` and
    `--print-config`.
    """
    return resolve(cls, argv, environ, file).config


def resolve(
    cls: type[T], argv: Sequence[str], environ: Mapping[str, str], file: str | None = None
) -> Resolved[T]:
    """Like `load`, with the origin of every value. `--config FILE` overrides `file`."""
    fields = _fields(cls)
    flags, file, wants_print = _read_flags(cls, argv, file)
    in_file = _read_file(file, fields) if file else {}
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for name, one in fields.items():
        found = _find(name, one.setting, flags, environ, in_file)
        if found is None:
            if one.default is dataclasses.MISSING:
                raise _missing(name, one.setting)
            values[name], origins[name] = one.default, Origin("default")
            continue
        raw, origin = found
        try:
            values[name] = _parse(raw, one.type, name, one.setting.choices)
        except ValueError as exc:
            raise ConfigError(str(exc), field=origin.name) from None
        origins[name] = origin
    config = _build(cls, values, origins)
    resolved = Resolved(config, origins)
    if wants_print:
        raise Shown(resolved.describe())
    return resolved


def describe(cls: type[Any]) -> list[SettingDoc]:
    """One row per field, in the order of the class: for `--help` and the reference page."""
    return [
        SettingDoc(
            name=name,
            flag=_flag(name, one.setting),
            env=one.setting.env,
            type=_type_name(one.type, name),
            default="" if one.default is dataclasses.MISSING else _show(one.default),
            required=one.default is dataclasses.MISSING,
            doc=one.setting.doc,
            choices=one.setting.choices,
        )
        for name, one in _fields(cls).items()
    ]


def shown(config: Any) -> dict[str, Any]:
    """The values by name, in place of secrets that they are set."""
    return {
        name: "[set]" if one.setting.is_secret and getattr(config, name) else getattr(config, name)
        for name, one in _fields(type(config)).items()
    }


def has_settings(cls: type[Any]) -> bool:
    """Whether `cls` is a configuration: a dataclass with a field made by `setting`."""
    return dataclasses.is_dataclass(cls) and any(
        _KEY in field.metadata for field in dataclasses.fields(cls)
    )


def usage(cls: type[Any]) -> str:
    """The text of `--help`."""
    head = (cls.__doc__ or cls.__name__).strip()
    lines = [head, "", "Settings: flag > environment > file (--config FILE) > default.", ""]
    for row in describe(cls):
        default = "required" if row.required else f"default {row.default}"
        lines.append(f"  {row.flag} {row.type}  ({', '.join((*row.env, default))})")
        lines.append(f"      {row.doc}")
    lines += ["", "  --print-config  show every value with its origin, and exit"]
    return "\n".join(lines)


def parse_duration(text: str) -> float:
    """Seconds of `24h`, `1m30s`, `250ms` or a bare number of seconds. Raises ValueError."""
    bare = text.strip()
    if re.fullmatch(r"[0-9]+(?:\.[0-9]+)?", bare):
        return float(bare)
    if not re.fullmatch(rf"(?:{_DURATION_PART.pattern})+", bare):
        raise ValueError(f"{text!r} is not a duration (write 90s, 1m30s or 24h)")
    return sum(float(number) * _UNITS[unit] for number, unit in _DURATION_PART.findall(bare))


@dataclass(frozen=True, slots=True)
class _Field:
    type: Any
    default: Any
    setting: _Setting


def _fields(cls: type[Any]) -> dict[str, _Field]:
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__name__} is not a dataclass")
    hints = typing.get_type_hints(cls)
    found: dict[str, _Field] = {}
    # What a daemon says itself comes before what it inherits.
    own = inspect.get_annotations(cls)
    for one in sorted(dataclasses.fields(cls), key=lambda each: each.name not in own):
        if _KEY not in one.metadata:
            raise TypeError(f"{cls.__name__}.{one.name} is not declared with setting()")
        found[one.name] = _Field(hints[one.name], one.default, one.metadata[_KEY])
    return found


def _flag(name: str, one: _Setting) -> str:
    return "--" + (one.flag or name.replace("_", "-"))


def _read_flags(
    cls: type[Any], argv: Sequence[str], file: str | None
) -> tuple[dict[str, tuple[str | list[str], str]], str | None, bool]:
    """Values by field name with the flag's spelling, the file to read, --print-config."""
    fields = _fields(cls)
    by_flag = {_flag(name, one.setting): name for name, one in fields.items()}
    values: dict[str, tuple[str | list[str], str]] = {}
    wants_print = False
    rest = list(argv)
    while rest:
        flag, has_value, value = rest.pop(0).partition("=")
        if flag in {"-h", "--help"}:
            raise Shown(usage(cls))
        if flag == "--print-config":
            wants_print = True
            continue
        negated = False
        if flag not in by_flag and flag != "--config" and flag.startswith("--no-"):
            positive = "--" + flag.removeprefix("--no-")
            if positive in by_flag and fields[by_flag[positive]].type is bool and not has_value:
                flag, negated = positive, True
        if flag not in by_flag and flag != "--config":
            raise _unknown_flag(flag, [*by_flag, "--config", "--print-config", "--help"])
        if not has_value:
            if flag != "--config" and fields[by_flag[flag]].type is bool:
                value = "false" if negated else "true"
            elif rest:
                value = rest.pop(0)
            else:
                raise ConfigError("needs a value", field=flag)
        if flag == "--config":
            file = value
            continue
        name = by_flag[flag]
        if name not in values:
            values[name] = (value, flag)
        elif _is_tuple(fields[name].type):
            values[name] = (f"{values[name][0]},{value}", flag)
        else:
            raise ConfigError("is given twice", field=flag)
    return values, file, wants_print


def _unknown_flag(flag: str, known: Sequence[str]) -> ConfigError:
    near = difflib.get_close_matches(flag, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
    what = "unknown flag" if flag.startswith("-") else "unexpected argument"
    return ConfigError(f"{what} {flag}", hint=hint)


def _read_file(path: str, fields: Mapping[str, _Field]) -> dict[str, tuple[Any, str]]:
    """Raw values by field name, each with `path:line: name` as its place."""
    import yaml  # here, because the node proxy usually has no file and can save the memory

    try:
        with Path(path).open("rb") as handle:
            data = handle.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError(f"larger than {MAX_FILE_BYTES} bytes", file=path)
        root = yaml.compose(data.decode(), Loader=yaml.SafeLoader)
    except OSError as exc:
        raise ConfigError(exc.strerror or str(exc), file=path) from exc
    except UnicodeDecodeError as exc:
        raise ConfigError("is not UTF-8", file=path) from exc
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        line = mark.line + 1 if mark else 0
        problem = getattr(exc, "problem", None) or "not YAML"
        raise ConfigError(problem, file=path, line=line) from exc
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError("must be a mapping of settings", file=path, line=1)
    values: dict[str, tuple[Any, str]] = {}
    for key, node in root.value:
        line = key.start_mark.line + 1
        name = str(key.value)
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {near[0]}?" if near else ""
            raise ConfigError(f"unknown setting {name}", file=path, line=line, hint=hint)
        if name in values:
            raise ConfigError(f"{name} is given twice", file=path, line=line)
        if isinstance(node, yaml.SequenceNode):
            items = [item.value for item in node.value if isinstance(item, yaml.ScalarNode)]
            if len(items) != len(node.value) or not _is_tuple(fields[name].type):
                raise ConfigError(f"{name} is no list of scalars", file=path, line=line)
            raw: str | list[str] = items
        elif isinstance(node, yaml.ScalarNode):
            raw = "" if node.tag == "tag:yaml.org,2002:null" else str(node.value)
        else:
            raise ConfigError(f"{name} must be a scalar or a list", file=path, line=line)
        values[name] = (raw, f"{path}:{line}: {name}")
    return values


def _find(
    name: str,
    one: _Setting,
    flags: Mapping[str, tuple[str | list[str], str]],
    environ: Mapping[str, str],
    in_file: Mapping[str, tuple[Any, str]],
) -> tuple[str | list[str], Origin] | None:
    if name in flags:
        return flags[name][0], Origin("flag", flags[name][1])
    for variable in one.env:
        if variable in environ:
            return environ[variable], Origin("environment", variable)
    if name in in_file:
        return in_file[name][0], Origin("file", in_file[name][1])
    return None


def _missing(name: str, one: _Setting) -> ConfigError:
    where = one.env[0] if one.env else _flag(name, one)
    return ConfigError(
        "is required but not set", field=where, hint=f"set {where}: {one.doc}" if one.doc else ""
    )


def _build(cls: type[T], values: Mapping[str, Any], origins: Mapping[str, Origin]) -> T:
    try:
        return cls(**values)
    except ConfigError as exc:
        # A check in __post_init__ names its field; the user knows it by its origin.
        origin = origins.get(exc.field)
        if origin is not None and origin.name:
            exc.field = origin.name
        raise


def _is_tuple(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple


def _optional(kind: Any) -> tuple[Any, bool]:
    """`X | None` -> (X, True); anything else -> (itself, False)."""
    if typing.get_origin(kind) in {typing.Union, types.UnionType}:
        arms = [arm for arm in typing.get_args(kind) if arm is not types.NoneType]
        if len(arms) == 1:
            return arms[0], True
    return kind, False


def _parse(raw: str | list[str], kind: Any, name: str, choices: tuple[str, ...]) -> Any:
    kind, is_optional = _optional(kind)
    if isinstance(raw, list):
        return tuple(raw)
    if is_optional and raw == "":
        return None
    if _is_tuple(kind):
        return tuple(part.strip() for part in raw.split(",") if part.strip())
    value = _parse_scalar(raw, kind, name)
    if choices and value not in choices:
        raise ValueError(f"{raw!r} is not one of {', '.join(filter(None, choices))}")
    return value


def _parse_scalar(raw: str, kind: Any, name: str) -> Any:
    if kind is str:
        return raw
    text = raw.strip()
    if not text:
        raise ValueError(f"is empty, expected {_type_name(kind, name)}")
    if kind is bool:
        if text.lower() in _TRUE | _FALSE:
            return text.lower() in _TRUE
        raise ValueError(f"{raw!r} is not a boolean (write true or false)")
    if kind is Path:
        return Path(text)
    if name.endswith("_seconds"):
        return cast("Any", kind)(parse_duration(text))
    if kind is int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
            raise ValueError(f"{raw!r} is not a whole number")
        return int(text)
    if kind is float:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}(\.[0-9]{1,18})?", text):
            raise ValueError(f"{raw!r} is not a number")
        return float(text)
    raise TypeError(f"setting {name} has a type that cannot be read: {kind!r}")


def _type_name(kind: Any, name: str) -> str:
    kind, _ = _optional(kind)
    if _is_tuple(kind):
        return "list"
    if kind in {int, float} and name.endswith("_seconds"):
        return "duration"
    names = {str: "text", int: "integer", float: "number", bool: "boolean", Path: "path"}
    return names.get(kind, str(kind))


def _show(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value) or '""'
    return str(value) if str(value) else '""'
