"""Where trained weights begin, how they are loaded again, and the dials that weaken them."""
