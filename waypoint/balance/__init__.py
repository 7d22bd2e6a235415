"""How an endpoint is found for a request where not just any will do: rings, sessions, budgets."""
