"""The `ambit` command (and `kubectl ambit`): verbs over labs and clusters."""
