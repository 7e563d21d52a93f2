"""Builds the embedded world: scenes drawn from Noto Color Emoji, and the small models trained on them."""
