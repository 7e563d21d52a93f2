"""How much memory a run takes, without running it."""
