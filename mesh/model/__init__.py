"""What the mesh knows, as values: workloads, services, policies, and the store of them."""
