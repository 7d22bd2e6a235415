"""A whole small Kubernetes-like machine in namespaces, from a directory of ordinary YAML.

Pure: `topology`, `podspec`, `addresses`, `proxy_rules`, `names`, `merge`. Shells: `kernel`
(pyroute2), `mounts`, `processes`, `kubelet`, `daemons`, `dns`, `tap`. `supervisor` is the process,
`launch` starts it and `control` speaks with it. No daemon is imported here: they are programs.
"""
