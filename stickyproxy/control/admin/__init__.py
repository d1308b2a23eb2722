"""The admin listener: metrics, liveness, state, and the calls that change it."""
