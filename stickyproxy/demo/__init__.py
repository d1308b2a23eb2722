"""What `stickyproxy demo` runs: stateful apps of our own, and the launcher that keeps them running."""
