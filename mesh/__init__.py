"""The shared language of the mesh: everything two daemons have in common, and no daemon."""

__version__ = "0.1.0"
