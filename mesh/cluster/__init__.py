"""The only door to Kubernetes objects: a protocol, a directory behind it, typed views."""
