"""The slim controller."""
