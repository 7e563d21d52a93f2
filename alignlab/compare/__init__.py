"""Finished runs side by side: outcomes, charts and tables."""
