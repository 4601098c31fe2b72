"""Links that let some bytes pass at once and the rest at a lower rate, as traffic shaping does with a token bucket.

Tokens for bytes arrive at the link's rate, up to the bucket's size; a byte passes when there is a token for it. So what
a step sends may pass at once if the link had time to rest, while a measurement without pauses shows the rate alone.
"""

from __future__ import annotations

import statistics
import time

import torch

from distrain.communication.collectives import Communicator, ring_all_reduce_bytes
from distrain.tools.planning.cluster import Link, TokenBucket

#: Bytes of the message that passes at once if there is a token bucket, and of the one that shows its size.
_SMALL, _LARGE = 64 * 1024, 2**20
#: Seconds in which a bucket fills, and repeats of each message.
_REST, _REPEATS = 0.1, 3
#: Part of the time at the link's rate below which a message after a pause shows that there is a bucket.
_FASTER = 0.6


def measure_token_bucket(group: Communicator, device: torch.device, link: Link) -> TokenBucket | None:
    """Finds out whether a link is faster after a rest; all ranks of the group call it together.

    Args:
        group: Ranks whose all-reduce goes over the link, more than one.
        device: Where messages are stored.
        link: As measured without pauses.

    Returns:
        The bucket, the same on all ranks; ``None`` if there is none that matters.
    """
    rounds = 2 * (group.size - 1)
    small, large = (ring_all_reduce_bytes(size, group.size) for size in (_SMALL, _LARGE))
    last, before = link.points[-1], link.points[-2]
    rate = (last.sent - before.sent) / max(last.seconds - before.seconds, 1e-9)
    others = (rounds - 1) * link.latency
    rested = _seconds_after_rest(group, device, _SMALL) - others
    # All ranks must go on alike; their links are the same.
    if rested > _FASTER * small / rate:
        return None
    burst = large - rate * (_seconds_after_rest(group, device, _LARGE) - others - link.latency)
    if burst < small:
        return None
    per_byte = max(rested - link.latency, 0.0) / small
    return TokenBucket(rate, burst, Link.of(link.latency, 1 / max(per_byte, 1e-12)))


def _seconds_after_rest(group: Communicator, device: torch.device, size: int) -> float:
    """Median time of an all-reduce before which the link has rested, on the slowest rank."""
    message = torch.zeros(size // 4, device=device)
    times = []
    for _ in range(_REPEATS):
        # A rank that slept would need milliseconds to wake up; one that trains is busy while its link rests.
        end = time.perf_counter() + _REST
        while time.perf_counter() < end:
            pass
        group.barrier()
        begin = time.perf_counter()
        group.all_reduce(message)
        times.append(time.perf_counter() - begin)
    taken = torch.tensor([statistics.median(times)], dtype=torch.float64, device=device)
    return float(group.all_reduce(taken, "max"))
