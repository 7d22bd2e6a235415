"""Which requests a rate limit or a redaction concerns: `RequestCondition` as one function. Pure."""

from __future__ import annotations

from collections.abc import Callable

from mesh.model.l7_policy import RequestCondition
from waypoint.filters.chain import Request
from waypoint.filters.readings import field_readings, host_readings, path_readings
from waypoint.filters.strings import any_of, path_any_of

Test = Callable[[Request], bool]


def compile_condition(condition: RequestCondition) -> Test:
    """Every field that is set must hold. Raises ConfigError."""
    tests: list[Test] = []
    if condition.methods:
        tests.append(_method(condition.methods))
    if condition.paths:
        tests.append(_path(condition.paths))
    if condition.hosts:
        tests.append(_host(condition.hosts))
    tests += [_header(name, value) for name, value in condition.headers]
    if condition.principals:
        tests.append(_principal(condition.principals))
    if condition.not_principals:
        tests.append(_not(_principal(condition.not_principals)))
    if condition.namespaces:
        tests.append(_namespace(condition.namespaces))
    if condition.route_rules:
        tests.append(_rule(condition.route_rules))
    if not tests:
        return _always
    if len(tests) == 1:
        return tests[0]
    return lambda request: all(test(request) for test in tests)


def _always(request: Request) -> bool:
    del request
    return True


def _not(test: Test) -> Test:
    return lambda request: not test(request)


def _method(values: tuple[str, ...]) -> Test:
    matches = any_of(values)
    return lambda request: matches(request.method)


def _path(values: tuple[str, ...]) -> Test:
    matches = path_any_of(values)
    return lambda request: any(map(matches, path_readings(request.path)))


def _host(values: tuple[str, ...]) -> Test:
    matches = any_of(values, folds_case=True)

    # The port is another way to write the same host; a limit must not be left by it.
    return lambda request: any(map(matches, host_readings(request.authority)))


def _header(name: str, value: str) -> Test:
    key, matches = name.lower().encode(), any_of((value,))

    def test(request: Request) -> bool:
        return any(map(matches, field_readings(request.headers.get_all(key))))

    return test


def _principal(values: tuple[str, ...]) -> Test:
    matches = any_of(values)

    def test(request: Request) -> bool:
        source = request.source
        return source is not None and matches(str(source).removeprefix("spiffe://").encode())

    return test


def _namespace(values: tuple[str, ...]) -> Test:
    matches = any_of(values)
    return lambda request: request.source is not None and matches(request.source.namespace.encode())


def _rule(values: tuple[str, ...]) -> Test:
    """`namespace/route` or `namespace/route/rule`."""
    wanted = frozenset(values)
    return lambda request: request.route in wanted or f"{request.route}/{request.rule}" in wanted
