"""`ambit lab`: the whole mesh on one machine, in network namespaces of its own."""

from __future__ import annotations

import os
import shlex
import sys
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from mesh.cli.choose import DEFAULT, choose_pod, lab_client, lab_option
from mesh.cli.output import FAILED, emit, errors, output_option, say
from mesh.errors import ConfigError
from mesh.lab.control import check_name, list_labs

DAEMONS = ("istiod_lite", "netconfig", "ztunnel")
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRACES_ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"


@click.group()
def lab() -> None:
    """Run the whole mesh on this machine.

    \b
    Examples:
      ambit lab demo
      ambit lab up --dir my-yaml --nodes 3
      ambit lab exec shop/reader -- curl -s http://web/
    """


@lab.command()
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, readable=False),
    default=Path(),
    show_default="here",
    help="Directory of ordinary Kubernetes YAML; it is watched.",
)
@click.option(
    "--nodes",
    type=click.IntRange(1, 50),
    show_default="the directory's Node objects, else 2",
    help="How many.",
)
@click.option("--name", default=DEFAULT, show_default=True, help="Several labs may be up.")
@click.option(
    "--replace",
    "replace",
    multiple=True,
    metavar="DAEMON=PROGRAM",
    help="Run PROGRAM in the place of a daemon: ztunnel, netconfig or istiod_lite.",
)
@click.option("--on", "nodes_on", multiple=True, metavar="NODE", help="Replace only on this node.")
@click.option(
    "--otlp",
    metavar="ENDPOINT",
    show_default="$OTEL_EXPORTER_OTLP_ENDPOINT",
    help="Send the node proxies' traces to this OTLP collector: of this machine, or a pod's.",
)
@click.option("--detach", "-d", is_flag=True, help="Return when the lab is up; it runs on.")
def up(
    directory: Path,
    nodes: int | None,
    name: str,
    replace: tuple[str, ...],
    nodes_on: tuple[str, ...],
    otlp: str | None,
    detach: bool,
) -> None:
    """Start nodes and pods from a directory of YAML, and stay until Ctrl-C or `lab down`.

    Containers run their command and args as processes of this machine, in network and mount
    namespaces of their own; `image` is ignored. The directory is watched while the lab is up.

    \b
    Examples:
      ambit lab up --dir manifests/examples/shop
      ambit lab up --dir my-yaml --nodes 3 --name second
      ambit lab up --replace "ztunnel=/usr/local/bin/ztunnel proxy ztunnel" --on node2
      ambit lab up --otlp http://localhost:4318
    """
    from mesh.lab.launch import LabSettings, start

    with errors():
        traces = trace_variables(os.environ, otlp)
        outside = collector_outside(traces)
        settings = LabSettings(
            name=check_name(name),
            directory=Path(os.path.realpath(directory)),
            nodes=nodes,
            replace=parse_replacements(replace, nodes_on),
            environment={
                "ztunnel": traces,
                "istiod": {"WAYPOINT_TRACES": waypoint_traces(traces, outside)},
            },
            outside=outside,
            detach=detach,
        )
        running = start(settings, progress=say if sys.stderr.isatty() else None)
        pods = len(running.status["pods"])
        say(f"lab {name} is up: {len(running.status['nodes'])} nodes, {pods} pods")
        if detach:
            return
        say("Ctrl-C or `ambit lab down` ends it")
        code = running.wait()
    sys.exit(code)


def trace_variables(environ: Mapping[str, str], endpoint: str | None) -> dict[str, str]:
    """What the node proxies are told about traces: the caller's own OTEL_* variables, with
    `endpoint` in the place of theirs.
    """
    told = {name: value for name, value in environ.items() if name.startswith("OTEL_")}
    if endpoint is not None:
        told.pop(TRACES_ENDPOINT, None)
        told[ENDPOINT] = endpoint
    return told


def waypoint_traces(variables: Mapping[str, str], outside: tuple[str, int] | None) -> str:
    """The same for waypoints, as the controller takes it: without secrets, and with the address of
    its node where a node proxy asks at `outside` on loopback.
    """
    told = {}
    for name, value in variables.items():
        if name.endswith("_HEADERS"):
            continue
        if outside is not None and name in (ENDPOINT, TRACES_ENDPOINT):
            url = urllib.parse.urlsplit(value)
            value = url._replace(netloc=f"$(HOST_IP):{outside[1]}").geturl()
        told[name] = urllib.parse.quote(value, safe="")
    return ",".join(f"{name}={value}" for name, value in told.items())


