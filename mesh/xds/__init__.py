"""Workload xDS: the delta client, and the translation between wire and model."""
