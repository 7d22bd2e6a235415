"""HBONE: tunnels over mutual TLS and HTTP/2 CONNECT."""
