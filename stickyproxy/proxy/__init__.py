"""The data plane, in the order of the path: listener, downstream, exchange, upstream, pool, relay, tunnel, respond."""
