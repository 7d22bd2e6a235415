"""The per-node L4 tunnel."""
