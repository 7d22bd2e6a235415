"""The `ambit` command: its groups, and the lazy loading that keeps `ambit -h` quick.

`kubectl ambit` is the same program under the name kubectl looks for.
"""

from __future__ import annotations

import importlib

import click

from mesh import __version__
from mesh.cli.output import emit, output_option

_VERBS = {
    "certificates": ("mesh.cli.inspect", "certificates", "Show the proxies' certificates."),
    "audit": ("mesh.cli.audit", "audit", "Verify the audit records of redaction."),
    "check": ("mesh.cli.check", "check", "Validate and lint YAML, without a cluster."),
    "connections": ("mesh.cli.inspect", "connections", "Show open connections."),
    "explain": ("mesh.cli.explain", "explain", "Say what happens to a connection, and why."),
    "install": ("mesh.cli.install", "install", "Install the mesh into Kubernetes."),
    "lab": ("mesh.cli.lab", "lab", "Run the whole mesh on this machine."),
    "enroll": ("mesh.cli.enroll", "enroll", "Take a namespace into the mesh."),
    "policies": ("mesh.cli.inspect", "policies", "Show the policies that proxies enforce."),
    "services": ("mesh.cli.inspect", "services", "Show the services that proxies know."),
    "status": ("mesh.cli.status", "status", "Show the whole mesh on one screen."),
    "workloads": ("mesh.cli.inspect", "workloads", "Show the workloads that proxies know."),
    "waypoint": ("mesh.cli.waypoint", "waypoint", "Deploy waypoints: L7 for who opts in."),
    "uninstall": ("mesh.cli.install", "uninstall", "Take the mesh out of Kubernetes."),
    "unenroll": ("mesh.cli.enroll", "unenroll", "Take a namespace out of the mesh."),
}


class _Lazy(click.Group):
    """A group whose verbs are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*_VERBS, *super().list_commands(ctx)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return super().get_command(ctx, cmd_name)
        module, attribute, _ = _VERBS[cmd_name]
        command = getattr(importlib.import_module(module), attribute)
        return command if isinstance(command, click.Command) else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, summary) for name, (_, _, summary) in _VERBS.items()]
        rows.append(("version", "Print the version."))
        with formatter.section("Commands"):
            formatter.write_dl(sorted(rows))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
def ambit() -> None:
    """An ambient service mesh: mTLS, identity and policy without sidecars.

    \b
    Examples:
      ambit lab demo                     watch the mesh at work, on this machine
      ambit lab up --dir my-yaml         run a directory of Kubernetes YAML
      ambit status                       see how it is, on one screen
      ambit enroll shop                  take the namespace shop into the mesh
      ambit workloads                    see what the node proxies know
    """


@ambit.command()
@output_option
def version(form: str) -> None:
    """Print the version."""
    emit(
        {"version": __version__},
        form,
        columns=[("VERSION", "version")],
        rows=[{"version": __version__}],
    )


def main() -> None:
    """Entry point of `ambit` and `kubectl-ambit`."""
    ambit()
