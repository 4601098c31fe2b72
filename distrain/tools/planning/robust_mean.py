"""Means of times, of which some were disturbed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

#: Most parts.
_PARTS = 30
#: Two times of the same thing differ by at most this share of the shorter one, unless the longer one was disturbed.
_USUAL_DIFFERENCE = 0.1


def undisturbed(times: Sequence[float]) -> float:
    """The mean of a few times of the same thing, without those that are clearly longer than the shortest one.

    What a machine does besides makes a time longer, never shorter.
    """
    shortest = min(times)
    return statistics.mean(one for one in times if one <= (1 + _USUAL_DIFFERENCE) * shortest)


def undisturbed_mean(times: Sequence[float]) -> float:
    """As :func:`undisturbed`, of the means of several parts of many consecutive times.

    On a shared machine, what others do makes a processor slower for up to seconds: more than half of the time, if they
    are busy. Parts count and not single times: where ranks take turns on a processor, the fastest times would be those
    in which no other rank had its turn.
    """
    size = -(-len(times) // _PARTS)
    return undisturbed([statistics.mean(times[at : at + size]) for at in range(0, len(times), size)])
