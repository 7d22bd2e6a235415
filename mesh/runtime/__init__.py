"""What every daemon needs to run: settings, log, metrics, admin endpoints, its life."""
