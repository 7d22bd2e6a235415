"""Labs without daemons for tests: a small shop in YAML, and a driver around a running lab."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mesh.lab.control import Completed, LabClient
from mesh.lab.launch import LabSettings, RunningLab, start

MODES = ["root", "rootless"] if os.getuid() == 0 else ["rootless"]

PROGRAMS = """
apiVersion: v1
kind: ConfigMap
metadata: {name: programs, namespace: shop}
data:
  greeting: hello
  serve.py: |
    import os, socket, sys, threading
    def serve(port):
        l = socket.socket(socket.AF_INET6)
        l.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        l.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        l.bind(("::", port)); l.listen(50)
        while True:
            c, a = l.accept()
            c.sendall(f"{os.environ['POD']} {port} {a[0].removeprefix('::ffff:')}".encode())
            c.close()
    print("serving", flush=True)
    threading.Thread(target=serve, args=(9000,), daemon=True).start()
    serve(8080)
  ask.py: |
    import socket, sys
    s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=4)
    print(s.recv(100).decode(), s.getpeername()[0])
"""
WEB = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
        - name: main
          command: [python3, /app/serve.py]
          env: [{name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}]
          ports: [{name: http, containerPort: 8080}, {name: extra, containerPort: 9000}]
          readinessProbe: {tcpSocket: {port: http}, periodSeconds: 1}
          volumeMounts: [{name: programs, mountPath: /app}]
      volumes: [{name: programs, configMap: {name: programs}}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  ipFamilyPolicy: PreferDualStack
  selector: {app: web}
  ports:
    - {name: http, port: 80, targetPort: http}
    - {name: extra, port: 81, targetPort: extra}
---
apiVersion: v1
kind: Service
metadata: {name: six, namespace: shop}
spec:
  ipFamilies: [IPv6]
  selector: {app: web}
  ports: [{port: 80, targetPort: http}]
---
apiVersion: v1
kind: Service
metadata: {name: nobody, namespace: shop}
spec:
  selector: {app: nobody}
  ports: [{port: 80}]
"""
CALLER = """
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: caller, namespace: shop, labels: {app: caller}}
spec:
  nodeSelector: {kubernetes.io/hostname: node1}
  containers:
    - name: main
      command: [sleep, infinity]
      workingDir: /app
      volumeMounts:
        - {name: programs, mountPath: /app}
        - {name: scratch, mountPath: /etc/scratch/here}
        - {name: programs, mountPath: /etc/greeting, subPath: greeting}
  volumes:
    - {name: programs, configMap: {name: programs}}
    - {name: scratch, emptyDir: {}}
"""
DATABASE = """
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {clusterIP: None, selector: {app: db}, ports: [{name: sql, port: 9000}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db, namespace: shop}
spec:
  serviceName: db
  replicas: 2
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
        - name: main
          command: [python3, /app/serve.py]
          env: [{name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}]
          readinessProbe: {tcpSocket: {port: 9000}, periodSeconds: 1}
          volumeMounts: [{name: programs, mountPath: /app}, {name: data, mountPath: /data}]
      volumes: [{name: programs, configMap: {name: programs}}]
  volumeClaimTemplates: [{metadata: {name: data}}]
"""

GATE = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: gate, namespace: shop}
spec:
  replicas: 2
  selector: {matchLabels: {app: gate}}
  template:
    metadata: {labels: {app: gate}}
    spec:
      terminationGracePeriodSeconds: 1
      initContainers:
        - {name: first, command: [sh, -c, "exit $(CODE)"], env: [{name: CODE, value: "0"}]}
      containers:
        - name: main
          command: [python3, /app/serve.py]
          env: [{name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}]
          startupProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
          readinessProbe:
            exec: {command: [test, -f, /scratch/open]}
            periodSeconds: 1
            failureThreshold: 1
          volumeMounts:
            - {name: programs, mountPath: /app}
            - {name: scratch, mountPath: /scratch}
      volumes: [{name: programs, configMap: {name: programs}}, {name: scratch, emptyDir: {}}]
---
apiVersion: v1
kind: Service
metadata: {name: gate, namespace: shop}
spec: {selector: {app: gate}, ports: [{port: 80, targetPort: 8080}]}
"""

MISC = """
apiVersion: v1
kind: Pod
metadata: {name: sick, namespace: shop, labels: {app: misc}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: main
      command: [sh, -c, "echo first life; exec sleep infinity"]
      livenessProbe:
        exec: {command: [test, "!", -f, /scratch/sick]}
        periodSeconds: 1
        failureThreshold: 1
      volumeMounts: [{name: scratch, mountPath: /scratch}]
  volumes: [{name: scratch, emptyDir: {}}]
---
apiVersion: v1
kind: Pod
metadata: {name: done, namespace: shop, labels: {app: misc}}
spec:
  restartPolicy: OnFailure
  containers: [{name: main, command: ["true"]}]
"""
LATE = """
apiVersion: v1
kind: Pod
metadata: {name: late, namespace: shop, labels: {app: late}}
spec:
  containers:
    - name: main
      command: [sleep, infinity]
      env: [{name: KEY, valueFrom: {configMapKeyRef: {name: late, key: key}}}]
      volumeMounts: [{name: late, mountPath: /late}]
  volumes: [{name: late, configMap: {name: late}}]
"""
FILES = {"p.yaml": PROGRAMS, "web.yaml": WEB, "caller.yaml": CALLER, "db.yaml": DATABASE}


class BareLab:
    """A running lab and its directory."""

    def __init__(self, running: RunningLab, directory: Path) -> None:
        self.running = running
        self.client: LabClient = running.client
        self.directory = directory

    def ask(self, host: str, port: int, pod: str = "caller") -> Completed:
        return self.client.run("shop", pod, ["python3", "/app/ask.py", host, str(port)])

    def answer(self, host: str, port: int, pod: str = "caller") -> list[str]:
        done = self.ask(host, port, pod)
        assert done.code == 0, done
        return done.stdout.decode().split()

    def shell(self, script: str, pod: str = "caller") -> Completed:
        return self.client.run("shop", pod, ["sh", "-c", script])

    def write(self, name: str, text: str) -> None:
        beside = self.directory / f".{name}"
        beside.write_text(text)
        beside.replace(self.directory / name)

    def forget(self, name: str) -> bool:
        found = (self.directory / name).exists()
        (self.directory / name).unlink(missing_ok=True)
        return found

    def restore(self) -> None:
        """Put the directory back as it was, and wait until the lab has followed."""
        for file, text in FILES.items():
            if (self.directory / file).read_text() != text:
                self.write(file, text)
        extra = [name for name in ("gate", "misc", "late", "bad") if self.forget(f"{name}.yaml")]
        self.until(lambda: not any(self.pods(app) for app in extra))
        self.until(lambda: not self.client.status()["faults"])
        self.until(lambda: all("version" not in p["metadata"]["labels"] for p in self.pods("web")))
        self.client.wait_ready()

    def pods(self, app: str) -> list[dict]:  # type: ignore[type-arg]
        found = self.client.get("Pod", "shop")
        return [pod for pod in found if pod["metadata"]["labels"].get("app") == app]

    def until(self, what: Callable[[], bool], seconds: float = 45.0) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, self.client.status()
            select.select([], [], [], 0.05)


@contextlib.contextmanager
def lab_of(
    directory: Path, name: str, files: dict[str, str], *, rootless: bool
) -> Iterator[BareLab]:
    for file, text in files.items():
        (directory / file).write_text(text)
    running = start(LabSettings(directory, name=name, mesh=False, rootless=rootless))
    try:
        yield BareLab(running, directory)
    finally:
        running.stop()
