"""Links that let some bytes pass at once and the rest at a lower rate, as traffic shaping does with a token bucket.

Tokens for bytes arrive at the link's rate, up to the bucket's size; a byte passes when there is a token for it. So what
a step sends may pass at once if the link had time to rest, while a measurement without pauses shows the rate alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from distrain.communication.collectives import Communicator, ring_all_reduce_bytes
from distrain.tools.planning.cluster import Link, TokenBucket

#: Bytes of the message that passes at once if there is a token bucket, and of the one that empties it.
_SMALL, _LARGE = 64 * 1024, 2**20
#: Seconds in which a bucket fills, and how often a message follows such a rest.
_REST, _REPEATS = 0.1, 5
#: Seconds of the large message from which on there are fewer repeats.
_LONG, _FEWER_REPEATS = 0.3, 3
#: A message that empties the bucket is faster than the same one just after it, by more than this share of its time.
_FASTER = 0.1


def measure_token_bucket(group: Communicator, device: torch.device, link: Link) -> TokenBucket | None:
    """Finds out whether a link is faster after a rest; all ranks of the group call it together.

    Args:
        group: Ranks whose all-reduce goes over the link, more than one.
        device: Where messages are stored.
        link: As measured without pauses.

    Returns:
        The bucket, the same on all ranks; ``None`` if there is none that matters.
    """
    last, before = link.points[-1], link.points[-2]
    rate = (last.sent - before.sent) / max(last.seconds - before.seconds, 1e-9)
    # Both of two messages in a row begin with ranks that are awake: only the rest makes a difference.
    repeats = _REPEATS if link.seconds(_LARGE) < _LONG else _FEWER_REPEATS
    pairs = [_after_rest(group, device, [_LARGE, _LARGE]) for _ in range(repeats)]
    gained = sorted((second - first) / second for first, second in pairs)
    # One disturbance of a second message is no bucket. All ranks decide alike, since they have the same times.
    if gained[1] < _FASTER:
        return None
    burst = rate * statistics.median(second - first for first, second in pairs)
    small = ring_all_reduce_bytes(_SMALL, group.size)
    # Whatever disturbs a message makes it longer.
    rested = min(_after_rest(group, device, [_SMALL])[0] for _ in range(_REPEATS))
    per_byte = max(rested - 2 * (group.size - 1) * link.latency, 0.0) / small
    return TokenBucket(rate, burst, Link.of(link.latency, 1 / max(per_byte, 1e-12)))


def _after_rest(group: Communicator, device: torch.device, sizes: Sequence[int]) -> list[float]:
    """Times of all-reduces in a row, before which the link has rested, on the slowest rank of each."""
    times = []
    messages = [torch.zeros(size // 4, device=device) for size in sizes]
    # A rank that slept would need milliseconds to wake up; one that trains is busy while its link rests.
    end = time.perf_counter() + _REST
    while time.perf_counter() < end:
        pass
    group.barrier()
    for message in messages:
        begin = time.perf_counter()
        group.all_reduce(message)
        times.append(time.perf_counter() - begin)
    taken: list[float] = group.all_reduce(torch.tensor(times, dtype=torch.float64, device=device), "max").tolist()
    return taken
