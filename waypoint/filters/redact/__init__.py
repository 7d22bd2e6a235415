"""RedactionPolicy: find what must not travel, in heads and bodies, and take it out on the way."""
