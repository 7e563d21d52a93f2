"""Ranks of numbers, with ties shared."""

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


def ranks(values: Values) -> Values:
    """Computes (rank - 1)/(B - 1) of values [B], float64 in [0, 1], with ranks from 1.

    Equal values share the mean of their ranks. If all are equal, or there is one, it is 1/2.
    """
    if len(values) < 2:
        return np.full(len(values), 0.5)
    ascending = np.sort(values)
    below, upto = (np.searchsorted(ascending, values, side) for side in ("left", "right"))
    out: Values = (below + upto - 1) / 2 / (len(values) - 1)
    return out