def collector_outside(variables: Mapping[str, str]) -> tuple[str, int] | None:
    """The address of a collector on this machine's loopback, which the lab has to be led to; None
    for any other. Raises ConfigError for what is no URL.
    """
    text = variables.get(TRACES_ENDPOINT) or variables.get(ENDPOINT, "")
    try:
        url = urllib.parse.urlsplit(text)
        host, port = url.hostname or "", url.port
    except ValueError as exc:
        raise ConfigError(f"not a URL: {text!r}", field="--otlp") from exc
    if text and url.scheme not in ("http", "https"):
        raise ConfigError(
            f"not a URL: {text!r}", field="--otlp", hint="such as http://localhost:4318"
        )
    if host not in ("localhost", "::1") and not host.startswith("127."):
        return None
    return host, port or (443 if url.scheme == "https" else 80)


def parse_replacements(
    replace: tuple[str, ...], only: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    """`DAEMON=PROGRAM ARGS` and the chosen nodes as {"ztunnel": argv} or {"ztunnel@node1": argv}.

    Raises ConfigError naming the flag's value.
    """
    chosen: dict[str, tuple[str, ...]] = {}
    for item in replace:
        daemon, found, program = item.partition("=")
        try:
            argv = tuple(shlex.split(program))
        except ValueError as exc:
            raise ConfigError(f"--replace {item}: {str(exc).lower()}") from exc
        if not found or daemon not in DAEMONS or not argv:
            raise ConfigError(
                f"--replace {item}: not DAEMON=PROGRAM", hint=f"daemons: {', '.join(DAEMONS)}"
            )
        if daemon == "istiod_lite":
            chosen["istiod"] = argv
            continue
        chosen.update({f"{daemon}@{node}": argv for node in only} or {daemon: argv})
    if only and not chosen:
        raise ConfigError("--on goes with --replace", hint="--replace ztunnel=PROGRAM --on node1")
    return chosen


@lab.command()
@lab_option
def down(name: str | None) -> None:
    """Stop a lab; nothing of it is left.

    \b
    Examples:
      ambit lab down
      ambit lab down --lab second
      kill -9 PID                        leaves nothing either
    """
    with errors():
        client = lab_client(name)
        client.down()
    say(f"lab {client.address.name} is down")


_DAEMON = "DAEMON is istiod, or netconfig or ztunnel with its node: ztunnel@node1."


@lab.command(epilog=_DAEMON)
@lab_option
@click.argument("daemon")
def restart(name: str | None, daemon: str) -> None:
    """End DAEMON in good order, and wait until its successor is ready.

    Of ztunnel the successor is there first: connections go on, and no port is closed meanwhile.

    \b
    Examples:
      ambit lab restart ztunnel@node1
      ambit lab restart istiod
      ambit lab restart netconfig@node2 --lab second
    """
    with errors():
        client = lab_client(name)
        if sys.stderr.isatty():
            say(f"{daemon} restarts")
        client.restart(daemon)
    say(f"{daemon} was restarted")


@lab.command(epilog=_DAEMON)
@lab_option
@click.argument("daemon")
def kill(name: str | None, daemon: str) -> None:
    """Kill DAEMON at once, as a crash would; the lab starts it again by itself.

    \b
    Examples:
      ambit lab kill ztunnel@node1
      ambit lab kill istiod
      ambit lab kill netconfig@node2 && ambit lab status --wait
    """
    with errors():
        lab_client(name).kill(daemon)
    say(f"{daemon} was killed")


@lab.command(name="list")
@output_option
def list_(form: str) -> None:
    """List the labs that are up.

    \b
    Examples:
      ambit lab list
      ambit lab list -o json
      ambit lab list | wc -l
    """
    labs = [{"name": found.name} for found in list_labs(uid=os.getuid())]
    emit(labs, form, columns=[("NAME", "name")], rows=labs)


@lab.command()
@lab_option
@output_option
@click.option("--wait", is_flag=True, help="Wait until everything is ready (at most 60 s).")
def status(name: str | None, form: str, wait: bool) -> None:
    """Show nodes, daemons, pods, and what is wrong.

    \b
    Examples:
      ambit lab status
      ambit lab status --wait
      ambit lab status -o json
    """
    with errors():
        client = lab_client(name)
        shown = client.wait_ready() if wait else client.status()
    if form in {"json", "yaml"}:
        emit(shown, form)
        return
    print_status(shown, wide=form == "wide")


def print_status(shown: dict[str, Any], *, wide: bool) -> None:
    """A lab's status as tables for a person."""
    click.echo(
        f"lab {shown['name']}: {shown['phase']}, up {shown['uptime_seconds']:.0f} s, "
        f"from {shown['directory']}\n"
    )
    rows = []
    for place in [{"name": "control plane", **shown["control_plane"]}, *shown["nodes"]]:
        for daemon, state in sorted(place["daemons"].items()):
            rows.append({"place": place["name"], "daemon": daemon, **state})
    columns = [("PLACE", "place"), ("DAEMON", "daemon"), ("STATE", "state")]
    emit(rows, "table", columns=[*columns, ("PID", "pid"), ("RESTARTS", "restarts")], rows=rows)
    click.echo()
    columns = [("NAMESPACE", "namespace"), ("POD", "name"), ("READY", "ready"), ("PHASE", "phase")]
    columns += [("NODE", "node"), ("MESH", "enrolled"), ("RESTARTS", "restarts"), ("IPS", "ips")]
    if wide:
        columns += [("OWNER", "owner"), ("UID", "uid")]
    pods = shown["pods"]
    if any(pod.get("message") for pod in pods):
        columns.append(("MESSAGE", "message"))
    emit(pods, "table", columns=columns, rows=pods)
    for mark, found in (("", shown["faults"]), ("warning", shown["warnings"])):
        for each in found:
            place = ":".join(str(each[key]) for key in ("file", "line", "column") if each[key])
            parts = (mark, place, each["object"], each["field"], each["message"])
            say(": ".join(part for part in parts if part))
            if each["hint"]:
                say(f"hint: {each['hint']}")
    for note in shown["notes"]:
        say(note)


@lab.command(name="exec", context_settings={"ignore_unknown_options": True})
@lab_option
@click.option("-n", "--namespace", help="The pod's namespace.")
@click.option("-c", "--container", help="Whose environment and directory to use.")
@click.argument("pod")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_(
    name: str | None,
    namespace: str | None,
    container: str | None,
    pod: str,
    command: tuple[str, ...],
) -> None:
    """Run a command inside a pod's namespaces, on this terminal.

    POD is a name, NAMESPACE/NAME, deploy/NAME, or the beginning of one.

    \b
    Examples:
      ambit lab exec shop/reader -- python3 /app/get.py http://web/
      ambit lab exec -n shop deploy/web -- ip addr
      ambit lab exec shop/reader -- sh
    """
    with errors():
        client = lab_client(name)
        found_namespace, found = choose_pod(client, pod, namespace)
        code = client.exec(found_namespace, found, command, container=container)
    sys.exit(code)


@lab.command()
@lab_option
@click.option("-n", "--namespace", help="The pod's namespace.")
@click.option("-c", "--container", help="One container of the pod.")
@click.option("-f", "--follow", is_flag=True, help="Go on as lines come.")
@click.option("--tail", type=click.IntRange(0), help="Only the last lines.")
@click.argument("what", required=False)
def logs(
    name: str | None,
    namespace: str | None,
    container: str | None,
    follow: bool,
    tail: int | None,
    what: str | None,
) -> None:
    """Print the log of a pod, of a daemon, or of the lab itself.

    \b
    Examples:
      ambit lab logs shop/web --tail 20
      ambit lab logs ztunnel@node1 -f
      ambit lab logs istiod
    """
    with errors():
        client = lab_client(name)
        pod = daemon = None
        if what is not None and (what == "istiod" or "@" in what):
            daemon = what
        elif what is not None:
            pod = choose_pod(client, what, namespace)
        out = sys.stdout.buffer
        for chunk in client.logs(
            pod=pod, container=container, daemon=daemon, tail=tail, follow=follow
        ):
            out.write(chunk)
            out.flush()


@lab.command()
@click.option("-o", "--output", "form", type=click.Choice(["text", "json"]), default="text")
@click.option("--keep-going", is_flag=True, help="Tell the rest after a step failed.")
def demo(form: str, keep_going: bool) -> None:
    """Watch the mesh at work: a lab of its own, from first plaintext to un-enrolment.

    Exit 0 only if every step held.

    \b
    Examples:
      ambit lab demo
      ambit lab demo -o json
      ambit lab demo --keep-going
    """
    import trio

    from mesh.lab.demo import STEPS, Step, as_json, tell

    live = form == "text" and sys.stdout.isatty()

    def listener(name: str, step: Step | None) -> None:
        if form == "json":
            return
        if step is None:
            if live:
                click.echo(f"  …   {name}", nl=False)
            return
        mark = click.style("ok", fg="green") if step.ok else click.style("FAIL", fg="red")
        start = "\r\x1b[K" if live else ""
        click.echo(f"{start}  {mark:<4} {name:<32} {step.detail}")

    with errors():
        if form == "text":
            click.echo(f"Two nodes, a shop, and the mesh, in {len(STEPS)} steps:\n")
        told, seconds = trio.run(lambda: tell(listener, keep_going=keep_going))
    report = as_json(told, seconds)
    if form == "json":
        emit(report, "json")
    else:
        held = sum(step.ok for step in told)
        click.echo(f"\n{held} of {len(STEPS)} steps held, {seconds:.1f} s")
    sys.exit(0 if report["ok"] else FAILED)
