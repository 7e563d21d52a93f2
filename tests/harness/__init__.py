"""The harnesses that attack the package: hostile inputs, and runs that are killed at random moments."""
