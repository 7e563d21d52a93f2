"""alignlab: fine-tune text-to-image diffusion models on rewards, and compare the ways of doing it."""

__version__ = "0.1.0"
