"""Means of times, of which some were disturbed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

#: Number of parts.
_PARTS = 5
#: Two times of the same thing differ by at most this share of the shorter one, unless the longer one was disturbed.
_USUAL_DIFFERENCE = 0.1


def median_of_means(times: Sequence[float]) -> float:
    """The median of the means of several parts of consecutive times.

    Where ranks take turns on a processor, the median of single times says how long those take that were not
    interrupted. The mean of a part contains the interruptions, and a single disturbance changes one part only.
    """
    size = -(-len(times) // _PARTS)
    return statistics.median(statistics.mean(times[at : at + size]) for at in range(0, len(times), size))


def undisturbed(times: Sequence[float]) -> float:
    """The mean of a few times of the same thing, without those that are clearly longer than the shortest one.

    What a machine does besides makes a time longer, never shorter.
    """
    shortest = min(times)
    return statistics.mean(one for one in times if one <= (1 + _USUAL_DIFFERENCE) * shortest)
