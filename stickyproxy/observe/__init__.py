"""What happened: counters that cost one addition, the metrics read from them, and the access log."""
