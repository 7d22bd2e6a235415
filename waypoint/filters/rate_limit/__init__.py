"""Rate limits: how much a caller may, decided by GCRA, here or in a store that replicas share."""
