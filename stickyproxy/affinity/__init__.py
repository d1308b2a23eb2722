"""Which upstream? Pure decisions: the time and the random source are arguments, nothing here does I/O."""
