"""The control plane: what should be, what was observed, and the snapshot that follows; the admin listener."""
