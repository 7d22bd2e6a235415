"""Mutual TLS: certificates in and out, the contexts, and one session of the data path."""
