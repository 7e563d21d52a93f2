"""Several processes: ranks and sharded weights."""
