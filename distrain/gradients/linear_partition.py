"""Cuts a sequence of weighted items into contiguous parts so that the heaviest part is as light as possible."""

from __future__ import annotations

from collections.abc import Sequence


def linear_partition(
    weights: Sequence[float], cut_costs: Sequence[float], parts: int, allowed_cuts: Sequence[int]
) -> list[int]:
    """Finds the cuts that minimise the largest cost of a part.

    The cost of a part is the sum of its items' weights, plus the cut cost of its last item unless that ends the
    sequence. Dynamic programming over (items, parts), exact, in O(items² · parts).

    Args:
        weights: Weight of each item, not negative.
        cut_costs: For each item, the cost of a cut directly after it.
        parts: Number of parts.
        allowed_cuts: Indices at which a part may begin, besides 0, in ascending order.

    Returns:
        Index of the first item of each part; the first is 0.

    Raises:
        ValueError: There are fewer than ``parts - 1`` allowed cuts.
    """
    count = len(weights)
    sums = [0.0]
    for weight in weights:
        sums.append(sums[-1] + weight)

    def cost(start: int, stop: int) -> float:
        return sums[stop] - sums[start] + (cut_costs[stop - 1] if stop < count else 0.0)

    stops = [*allowed_cuts, count]
    # best[stop]: the smallest possible largest cost over the first `stop` items in the parts so far, and their starts.
    best: dict[int, tuple[float, list[int]]] = {stop: (cost(0, stop), [0]) for stop in stops}
    for part in range(1, parts):
        with_one_more: dict[int, tuple[float, list[int]]] = {}
        for stop in stops if part < parts - 1 else [count]:
            found: tuple[float, list[int]] | None = None
            for start in reversed(allowed_cuts):
                if start >= stop or start not in best:
                    continue
                last, (largest, starts) = cost(start, stop), best[start]
                if found is not None and last > found[0]:
                    # Parts that begin earlier cost more.
                    break
                if found is None or max(largest, last) <= found[0]:
                    option = (max(largest, last), [*starts, start])
                    found = option if found is None else min(option, found)
            if found is not None:
                with_one_more[stop] = found
        best = with_one_more
    if count not in best:
        raise ValueError(f"{parts} parts need {parts - 1} cuts, there are {len(allowed_cuts)}")
    return best[count][1]
