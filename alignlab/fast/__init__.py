"""The same numbers in less time. Each file may be deleted."""
