"""L7 for namespaces that opt in. Not built yet: the tunnel comes first."""
