"""The objects of the demo's steps behind a waypoint, as a person would write them."""

from __future__ import annotations

PRICES = """\
apiVersion: v1
kind: ConfigMap
metadata: {name: prices, namespace: shop}
data:
  prices.py: |
    \"\"\"Says what reached it. /flaky answers 503 to two of three requests.\"\"\"
    import http.server, itertools, json, sys

    calls = itertools.count(1)

    class Prices(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            fails = self.path == "/flaky" and next(calls) % 3
            self.close_connection = self.path == "/last"
            body = json.dumps({"version": sys.argv[1], "sees": self.client_address[0],
                               "path": self.path, "headers": dict(self.headers),
                               "card": "4111 1111 1111 1111"}).encode()
            self.send_response(503 if fails else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            print(self.path, flush=True)

    http.server.ThreadingHTTPServer(("0.0.0.0", 8080), Prices).serve_forever()
"""
VERSION = """\
---
apiVersion: v1
kind: Pod
metadata: {{name: prices-{version}, namespace: shop, labels: {{app: prices, version: {version}}}}}
spec:
  nodeSelector: {{kubernetes.io/hostname: {node}}}
  containers:
    - name: prices
      image: python:3
      command: [python3, /app/prices.py, {version}]
      ports: [{{name: http, containerPort: 8080}}]
      readinessProbe: {{httpGet: {{path: /ready, port: http}}, periodSeconds: 1}}
      volumeMounts: [{{name: programs, mountPath: /app}}]
  volumes: [{{name: programs, configMap: {{name: prices}}}}]
---
apiVersion: v1
kind: Service
metadata: {{name: prices-{version}, namespace: shop}}
spec:
  selector: {{app: prices, version: {version}}}
  ports: [{{name: http, port: 80, targetPort: http}}]
"""
SERVICE = """\
---
apiVersion: v1
kind: Service
metadata: {name: prices, namespace: shop}
spec:
  selector: {app: prices}
  ports: [{name: http, port: 80, targetPort: http}]
"""
COLLECTOR = """\
---
apiVersion: v1
kind: ConfigMap
metadata: {name: collector, namespace: outside}
data:
  collector.py: |
    \"\"\"Takes OTLP over HTTP and prints each body in base64.\"\"\"
    import base64, http.server

    class Collector(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            print(self.headers.get("Content-Encoding", "-"), base64.b64encode(body).decode())
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    http.server.ThreadingHTTPServer(("0.0.0.0", 4318), Collector).serve_forever()
---
apiVersion: v1
kind: Pod
metadata: {name: collector, namespace: outside, labels: {app: collector}}
spec:
  containers:
    - name: collector
      image: python:3
      command: [python3, -u, /app/collector.py]
      readinessProbe: {tcpSocket: {port: 4318}, periodSeconds: 1}
      volumeMounts: [{name: programs, mountPath: /app}]
  volumes: [{name: programs, configMap: {name: collector}}]
---
apiVersion: v1
kind: Service
metadata: {name: collector, namespace: outside}
spec:
  selector: {app: collector}
  ports: [{name: http-otlp, port: 4318}]
"""
TRACES = {
    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector.outside.svc.cluster.local:4318",
    "OTEL_BSP_SCHEDULE_DELAY": "200",
}
"""What the demo's lab is told of traces; the collector comes with its last step."""
ROUTE = """\
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: prices, namespace: shop}}
spec:
  parentRefs: [{{group: "", kind: Service, name: prices}}]
  rules: {rules}
"""
POLICY = """\
apiVersion: {api}
kind: {kind}
metadata: {{name: {name}, namespace: shop}}
spec:
  targetRefs: [{{group: "", kind: Service, name: prices}}]
  {spec}
"""
