"""The mean of times, of which some were disturbed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

#: Number of parts.
_PARTS = 5


def median_of_means(times: Sequence[float]) -> float:
    """The median of the means of several parts of consecutive times.

    Where ranks take turns on a processor, the median of single times says how long those take that were not
    interrupted. The mean of a part contains the interruptions, and a single disturbance changes one part only.
    """
    size = -(-len(times) // _PARTS)
    return statistics.median(statistics.mean(times[at : at + size]) for at in range(0, len(times), size))
