"""The shared language of the mesh: everything two daemons have in common, and no daemon."""
