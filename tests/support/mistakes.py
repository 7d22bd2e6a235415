"""A directory in which everything is wrong that can be, beside an application that is right; and
what is to be told of each mistake.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

# Right: a server and a caller, in the mesh.
GOOD = """\
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: web
    command: [python3, -c, "import http.server as s; s.test(s.SimpleHTTPRequestHandler, port=80)"]
    readinessProbe: {tcpSocket: {port: 80}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Pod
metadata: {name: caller, namespace: shop, labels: {app: caller}}
spec: {containers: [{name: a, command: [sleep, infinity]}]}
"""

POD = "apiVersion: v1\nkind: Pod\nmetadata: {name: %s, namespace: shop}\nspec:\n"
SERVICE = POD.replace("Pod", "Service")
POLICY = POD.replace("v1", "security.istio.io/v1").replace("Pod", "AuthorizationPolicy")
DEPLOYMENT = POD.replace("v1", "apps/v1").replace("Pod", "Deployment")
SLEEP = "{name: a, command: [sleep, infinity]}"
TEMPLATE = f"template: {{metadata: {{labels: {{app: d}}}}, spec: {{containers: [{SLEEP}]}}}}}}"
LISTEN = "import http.server as s; s.test(s.SimpleHTTPRequestHandler, port=8080)"

NOT_READ = "mend it; until then nothing of it is used"
DENIES = "; until it is repaired, everything that it could concern is denied"


@dataclass(frozen=True)
class Mistake:
    """A file, and what is told of it: place within the file, object, field, message, hint."""

    content: str | bytes
    place: str
    message: str
    hint: str = ""
    object: str = ""
    field: str = ""


# -- files that cannot be read: name -> what is told ------------------------------------

ERRORS = {
    "broken.yaml": Mistake(
        "kind: Service\nmetadata:\n  name: [broken\n",
        ":4:1",
        "not YAML: while parsing a flow sequence did not find expected ',' or ']'",
        NOT_READ,
    ),
    "cut.json": Mistake('{"kind": "Pod",\n', ":2:1", "not JSON: expecting property name", NOT_READ),
    "bomb.yaml": Mistake(
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
        ":1:4",
        "anchors are not allowed: write the value out",
        NOT_READ,
    ),
    "alias.yaml": Mistake("a: *a\n", ":1:4", "aliases are not allowed", NOT_READ),
    "huge.yaml": Mistake("#" * (2 << 20), "", "larger than 1024 KiB: split it", NOT_READ),
    "deep.yaml": Mistake("[" * 5000, ":1:101", "nested deeper than 100 levels", NOT_READ),
    "junk.yaml": Mistake(b"\n\xff\xfe\x00\x01" * 99, ":2", "not UTF-8 text", NOT_READ),
    "zeros.yaml": Mistake(b"\0" * 99, "", "not YAML: ", NOT_READ),
    "list.yaml": Mistake("- 1\n", ":1:1", "not a Kubernetes object", NOT_READ),
    "words.yaml": Mistake("only words\n", ":1:1", "not a Kubernetes object", NOT_READ),
    "kindless.yaml": Mistake("apiVersion: v1\n", ":1:1", "missing", NOT_READ, "", "kind"),
    # -- objects that cannot mean anything ----------------------------------------------
    "web-again.yaml": Mistake(
        SERVICE % "web" + "  ports: [{port: 81}]\n",
        ":1:1",
        "Service shop/web is already defined at ",
        "delete one of the two",
    ),
    "service-port.yaml": Mistake(
        SERVICE % "no-port" + "  selector: {app: web}\n  ports:\n  - port: 70000\n",
        ":7:11",
        "not a port: 70000",
        "a number from 1 to 65535",
        field="spec.ports[0].port",
    ),
    "pod-command.yaml": Mistake(
        POD % "no-command" + "  containers: [{name: a, image: nginx}]\n",
        ":5:16",
        "is required, because the lab ignores image",
        "write the program of the image's entrypoint as command",
        field="spec.containers[0].command",
    ),
    "deployment-replicas.yaml": Mistake(
        DEPLOYMENT % "negative" + "  {replicas: -1, " + TEMPLATE + "\n",
        ":5:14",
        "-1 is out of range 0..250",
        field="spec.replicas",
    ),
    "policy-field.yaml": Mistake(
        POLICY % "rulez" + "  selector: {matchLabels: {app: caller}}\n  rulez: [{}]\n",
        ":6:3",
        "unknown field" + DENIES,
        "known here: selector, targetRef, targetRefs, rules, action, provider",
        "AuthorizationPolicy shop/rulez",
        "spec.rulez",
    ),
    "policy-action.yaml": Mistake(
        POLICY % "permit" + "  selector: {matchLabels: {app: caller}}\n  action: PERMIT\n",
        ":6:11",
        'unknown value "PERMIT"' + DENIES,
        "one of: ALLOW, DENY, AUDIT, CUSTOM",
        "AuthorizationPolicy shop/permit",
        "spec.action",
    ),
    "peer-mode.yaml": Mistake(
        (POLICY % "mode").replace("AuthorizationPolicy", "PeerAuthentication")
        + "  selector: {matchLabels: {app: caller}}\n  mtls: {mode: STRICKT}\n",
        ":6:16",
        'unknown value "STRICKT"' + DENIES,
        "one of: UNSET, DISABLE, PERMISSIVE, STRICT",
        "PeerAuthentication shop/mode",
        "spec.mtls.mode",
    ),
}

WARNINGS = {
    "service-nothing.yaml": Mistake(
        SERVICE % "nothing" + "  selector: {app: nobody}\n  ports: [{port: 80}]\n",
        ":5:3",
        "selects nothing: no pod in 'shop' has app=nobody",
        "compare it with the labels of the pods, or of their template",
        "Service shop/nothing",
        "spec.selector",
    ),
    "service-field.yaml": Mistake(
        SERVICE % "misspelt" + "  selectr: {app: web}\n  ports: [{port: 80}]\n",
        ":5:3",
        "unknown field: it is ignored",
        "did you mean selector?",
        "Service shop/misspelt",
        "spec.selectr",
    ),
    "pod-field.yaml": Mistake(
        POD % "misspelt" + "  containers:\n  - " + SLEEP.replace("}", ", comand: [x]}") + "\n",
        ":6:43",
        "unknown field: it is ignored",
        "did you mean command?",
        "Pod shop/misspelt",
        "spec.containers[0].comand",
    ),
    "deployment-field.yaml": Mistake(
        DEPLOYMENT % "misspelt" + "  {replica: 0, replicas: 0, " + TEMPLATE + "\n",
        ":5:13",
        "unknown field: it is ignored",
        "did you mean replicas?",
        "Deployment shop/misspelt",
        "spec.replica",
    ),
    "policy-rules.yaml": Mistake(
        POLICY % "no-rules" + "  {action: DENY}\n",
        ":4:1",
        "DENY without rules never matches: it does nothing",
        "",
        "AuthorizationPolicy shop/no-rules",
        "spec.rules",
    ),
    "policy-http.yaml": Mistake(
        POLICY % "http"
        + "  selector: {matchLabels: {app: caller}}\n"
        + "  rules: [{to: [{operation: {methods: [GET]}}]}]\n",
        ":6:18",
        "methods cannot be seen by the tunnel: this rule allows nothing",
        "attach the policy to a waypoint with targetRefs",
        "AuthorizationPolicy shop/http",
        "spec.rules[0].to[0].operation",
    ),
    "account.yaml": Mistake(
        POD % "ghost" + "  serviceAccountName: ghost\n  containers: [" + SLEEP + "]\n",
        ":5:23",
        'no service account "ghost" is defined in namespace "shop"',
        "write a ServiceAccount object, or correct the name",
        "Pod shop/ghost",
        "spec.serviceAccountName",
    ),
    "namespace.yaml": Mistake(
        (POD % "lost").replace("shop", "nowhere") + "  containers: [" + SLEEP + "]\n",
        ":3:35",
        'no namespace "nowhere" is defined',
        "write a Namespace object, or correct the name",
        "Pod nowhere/lost",
        "metadata.namespace",
    ),
    "ports.yaml": Mistake(
        POD % "twins"
        + "  terminationGracePeriodSeconds: 0\n  containers:\n"
        + "".join(
            f"  - {{name: {name}, command: [python3, -c, {LISTEN!r}], "
            "ports: [{containerPort: 8080}]}\n"
            for name in "ab"
        ),
        ":6:3",
        "port 8080/TCP is declared twice",
        "give each a port of its own",
        "Pod shop/twins",
        "spec.containers",
    ),
}

# What no file's content can be: made by hand in `bad_directory`.
OTHERS = {
    "pipe.yaml": "not a regular file",
    "dangling.yaml": "the link leads nowhere",
    "loop.yaml": "cannot be read: Too many levels of symbolic links",
    "again": "a linked directory is not read",
}
# A user's lab is root of a user namespace, to which every file of the user's is open.
IS_ROOT = os.geteuid() == 0
if IS_ROOT:
    OTHERS["secret.yaml"] = "cannot be read: Permission denied"
    OTHERS["secret"] = "cannot be listed: Permission denied"


def bad_directory(directory: Path) -> None:
    (directory / "app.yaml").write_text(GOOD)
    for name, mistake in {**ERRORS, **WARNINGS}.items():
        content = mistake.content
        data = content.encode() if isinstance(content, str) else content
        (directory / name).write_bytes(data)
    (directory / "program.yaml").write_text(
        POD % "program" + "  containers: [{name: a, command: [no-such-program]}]\n"
    )
    # Nothing is wrong with these.
    (directory / "empty.yaml").touch()
    (directory / "comment.yaml").write_text("---\n# nothing yet\n---\n")
    (directory / "notes.txt").write_bytes(b"\xff")
    os.mkfifo(directory / "pipe.yaml")
    (directory / "dangling.yaml").symlink_to("nowhere")
    (directory / "loop.yaml").symlink_to("loop.yaml")
    (directory / "again").symlink_to(".")
    if IS_ROOT:
        (directory / "secret.yaml").write_text(GOOD)
        (directory / "secret.yaml").chmod(0)
        (directory / "secret").mkdir(mode=0)
